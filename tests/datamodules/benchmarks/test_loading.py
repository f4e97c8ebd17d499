"""Every benchmark's files, as its nano replica has them: true answers score 100, and other files are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from datamodules.benchmarks import blink, lisa, mc_bench, mmiu, odinw, ref_l4, revos
from datamodules.benchmarks.base import Benchmark, column_of, limit_columns
from datamodules.benchmarks.reading.parquet import _group, row_bytes
from datamodules.benchmarks.registry import BENCHMARKS, PAPER, benchmark_names, load_benchmark
from datamodules.benchmarks.revos import sample_frames
from datamodules.images.image_loading import load_image
from datamodules.metrics.predictions import Reply
from datamodules.metrics.scoring import score_reply
from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, Sample
from datamodules.synthetic.benchmark_replicas.write import REPLICAS, write_replica
from datamodules.synthetic.write_samples import write_benchmark
from lightning_modules.metrics.summary import summarise


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replicas")
    write_benchmark(root, per_task=1)
    for name in REPLICAS:
        write_replica(name, root, count=4)
    return root


@pytest.fixture
def copy(replicas: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A benchmark's folder that a test may damage."""

    def make(folder: str) -> Path:
        for path in (replicas / folder).rglob("*"):
            if path.is_file():
                target = tmp_path / path.relative_to(replicas)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return tmp_path / folder

    return make


def true_reply(benchmark: Benchmark, sample: Sample) -> Reply:
    """The truth in words, with the sizes that the images really have."""
    images = [load_image(data, 10**7) for data in benchmark.load(sample).images]
    image_sizes = tuple(ImageSizes(image.size, (1000, 1000)) for image in images)
    if isinstance(sample.answer, BoxesAnswer):
        objects = [
            {"image": one.image + 1, "bbox_2d": image_sizes[one.image].to_model(one.box, BoxFormat.RELATIVE_1000)}
            | {"label": one.label}
            for one in sample.answer.boxes
        ]
        return Reply(json.dumps(objects), image_sizes)
    if not isinstance(sample.answer, BoxAnswer):
        return Reply(f"<think>t</think><answer>{sample.answer.letter}</answer>", image_sizes)
    values = image_sizes[sample.answer.image].to_model(sample.answer.box, BoxFormat.RELATIVE_1000)
    return Reply(json.dumps({"bbox_2d": values}), image_sizes)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_true_answers_score_full_marks_in_every_column(name: str, replicas: Path) -> None:
    benchmark = load_benchmark(name, replicas)
    rules = (benchmark.rule, benchmark.official)
    box_format = BoxFormat.RELATIVE_1000
    predictions = [score_reply(s, true_reply(benchmark, s), box_format, *rules) for s in benchmark.samples]
    result = summarise(predictions, *rules, benchmark.averages)
    assert list(result["columns"]) == list(benchmark.averages["avg"])
    assert {cell["score"] for cell in (result["columns"] | result["averages"]).values()} == {100.0}
    assert result["failures"] == {}
    assert len({s.id for s in benchmark.samples}) == len(benchmark.samples)


@pytest.mark.parametrize("name", ["ref_l4", "lisa", "revos", "odinw"])
def test_boxes_lie_inside_their_images(name: str, replicas: Path) -> None:
    for sample in load_benchmark(name, replicas).samples:
        assert box_fault(sample.answer.box) is None


def test_boxes_from_masks_are_the_drawn_things(replicas: Path) -> None:
    """Replicas draw things in boxes of whole pixels, so the ReVOS masks, which are those boxes, come back exactly."""
    meta = json.loads((replicas / "ReVOS/meta_expressions_valid_.json").read_text())
    assert {e["type_id"] for video in meta["videos"].values() for e in video["expressions"].values()} == {0, 1, 2}
    benchmark = load_benchmark("revos", replicas)
    assert benchmark.dropped == {"type_id 2": 1}
    assert len(benchmark.samples) == 8 and {len(s.images) for s in benchmark.samples} == {6}
    assert {s.answer.image for s in benchmark.samples} == {2}


def test_revos_takes_the_nearest_frame_that_shows_the_object(copy) -> None:
    root = copy("ReVOS")
    masks = json.loads((root / "mask_dict.json").read_text())
    places = sample_frames(len(masks["1"]), 6)
    masks["1"][places[2]] = None
    (root / "mask_dict.json").write_text(json.dumps(masks))
    samples = {s.id: s for s in revos.load(root).samples}
    assert samples["revos/video_0001/0"].answer.image == 1
    assert "in the second image" in samples["revos/video_0001/0"].messages[-1].text
    masks["1"] = [None] * len(masks["1"])
    (root / "mask_dict.json").write_text(json.dumps(masks))
    assert revos.load(root).dropped == {"type_id 2": 1, "object in no sampled frame": 2}


def test_frames_are_sampled_uniformly() -> None:
    assert sample_frames(60, 6) == [5, 15, 25, 35, 45, 55]
    assert sample_frames(4, 6) == [0, 1, 2, 3]
    assert len(set(sample_frames(7, 6))) == 6


def test_odinw_asks_only_for_categories_with_one_box(copy) -> None:
    root = copy("odinw")
    path = root / "vector/valid/annotations_without_background.json"
    coco = json.loads(path.read_text())
    coco["annotations"] = [a | {"image_id": 0, "category_id": 1} for a in coco["annotations"][:2]]
    coco["annotations"].append(coco["annotations"][0] | {"image_id": 1, "id": 2})
    path.write_text(json.dumps(coco))
    benchmark = odinw.load(root)
    assert [s.id for s in benchmark.samples if s.task == "Vector"] == ["odinw/Vector/1/1"]


def test_lisa_reads_other_encodings_and_names_its_convention(copy) -> None:
    root = copy("ReasonSeg")
    path = root / "val" / "00000.json"
    record = json.loads(path.read_text())
    record["text"] = ["the café’s cup"]
    record["shapes"].append({"label": "target", "points": [[0, 0], [9, 0], [9, 9], [0, 9]], "shape_type": "polygon"})
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="cp1252")
    targets, first = (lisa.load(root, boxes).samples[0] for boxes in ("targets", "first_shape"))
    assert "the café’s cup" in targets.messages[-1].text
    assert targets.answer.box[:2] == (0.0, 0.0) and first.answer.box[:2] != (0.0, 0.0)


def test_mmiu_finds_images_without_the_categorys_folder(copy) -> None:
    root = copy("MMIU")
    benchmark = mmiu.load(root)
    image = next((root / "Semantic" / "spot_the_similarity").rename(root / "spot_the_similarity").iterdir())
    moved = mmiu.load(root).data
    sample = next(s for s in benchmark.samples if s.task == "spot_the_similarity")
    assert benchmark.load(sample).images[0] == (root / sample.images[0].split("/", 1)[1]).read_bytes()
    image.write_bytes(image.read_bytes() + b"\0")
    assert mmiu.load(root).data != moved  # else answers about other images would be found in the cache


def test_an_mmiu_option_without_text_is_an_option() -> None:
    assert mmiu._OPTION.findall("A:\nB: x") == [("A", ""), ("B", "x")]


def test_ids_that_are_not_unique_are_refused(copy) -> None:
    root = copy("Ref-L4")
    change_parquet(root / "ref-l4-val.parquet", lambda row: row | {"id": "7"})
    with pytest.raises(ValueError, match="ids name several questions, such as 'ref_l4/val/7'"):
        ref_l4.load(root)


def test_threads_read_a_group_of_rows_once(replicas: Path) -> None:
    path = replicas / "BLINK/Jigsaw/val-00000-of-00001.parquet"
    _group.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: row_bytes(path, 0, ["image_1"]), range(32)))
    assert found == [found[0]] * 32 and _group.cache_info().misses == 1


def change_parquet(path: Path, change) -> None:
    table = parquet.read_table(path)
    rows = [change(row) for row in table.to_pylist()]
    fields = [field for field in table.schema if field.name in rows[0]]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(fields)), path)


@pytest.mark.parametrize(
    ("module", "file", "change", "named"),
    [
        (ref_l4, "ref-l4-val.parquet", lambda r: {k: v for k, v in r.items() if k != "caption"}, "caption"),
        (ref_l4, "ref-l4-test.parquet", lambda r: r | {"bbox": r["bbox"][:3]}, "bbox"),
        (ref_l4, "ref-l4-test.parquet", lambda r: r | {"bbox": None}, "bbox=None"),
        (ref_l4, "ref-l4-test.parquet", lambda r: r | {"bbox": [None] * 4}, r"row 0: bbox=\[None"),
        (ref_l4, "ref-l4-test.parquet", lambda r: r | {"width": 0}, r"size=\[0"),
        (ref_l4, "ref-l4-test.parquet", lambda r: r | {"width": None}, "row 0: width=None is not a number"),
        (ref_l4, "ref-l4-val.parquet", lambda r: r | {"caption": None}, "row 0: caption=None is not text"),
        (blink, "Jigsaw/val-00000-of-00001.parquet", lambda r: r | {"answer": "hidden"}, "answer='hidden'"),
        (blink, "Jigsaw/val-00000-of-00001.parquet", lambda r: r | {"answer": None}, "answer=None"),
        (
            blink,
            "Jigsaw/val-00000-of-00001.parquet",
            lambda r: r | {"image_2": {"bytes": None, "path": "a.png"}},
            "row 0: image_2 has no bytes of an image",
        ),
        (mmiu, "all.parquet", lambda r: r | {"question": None}, "question=None"),
        (mmiu, "all.parquet", lambda r: r | {"input_image_path": [None]}, r"input_image_path=\[None\]"),
        (mmiu, "all.parquet", lambda r: r | {"options": "one or two"}, "options"),
        (mmiu, "all.parquet", lambda r: r | {"output": r["output"] and "H"}, "output='H'"),
        (mmiu, "all.parquet", lambda r: r | {"task": "point_tracking"}, "casuality_reasoning_var"),
    ],
)
def test_another_parquet_is_refused_with_the_field(module, file: str, change, named: str, copy) -> None:
    root = copy(module.FOLDER)
    change_parquet(root / file, change)
    with pytest.raises(ValueError, match=named):
        module.load(root)


@pytest.mark.parametrize(
    ("module", "file", "old", "new", "named"),
    [
        (lisa, "val/00001.json", '"shapes"', '"figures"', "shapes"),
        (lisa, "val/00001.json", '"points"', '"dots"', "points"),
        (revos, "meta_expressions_valid_.json", '"anno_id"', '"annotation"', "anno_id"),
        (revos, "mask_dict.json", '"2":', '"1002":', "anno_id 2"),
        (odinw, "PascalVOC/valid/annotations_without_background.json", '"bbox"', '"box"', "bbox"),
        (odinw, "PascalVOC/valid/annotations_without_background.json", '"bbox": [', '"bbox": [1, ', "bbox=.1, "),
        (odinw, "PascalVOC/valid/annotations_without_background.json", '"width"', '"w"', "width"),
        (
            odinw,
            "PascalVOC/valid/annotations_without_background.json",
            '"width": ',
            '"width": null, "w": ',
            "width=None",
        ),
        (odinw, "PascalVOC/valid/annotations_without_background.json", '"name": ', '"name": 3, "n": ', "name=3"),
        (odinw, "PascalVOC/valid/annotations_without_background.json", '"bbox": [', '"bbox": ["1", ', "bbox=.'1', "),
        (
            odinw,
            "PascalVOC/valid/annotations_without_background.json",
            '"image_id": ',
            '"image_id": [], "i": ',
            "image_id",
        ),
        (
            odinw,
            "PascalVOC/valid/annotations_without_background.json",
            '"images": ',
            '"images": null, "i": ',
            "images=None",
        ),
        (odinw, "PascalVOC/valid/annotations_without_background.json", "{", "", "background.json: not valid JSON"),
        (lisa, "val/00001.json", '"text": [', '"text": [3, ', r"text=\[3, "),
        (revos, "meta_expressions_valid_.json", '"videos": ', '"videos": [], "v": ', r"videos=\[\]"),
        (revos, "meta_expressions_valid_.json", '"exp": ', '"exp": null, "e": ', "exp=None is not text"),
        (revos, "meta_expressions_valid_.json", '"frames": ', '"frames": null, "f": ', "frames=None"),
        (revos, "mask_dict.json", '"counts": ', '"runs": ', "no mask in COCO's run lengths: KeyError"),
        (mc_bench, mc_bench.FILE, "{", "", f"{mc_bench.FILE}: not valid JSON"),
        (mc_bench, mc_bench.FILE, '"descriptions": ', '"descriptions": null, "d": ', "descriptions=None is not a list"),
    ],
)
def test_another_json_is_refused_with_the_field(module, file: str, old: str, new: str, named: str, copy) -> None:
    path = copy(module.FOLDER) / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=named):
        module.load(path.parents[len(Path(file).parts) - 1])


def test_a_missing_set_says_which_splits_are_there(copy) -> None:
    root = copy("odinw")
    (root / "vector/valid").rename(root / "vector/train")
    with pytest.raises(FileNotFoundError, match=r"vector/valid.*\['train'\]"):
        odinw.load(root)


def test_a_limit_takes_as_many_of_every_column(replicas: Path) -> None:
    samples = load_benchmark("mmiu", replicas).samples
    limited = limit_columns(samples, 2)
    columns = [column_of(sample) for sample in limited]
    assert {columns.count(column) for column in columns} == {2}
    assert len({s.task for s in limited if column_of(s) == "VGR"}) == 2  # spread over the file, so over both keys
    with pytest.raises(ValueError, match="limit=0"):
        limit_columns(samples, 0)


def test_a_replica_never_replaces_a_download(tmp_path: Path) -> None:
    (tmp_path / "BLINK").mkdir()
    with pytest.raises(ValueError, match="BLINK was not made here"):
        write_replica("blink", tmp_path)


def test_a_replica_is_written_once(tmp_path: Path) -> None:
    write_replica("lisa", tmp_path, count=1)
    first = (tmp_path / "ReasonSeg/val/00000.jpg").stat().st_mtime_ns
    write_replica("lisa", tmp_path, count=1)
    assert (tmp_path / "ReasonSeg/val/00000.jpg").stat().st_mtime_ns == first


def test_benchmarks_are_named_in_lists() -> None:
    assert benchmark_names("all") == [module.NAME for module in PAPER] and len(PAPER) == 7
    assert set(BENCHMARKS) - set(benchmark_names("all")) == {"mc_bench"}, "asked by its name alone"
    assert benchmark_names("lisa, mmiu") == ["lisa", "mmiu"]
    with pytest.raises(ValueError, match="bench='coco'"):
        benchmark_names("coco")
