"""The MIG-Bench loader, on records written here and, where it is present, on the real file."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.benchmarks.mig_bench import IN_DOMAIN, OUT_OF_DOMAIN, TASKS, load_files, load_mig_bench, target_image
from datamodules.images.image_files import load_images
from datamodules.samples.boxes import box_fault
from datamodules.samples.sample import BoxPart, ImagePart, SampleError, TextPart
from tests.beside import SHARED

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("MIG_BENCH_JSON", SHARED / "data/MIG-Bench/MIG_data.json"))


def record(**changes: Any) -> dict[str, Any]:
    """A valid record of the diff task, with some fields changed."""
    return {
        "task": "diff",
        "images": ["./MIG-Bench/images/static_diff/1_source.png", "./MIG-Bench/images/static_diff/1_target.png"],
        "question": "Compare these two images carefully and give me the coordinates of their difference. ",
        "answer": [0.1, 0.2, 0.5, 0.75],
        "additional_info": "",
        "need_format": True,
    } | changes


def load(tmp_path: Path, *records: Any):
    path = tmp_path / "MIG_data.json"
    path.write_text(json.dumps(list(records)))
    return load_mig_bench(path)


@pytest.fixture(scope="module")
def real():
    if not REAL.is_file():
        pytest.skip(f"real MIG-Bench annotations not found: {REAL} (set MIG_BENCH_JSON)")
    return json.loads(REAL.read_text()), load_mig_bench(REAL)


def test_a_record_becomes_images_then_question(tmp_path: Path) -> None:
    (sample,) = load(tmp_path, record())
    assert (sample.id, sample.source, sample.task) == ("mig_bench/0", "mig_bench", "diff")
    assert sample.images[1] == "MIG-Bench/images/static_diff/1_target.png"
    assert sample.messages == (ImagePart(0), ImagePart(1), TextPart(record()["question"]))
    assert (sample.answer.image, sample.answer.box, sample.answer.label) == (1, (0.1, 0.2, 0.5, 0.75), "")


def test_a_box_in_the_question_is_a_box_of_the_first_image_between_its_parentheses(tmp_path: Path) -> None:
    question = "the object marked (<|box_start|>(451,265),(519,388)<|box_end|>). Locate it in the 2th image. "
    (sample,) = load(tmp_path, record(task="multi_view", question=question))
    before, box, after = sample.messages[2:]
    assert before == TextPart("the object marked (")
    assert box == BoxPart(0, (0.451, 0.265, 0.519, 0.388), "<|box_start|>(451,265),(519,388)<|box_end|>")
    assert after == TextPart("). Locate it in the 2th image. ")


def test_additional_info_reaches_no_part_of_a_sample(tmp_path: Path) -> None:
    info = "It is in the second image. <|box_start|>(100,200),(500,750)<|box_end|>"
    samples = load(tmp_path, record(task="group_grounding", additional_info=info))
    assert samples[0].answer.image == 1
    text = json.dumps(samples[0].to_json())
    assert "It is in" not in text and "(100,200)" not in text


@pytest.mark.parametrize(
    ("task", "question", "info", "expected"),
    [
        ("region", "Please locate the 2th region picture in the source image. ", "", 0),
        ("diff", "", "", 1),
        ("view_diff", "", "", 1),
        ("correspondence", "for the first image", "", 1),
        ("refer_grounding", "", "", 1),
        ("reasoning", "Find it in Image-1", "", 1),
        ("group_grounding", "", "It is in the first image. <box>", 0),
        ("group_grounding", "", "It is in the third image. <box>", 2),
        ("common_object", "Recognize and locate this object in the 1th image. ", "", 0),
        ("multi_view", "in the first image(...) Locate this object in the 3th image. ", "", 2),
        ("object_tracking", "locate it in the 2th image.", "", 1),
    ],
)
def test_the_image_of_the_answer(task: str, question: str, info: str, expected: int) -> None:
    fields = {"task": task, "question": question, "additional_info": info, "images": ["a", "b", "c"]}
    assert target_image(fields) == expected


@pytest.mark.parametrize(
    ("changes", "rule", "named"),
    [
        ({"answer": "0.1"}, "field_type", "answer"),
        ({"answer": [0.1, 0.2, 0.3]}, "box_length", "box"),
        ({"answer": [0.1, 0.2, 0.3, None]}, "field_type", "box"),
        ({"answer": [0.1, 0.2, 0.3, float("nan")]}, "not_finite_box", "nan"),
        ({"need_format": 1}, "field_type", "need_format"),
        ({"images": "a.png"}, "field_type", "images"),
        ({"images": ["a.png", 3]}, "field_type", "images"),
        ({"images": ["a.png", "../../etc/b.png"]}, "image_path", "images"),
        ({"images": ["a.png", "/b.png"]}, "image_path", "images"),
        ({"images": ["a.png"]}, "target_image", "image 2 of 1"),
        ({"task": "static"}, "unknown_task", "static"),
        ({"label": "x"}, "unknown_field", "label"),
        ({"task": "common_object"}, "target_image", "question"),
        ({"task": "common_object", "question": "in the 0th image"}, "target_image", "image 0"),
        ({"task": "group_grounding", "additional_info": "It is in the last image"}, "target_image", "additional_info"),
        ({"task": "group_grounding"}, "target_image", "additional_info"),
        ({"question": "<|image_pad|>"}, "reserved_token", "image_pad"),
    ],
)
def test_a_wrong_record_is_named_by_position_rule_and_field(
    tmp_path: Path, changes: dict, rule: str, named: str
) -> None:
    with pytest.raises(SampleError, match="mig_bench/1") as caught:
        load(tmp_path, record(), record(**changes))
    assert caught.value.rule == rule
    assert named in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    wrong = record()
    del wrong["need_format"]
    with pytest.raises(SampleError, match=r"mig_bench/0.*missing_field.*need_format"):
        load(tmp_path, wrong)
    with pytest.raises(SampleError, match=r"mig_bench/0.*field_type"):
        load(tmp_path, ["no object"])


@pytest.mark.parametrize("text", ["{", "{}", "[]", ""])
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "MIG_data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"MIG_data\.json"):
        load_mig_bench(path)


def test_missing_images_are_named_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "MIG_data.json"
    path.write_text(json.dumps([record(), record()]))
    folder = tmp_path / "MIG-Bench/images/static_diff"
    folder.mkdir(parents=True)
    (folder / "1_source.png").write_bytes(b"png")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 .*1_target\.png of mig_bench/0"):
        load_files(path, tmp_path)
    (folder / "1_target.png").write_bytes(b"more")
    samples = load_files(path, tmp_path).samples
    assert load_images(samples[0], tmp_path).images == (b"png", b"more")
    with pytest.raises(SampleError, match="missing_image"):
        load_images(samples[0], tmp_path / "elsewhere")


def test_dirty_boxes_are_counted_and_kept(tmp_path: Path) -> None:
    (tmp_path / "MIG-Bench/images/static_diff").mkdir(parents=True)
    for name in record()["images"]:
        (tmp_path / name).write_bytes(b"png")
    records = [record(), record(answer=[0.5, 0.2, 0.1, 0.4]), record(answer=[0, 0, 1.048, 1])]
    path = tmp_path / "MIG_data.json"
    path.write_text(json.dumps(records))
    benchmark = load_files(path, tmp_path)
    assert benchmark.dropped == {"kept: dirty answer box": 2}
    assert [list(sample.answer.box) for sample in benchmark.samples] == [record["answer"] for record in records]


def test_the_tasks_are_the_ten_of_the_paper() -> None:
    assert len(TASKS) == 10 and len(IN_DOMAIN) == 4
    assert set(IN_DOMAIN) | set(OUT_OF_DOMAIN) == set(TASKS)
    assert "reasoning" in OUT_OF_DOMAIN


def test_the_real_file_loads_whole(real) -> None:
    records, samples = real
    assert len(samples) == len(records) == 4295
    faults = enumerate(box_fault(sample.answer.box) for sample in samples)
    assert {(position, fault) for position, fault in faults if fault} == {
        *((position, "degenerate") for position in (7, 105, 126, 163, 512)),
        *((position, "out_of_range") for position in (34, 703)),
    }
    for position, (sample, source) in enumerate(zip(samples, records, strict=True)):
        assert sample.id == f"mig_bench/{position}"
        assert list(sample.answer.box) == source["answer"]
        shown = "".join(part.text for part in sample.messages if not isinstance(part, ImagePart))
        assert shown == source["question"]
    boxes = Counter(sample.task for sample in samples for part in sample.messages if isinstance(part, BoxPart))
    assert boxes == {"object_tracking": 550, "multi_view": 288}


def test_the_real_file_has_its_known_target_images(real) -> None:
    _, samples = real
    counts: dict[str, Counter] = {task: Counter() for task in TASKS}
    for sample in samples:
        counts[sample.task][sample.answer.image] += 1
    assert counts["common_object"] == dict(enumerate((201, 201, 201, 155, 58)))
    assert counts["group_grounding"] == dict(enumerate((127, 128, 127, 77, 40)))
    assert counts["multi_view"] == dict(enumerate((101, 100, 74, 12, 1), start=1))
    assert counts["object_tracking"] == dict.fromkeys(range(1, 6), 110)
    assert counts["region"] == {0: 1203}
    for task, n in (("diff", 528), ("view_diff", 94), ("refer_grounding", 99), ("reasoning", 101)):
        assert counts[task] == {1: n}


def test_the_hidden_answers_of_the_real_file_agree_and_stay_hidden(real) -> None:
    records, samples = real
    checked = 0
    for sample, source in zip(samples, records, strict=True):
        if sample.task == "group_grounding":
            x1, y1, x2, y2 = (round(value * 1000) for value in source["answer"])
            hidden = f"({x1},{y1}),({x2},{y2})"
            assert hidden in source["additional_info"]
            assert hidden not in json.dumps(sample.to_json())
            checked += 1
    assert checked == 499
