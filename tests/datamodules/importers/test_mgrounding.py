from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers.mgrounding import NAME, convert, image_root, record_samples, scan
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, BoxPart, ImagePart, Sample, SampleError, TextPart
from tests.datamodules.importers.published import MGROUNDING, mgrounding_record, write_mgrounding


def samples_of(root: Path) -> list[Sample | SampleError]:
    found = scan(root)
    return [sample for spans in found.subsets.values() for sample in found.convert(list(spans))]


def rules_of(record: dict[str, Any]) -> list[str | None]:
    return [s.rule if isinstance(s, SampleError) else None for s in record_samples(record, 0)]


def test_every_subset_becomes_samples_with_the_images_that_its_words_say(tmp_path: Path) -> None:
    root = write_mgrounding(tmp_path, [mgrounding_record(number, kind) for number, kind in enumerate(range(8))])
    found = scan(root)
    assert found.skipped == {"region_to_text": 1}
    assert {name: len(spans) for name, spans in found.subsets.items()} == dict.fromkeys(found.subsets, 1)
    samples = {sample.id: sample for sample in samples_of(root)}
    assert len(samples) == 8
    boxes = [
        (sample.task, [box.image for box in getattr(sample.answer, "boxes", (sample.answer,))])
        for sample in samples.values()
    ]
    assert boxes == [
        ("common_object", [2]),
        ("diff", [1]),
        ("free_form", [0]),
        ("group_grounding", [1]),
        ("group_grounding", [0]),
        ("object_tracking", [1, 2, 3]),
        ("refer_grounding", [1]),
        ("region", [0]),
    ]


def test_a_record_of_two_turns_is_two_questions_over_the_same_images() -> None:
    first, second = record_samples(mgrounding_record(5), 77)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.id, second.id) == ("mgrounding/group_grounding/77/0", "mgrounding/group_grounding/77/1")
    assert first.images == second.images == tuple(f"{NAME}/Group_Grounding/SA-1B/000005_{k}.jpg" for k in range(3))
    question = "Give the bounding box of: <|object_ref_start|>a red kite<|object_ref_end|>."
    assert first.messages == (ImagePart(0), ImagePart(1), ImagePart(2), TextPart(question))
    assert first.answer == BoxAnswer(1, (0.316, 0.058, 0.764, 0.999), "a red kite")
    assert second.answer == BoxAnswer(0, (0.408, 0.656, 0.578, 0.997), "a dog")
    assert second.messages[:3] == first.messages[:3]
    assert first.extra == {"image_from": "answer", "record": "5_0", "type": "gg_train"}


def test_boxes_in_questions_are_boxes_and_tracks_are_bound_in_order() -> None:
    (sample,) = record_samples(mgrounding_record(0, kind=5), 0)
    assert isinstance(sample, Sample) and isinstance(sample.answer, BoxesAnswer)
    assert BoxPart(0, (0.001, 0.002, 0.03, 0.04), "<|box_start|>(1,2),(30,40)<|box_end|>") in sample.messages
    assert [box.box[0] for box in sample.answer.boxes] == [0.002, 0.003, 0.004]


def test_records_are_found_again_by_their_place_with_any_characters(tmp_path: Path) -> None:
    records = [mgrounding_record(number) for number in range(5)]
    records[1]["id"] = "später 後"
    root = write_mgrounding(tmp_path, records)
    spans = scan(root).subsets["group_grounding"]
    found = list(convert(root / NAME / f"{NAME}.json", [spans[3], spans[1]]))
    assert [sample.extra["record"] for sample in found] == ["3_0", "3_0", "später 後", "später 後"]
    assert scan(root).report["counts"]["subset, type"] == {"Group_Grounding, gg_train": 5}


def answer(text: str) -> Callable[[dict], Any]:
    return lambda record: record["conversations"][1].update(value=text)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (answer("In the first image. <|box_start|>(5,6),(5,9)<|box_end|>"), "degenerate_box"),
        (answer("In the first image. <|box_start|>(5,6),(3,9)<|box_end|>"), "degenerate_box"),
        (answer("In the first image. <|box_start|>(5,6),(1001,9)<|box_end|>"), "out_of_range_box"),
        (answer("In the fourth image. <|box_start|>(5,6),(7,9)<|box_end|>"), "image_index"),
        (answer("It is there: <|box_start|>(5,6),(7,9)<|box_end|>"), "image_unknown"),
        (answer("It is not there."), "no_box"),
        (lambda r: r["images"].__setitem__(2, "../../etc/passwd"), "image_path"),
        (lambda r: r["conversations"][0].update(value="<image>\n<image>\nWhere?"), "image_tags"),
        (lambda r: r["conversations"][2].update(value="<image>\nAnd?"), "image_tags"),
        (lambda r: r["conversations"].pop(), "turn_order"),
        (lambda r: r["conversations"].reverse(), "turn_order"),
        (lambda r: r["conversations"].clear(), "turn_order"),
        (lambda r: r["conversations"][0].update(value="<image>\n" * 3), "no_question"),
    ],
)
def test_a_dirty_record_is_rejected_by_its_rule(change: Callable[[dict], Any], rule: str) -> None:
    record = mgrounding_record(0)
    assert rules_of(record) == [None, None]
    change(record)
    assert rule in rules_of(record)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda r: r.pop("type"), r"\[1\]: field 'type' is missing"),
        (lambda r: r.update(bbox=[1]), r"\[1\]: unknown field 'bbox'"),
        (lambda r: r.update(id=3), r"field 'id' should be str"),
        (lambda r: r.update(images=[]), "field 'images' should be file names"),
        (lambda r: r.update(images=[3]), "field 'images' should be file names"),
        (lambda r: r.update(images=["./Other/SA-1B/x.jpg"]), "field 'images' is './Other"),
        (lambda r: r.update(images=[f"./{NAME}/New_Subset/x.jpg"]), "field 'images' is .*New_Subset"),
        (
            lambda r: r["conversations"][1].update({"from": "assistant"}),
            r"conversations\[1\]: field 'from' is 'assistant'",
        ),
        (lambda r: r["conversations"][0].pop("value"), r"conversations\[0\]: field 'value' is missing"),
        (lambda r: r.update(conversations={}), "field 'conversations' should be list"),
    ],
)
def test_a_surprise_stops_the_scan_with_place_and_field(
    tmp_path: Path, change: Callable[[dict], Any], fault: str
) -> None:
    records = [mgrounding_record(0), mgrounding_record(1)]
    root = write_mgrounding(tmp_path, records)
    change(records[1])
    (root / NAME / f"{NAME}.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=rf"{NAME}\.json.*{fault}"):
        scan(root)


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": [{}]}'])
def test_another_kind_of_file_is_an_error(tmp_path: Path, text: str) -> None:
    root = write_mgrounding(tmp_path, [mgrounding_record(0)])
    (root / NAME / f"{NAME}.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no record|a list of records"):
        scan(root)


def test_images_are_found_where_archives_leave_them(tmp_path: Path) -> None:
    archive = tmp_path / "home/liyou/opensource_datasets"
    write_mgrounding(archive, [mgrounding_record(0)])
    (tmp_path / NAME).mkdir()
    (archive / NAME / f"{NAME}.json").rename(tmp_path / NAME / f"{NAME}.json")
    assert image_root(tmp_path) == scan(tmp_path).image_root == archive
    assert image_root(archive / NAME) == archive
    write_mgrounding(tmp_path / "home/other/opensource_datasets", [mgrounding_record(0)])
    with pytest.raises(ValueError, match=f"exactly one folder {NAME}"):
        image_root(tmp_path)
    with pytest.raises(ValueError, match=r"neither MGrounding-630k\.json"):
        scan(tmp_path / "home")


def test_the_file_of_tests_has_every_subset() -> None:
    assert {folder.split("/")[0] for folder, *_ in MGROUNDING} == {
        "Common_Object",
        "Difference",
        "Free-Form",
        "Group_Grounding",
        "Object_Tracking",
        "Referring_Grounding",
        "Region_Locating",
    }
