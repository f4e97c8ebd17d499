"""Photographs that EXIF turns, in every benchmark: an answer that is right in the image as it is shown scores 1.

The truth is measured in the pixels that a model is shown. Each benchmark's files have their boxes in the frame in which
its authors read images: LISA and ReVOS with OpenCV, which turns them, the others with Pillow, which does not.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from datamodules.benchmarks import lisa, mig_bench, mmiu, odinw, ref_l4, revos
from datamodules.benchmarks.base import Benchmark
from datamodules.benchmarks.reading.masks import encode_counts
from datamodules.encoding.messages import PromptStyle, build_messages
from datamodules.images.image_loading import load_image
from datamodules.metrics.predictions import Reply
from datamodules.metrics.scoring import score_reply
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Sample, SampleError
from datamodules.synthetic.benchmark_replicas.write import write_replica
from tests.beside import SHARED
from tests.datamodules.photographs import QUERY, SIZE, STORED, drawn_box, photograph, place_of, unit

CASES = SHARED / "cases/inputs.py"
ORIENTATIONS = range(1, 9)
OPENCV = pytest.importorskip("cv2", reason="no OpenCV: pip install -e '.[benchmarks]'")
Write = Callable[[Path, bytes, tuple[int, int], tuple[int, ...]], None]


def write_mig_bench(root: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...]) -> None:
    def relative_1000(pixels: tuple[int, int, int, int]) -> tuple[int, ...]:
        return tuple(round(1000 * value) for value in unit(pixels))

    x1, y1, x2, y2 = relative_1000(QUERY)
    record = {
        "task": "multi_view",
        "images": ["./MIG-Bench/images/a.jpg", "./MIG-Bench/images/b.jpg"],
        "question": f"The thing in the first image(<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>). Locate it in the"
        " 2th image. ",
        "answer": [value / total for value, total in zip(box, size * 2, strict=True)],
        "additional_info": "",
        "need_format": True,
    }
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (root / f"images/{name}.jpg").write_bytes(data)
    (root / "MIG_data.json").write_text(json.dumps([record]))


def write_ref_l4(root: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = map(float, box)
    row = {"caption": "the red thing", "bbox": [x1, y1, x2 - x1, y2 - y1], "file_name": "a.jpg"}
    row |= {"ori_category_id": "o365_1", "width": size[0], "height": size[1]}
    (root / "images").mkdir(parents=True)
    (root / "images/a.jpg").write_bytes(data)
    for split in ref_l4.COLUMNS:
        parquet.write_table(pyarrow.Table.from_pylist([row | {"id": split}]), root / f"ref-l4-{split}.parquet")


def write_odinw(root: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box
    coco = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": size[0], "height": size[1]}],
        "categories": [{"id": 1, "name": "red thing"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}],
    }
    for folder in odinw.SETS.values():
        (root / folder / "valid").mkdir(parents=True)
        (root / folder / "valid/a.jpg").write_bytes(data)
        (root / folder / "valid" / odinw.FILE).write_text(json.dumps(coco))


def write_lisa(root: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box
    points = [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]
    record = {"text": ["the red thing"], "is_sentence": False, "shapes": [{"label": "target", "points": points}]}
    for split in lisa.COLUMNS:
        (root / split).mkdir(parents=True)
        (root / split / "a.jpg").write_bytes(data)
        (root / split / "a.json").write_text(json.dumps(record))


def write_revos(root: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...]) -> None:
    mask = np.zeros((size[1], size[0]), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    rle = {"size": [size[1], size[0]], "counts": encode_counts(np.diff(edges).tolist())}
    expression = {"exp": "the red thing", "anno_id": [7], "type_id": 0, "obj_id": [1]}
    meta = {"videos": {"v": {"frames": ["00000"] * 6, "expressions": {"0": expression}}}}
    (root / "JPEGImages/v").mkdir(parents=True)
    (root / "JPEGImages/v/00000.jpg").write_bytes(data)
    (root / "meta_expressions_valid_.json").write_text(json.dumps(meta))
    (root / "mask_dict.json").write_text(json.dumps({"7": [rle] * 6}))


AS_STORED = {"mig_bench": (mig_bench, write_mig_bench), "ref_l4": (ref_l4, write_ref_l4)}
AS_STORED |= {"odinw": (odinw, write_odinw)}
AS_SHOWN = {"lisa": (lisa, write_lisa), "revos": (revos, write_revos)}


def scored(benchmark: Benchmark, sample: Sample, box: tuple[float, ...]) -> tuple[float, float, str | None]:
    """What an answer of `box`, unit xyxy of the image as it is shown, is worth: by both rules, and its failure."""
    sizes = [load_image(data, 10**7).size for data in benchmark.load(sample).images]
    image_sizes = tuple(ImageSizes(size, (1000, 1000)) for size in sizes)
    x1, y1, x2, y2 = (round(1000 * value) for value in box)
    text = f"({x1},{y1}),({x2},{y2})"
    found = score_reply(sample, Reply(text, image_sizes), BoxFormat.RELATIVE_1000, benchmark.rule, benchmark.official)
    return found.value, found.official_value, found.failure


def check(module: ModuleType, root: Path, data: bytes) -> Benchmark:
    benchmark = module.load(root)
    truth = place_of(data)
    for sample in benchmark.samples:
        assert sample.answer.box == pytest.approx(truth, abs=1e-3)
        value, official, failure = scored(benchmark, sample, truth)
        assert failure is None and min(value, official) > 0.98
    return benchmark


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", AS_STORED)
def test_boxes_of_stored_pixels_turn_with_the_photograph(name: str, orientation: int, tmp_path: Path) -> None:
    module, write = AS_STORED[name]
    data = photograph(orientation)
    write(tmp_path / module.FOLDER, data, SIZE, STORED)
    benchmark = check(module, tmp_path / module.FOLDER, data)
    turned = 0 if orientation == 1 else len(benchmark.samples)
    assert benchmark.dropped.get("kept: boxes of a turned photograph", 0) == turned


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", AS_SHOWN)
def test_boxes_of_pixels_as_shown_stay(name: str, orientation: int, tmp_path: Path) -> None:
    """The file's boxes are drawn in what OpenCV reads, as the benchmark's authors read it."""
    module, write = AS_SHOWN[name]
    data = photograph(orientation)
    pixels = OPENCV.imdecode(np.frombuffer(data, np.uint8), OPENCV.IMREAD_COLOR)[..., ::-1]
    height, width = pixels.shape[:2]
    box = tuple(round(v * t) for v, t in zip(drawn_box(pixels), (width, height) * 2, strict=True))
    write(tmp_path / module.FOLDER, data, (width, height), box)
    check(module, tmp_path / module.FOLDER, data)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("name", [*AS_STORED, *AS_SHOWN])
def test_the_shared_photographs(name: str, orientation: int, tmp_path: Path) -> None:
    if not CASES.is_file():
        pytest.skip(f"{CASES} is not here")
    spec = importlib.util.spec_from_file_location("inputs", CASES)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    cases.turned_photographs(tmp_path / "turned")
    data = (tmp_path / f"turned/orientation{orientation}.jpg").read_bytes()
    module, write = (AS_STORED | AS_SHOWN)[name]
    size, box = SIZE, STORED
    if name in AS_SHOWN:
        size = SIZE if orientation == 3 else (SIZE[1], SIZE[0])
        box = tuple(round(v * t) for v, t in zip(place_of(data), size * 2, strict=True))
    write(tmp_path / module.FOLDER, data, size, box)
    check(module, tmp_path / module.FOLDER, data)


def test_the_box_inside_a_question_turns_too_in_every_style(tmp_path: Path) -> None:
    data = photograph(6)
    write_mig_bench(tmp_path / "MIG-Bench", data, SIZE, STORED)
    (sample,) = mig_bench.load(tmp_path / "MIG-Bench").samples
    numbers = tuple(round(1000 * value) for value in place_of(data, "blue"))
    image_sizes = [ImageSizes((SIZE[1], SIZE[0]), (100, 100))] * 2

    def question(style: PromptStyle) -> str:
        return build_messages(sample, image_sizes, BoxFormat.RELATIVE_1000, style)[0]["content"][-1]["text"]

    x1, y1, x2, y2 = numbers
    assert f"(<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>)" in question(PromptStyle.OFFICIAL)
    assert f"([{x1}, {y1}, {x2}, {y2}])" in question(PromptStyle.THINK)


def test_mig_bench_says_how_many_photographs_are_turned(tmp_path: Path) -> None:
    write_mig_bench(tmp_path / "MIG-Bench", photograph(6), SIZE, STORED)
    assert mig_bench.load(tmp_path / "MIG-Bench").dropped == {"kept: boxes of a turned photograph": 1}
    write_mig_bench(tmp_path / "other/MIG-Bench", photograph(1), SIZE, STORED)
    assert mig_bench.load(tmp_path / "other/MIG-Bench").dropped == {}


@pytest.mark.parametrize("name", ["ref_l4", "odinw", "revos"])
def test_an_annotation_of_the_other_frames_size_is_counted_by_name(name: str, tmp_path: Path) -> None:
    module, write = (AS_STORED | AS_SHOWN)[name]
    wrong = SIZE if name in AS_SHOWN else (SIZE[1], SIZE[0])
    data = photograph(6)
    write(tmp_path / module.FOLDER, data, wrong, (5, 10, 35, 30))
    benchmark = module.load(tmp_path / module.FOLDER)
    assert {scored(benchmark, sample, place_of(data))[2] for sample in benchmark.samples} == {"size_mismatch"}


def test_mmiu_counts_a_question_on_a_turned_photograph_by_name(tmp_path: Path) -> None:
    write_replica("mmiu", tmp_path, count=2)
    benchmark = mmiu.load(tmp_path / "MMIU")
    sample = benchmark.samples[0]
    assert benchmark.load(sample).sample is sample
    (tmp_path / "MMIU" / sample.images[1]).write_bytes(photograph(3))
    with pytest.raises(SampleError) as caught:
        benchmark.load(sample)
    assert (caught.value.rule, caught.value.sample_id) == ("turned_image", sample.id)


def test_a_missing_or_damaged_photograph_is_left_to_the_asking(tmp_path: Path) -> None:
    write_odinw(tmp_path / "odinw", b"no image", SIZE, STORED)
    (tmp_path / "odinw/vector/valid/a.jpg").unlink()
    benchmark = odinw.load(tmp_path / "odinw")
    assert len(benchmark.samples) == 5
    with pytest.raises(SampleError, match="missing_image"):
        benchmark.load(benchmark.samples[-1])
