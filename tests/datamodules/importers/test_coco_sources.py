"""RefCOCO, ODinW and V3Det: their own files, and the annotation format that they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers import odinw, refcoco, v3det
from datamodules.importers.reading.coco_annotations import QUESTIONS, Entry, convert
from datamodules.importers.reading.image_bytes import load_images
from datamodules.importers.reading.source import Scan
from datamodules.samples.sample import BoxAnswer, Sample, SampleError, TextPart
from tests.datamodules.importers.published import (
    coco_file,
    reference,
    v3det_files,
    write_odinw,
    write_refcoco,
    write_v3det,
)

CAT = (0.125, 0.25, 0.375, 0.75)


def samples_of(found: Scan, subset: str) -> list[Sample]:
    samples = list(found.convert(found.subsets[subset]))
    for sample in samples:
        assert isinstance(sample, Sample)
        assert len(load_images(sample, found.image_root).images) == 1
    return samples


def test_refcoco_asks_every_sentence_of_its_reference(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    write_refcoco(tmp_path, [reference(1, "testA")], "refcoco+")
    write_refcoco(tmp_path, [reference(1, "test")], "refcocog", "umd")
    found = refcoco.scan(tmp_path)
    assert list(found.subsets) == ["refcoco_unc/train", "refcoco_unc/val", "refcoco+_unc/testA", "refcocog_umd/test"]
    first, second = samples_of(found, "refcoco_unc/train")
    assert first.id == "refcoco_unc/0/0" and first.answer == BoxAnswer(0, CAT, "the cat 0")
    assert second.answer == BoxAnswer(0, CAT, "cat on left") and second.images == ("COCO_train2014_000000000000.jpg",)
    assert samples_of(found, "refcocog_umd/test")[0].images == ("COCO_train2014_000000000001.jpg",)
    assert found.report["keys"]["sentence"]["tokens"] == 8
    question = first.messages[-1]
    assert isinstance(question, TextPart) and question.text in [wording.format("the cat 0") for wording in QUESTIONS]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda ref: ref.pop("split"), r"refs\(unc\)\.p\[0\]: field 'split' is missing"),
        (lambda ref: ref.update(split="dev"), "field 'split' is 'dev'"),
        (lambda ref: ref.update(ann_id=99), "field 'ann_id' is 99"),
        (lambda ref: ref.update(image_id=1), "field 'image_id' is 1, but its annotation's is 0"),
        (lambda ref: ref.update(mask=1), "unknown field 'mask'"),
        (lambda ref: ref["sentences"][1].pop("sent"), r"sentences\[1\]: field 'sent' is missing"),
    ],
)
def test_a_surprising_reference_stops_the_scan(tmp_path: Path, change: Callable[[dict], Any], fault: str) -> None:
    ref = reference(0)
    change(ref)
    write_refcoco(tmp_path, [ref])
    with pytest.raises(ValueError, match=fault):
        refcoco.scan(tmp_path)


def test_a_reference_that_is_given_twice_stops_the_scan(tmp_path: Path) -> None:
    write_refcoco(tmp_path, [reference(0), reference(1), reference(0)])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p\[2\]: field 'ref_id' is 0, as of an earlier record"):
        refcoco.scan(tmp_path)


def test_v3det_refuses_repeated_ids_too_and_does_without_annotation_ids(tmp_path: Path) -> None:
    content, _ = v3det_files()
    assert all("id" not in annotation for annotation in content["annotations"])
    content["images"][1]["id"] = 0
    with pytest.raises(ValueError, match=r"images\[1\]: field 'id' is 0, as of an earlier record"):
        v3det.scan(write_v3det(tmp_path, content))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \{refcoco,refcoco\+,refcocog\}/refs"):
        refcoco.scan(tmp_path)
    write_refcoco(tmp_path)
    (tmp_path / "refcoco/instances.json").unlink()
    with pytest.raises(ValueError, match=r"missing beside.*instances\.json"):
        refcoco.scan(tmp_path)
    with pytest.raises(ValueError, match="no <set>/<train"):
        odinw.scan(tmp_path)
    with pytest.raises(ValueError, match=r"category_tree\.json and"):
        v3det.scan(tmp_path)


def test_odinw_asks_what_an_image_holds_once_and_knows_both_layouts(tmp_path: Path) -> None:
    write_odinw(tmp_path)
    write_odinw(tmp_path, place="OxfordPets/by-breed/mini_val")
    folder = write_odinw(tmp_path, place="pistols/export") / "pistols/export"
    (folder / odinw.FILE).rename(folder / f"val_{odinw.FILE}")
    for other in (f"new_{odinw.FILE}", "fewshot_train_shot1_seed3.json"):  # lie beside the real ones
        (tmp_path / "WildfireSmoke/train" / other).write_text("[]")
    found = odinw.scan(tmp_path)
    assert list(found.subsets) == ["OxfordPets/by-breed/mini_val", "WildfireSmoke/train", "pistols/valid"]
    assert found.skipped == {"several_boxes": 3, "crowd": 0}
    samples = samples_of(found, "pistols/valid")
    assert [sample.answer for sample in samples] == [BoxAnswer(0, CAT, "cat")] * 2
    assert samples[1].images == ("pistols/export/1.jpg",)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda coco: coco.pop("images"), "field 'images' is missing or empty"),
        (lambda coco: coco.update(annotations=[]), "field 'annotations' is missing or empty"),
        (lambda coco: coco.update(videos=[1]), "unknown top-level field 'videos'"),
        (lambda coco: coco["images"][1].pop("width"), r"images\[1\]: field 'width' is missing"),
        (lambda coco: coco["images"][1].update(width=0), r"images\[1\]: width=0"),
        (lambda coco: coco["annotations"][2].update(bbox=[1, 2, 3]), r"annotations\[2\]: field 'bbox' should be four"),
        (lambda coco: coco["annotations"][2].update(bbox=[1, 2, 3, "4"]), "field 'bbox' should be four"),
        (lambda coco: coco["annotations"][0].update(category_id=9), "category_id=9, and one of them is not listed"),
        (lambda coco: coco["annotations"][0].update(image_id=9), "image_id=9"),
        (lambda coco: coco["annotations"][0].update(rotation=9), "unknown field 'rotation'"),
        (lambda coco: coco["images"][1].update(id=0), r"images\[1\]: field 'id' is 0, as of an earlier record"),
        (lambda coco: coco["annotations"][3].update(id=1), r"annotations\[3\]: field 'id' is 1, as of an earlier"),
        (lambda coco: coco["categories"][1].update(id=1), r"categories\[1\]: field 'id' is 1, as of an earlier"),
    ],
)
def test_a_surprising_annotation_file_stops_the_scan(tmp_path: Path, change: Callable[[dict], Any], fault: str) -> None:
    content = coco_file()
    change(content)
    (tmp_path / "WildfireSmoke/train").mkdir(parents=True)
    (tmp_path / "WildfireSmoke/train" / odinw.FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=fault):
        odinw.scan(tmp_path)


@pytest.mark.parametrize(
    ("box", "phrase", "outcome"),
    [
        ([-0.5, 0, 64.9, 48], "cat", (0.0, 0.0, 1.0, 1.0)),
        ([8, 12, 16, 24], "cat", CAT),
        ([8, 12, 60, 24], "cat", "out_of_range_box"),
        ([-3, 12, 10, 24], "cat", "out_of_range_box"),
        ([8, 12, 0, 24], "cat", "degenerate_box"),
        ([8, 12, -4, 24], "cat", "degenerate_box"),
        ([8, 12, float("nan"), 24], "cat", "not_finite_box"),
        ([0.1, 0.2, 0.5, 0.5], "cat", "box_in_unit"),
        ([0.6, 0.6, 0.9, 0.9], "cat", "box_in_unit"),  # xyxy in 0-1
        ([0, 0, 1, 1], "cat", "box_in_unit"),
        ([0, 0, 0, 0], "cat", "degenerate_box"),
        ([8, 12, 16, 24], "  ", "empty_phrase"),
        ([8, 12, 16, 24], " . ", "empty_phrase"),
        ([8, 12, 16, 24], "<|image_pad|>", "reserved_token"),
    ],
)
def test_boxes_at_the_border_are_clamped_and_bad_ones_rejected(box: list, phrase: str, outcome: Any) -> None:
    (sample,) = convert("test", [Entry("a", "rec", "a.jpg", (64, 48), box, phrase)])
    if isinstance(outcome, str):
        assert isinstance(sample, SampleError) and sample.rule == outcome
    else:
        assert isinstance(sample, Sample) and sample.answer == BoxAnswer(0, outcome, "cat")
        assert sample.extra.get("repaired") == (None if outcome == CAT else "clamped_box")


def test_v3det_leaves_out_classes_beside_their_relatives(tmp_path: Path) -> None:
    content, _ = v3det_files()
    box = {"bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0}
    content["annotations"].append({"image_id": 1, "category_id": 3, **box})  # an animal beside the cat
    content["annotations"].append({"image_id": 1, "category_id": 2, **box, "iscrowd": 1})
    found = v3det.scan(write_v3det(tmp_path, content))
    assert found.skipped == {"several_boxes": 1, "related_class": 2, "crowd": 1}
    (sample,) = samples_of(found, "train")
    assert sample.id == "v3det/train/0/1" and sample.images == ("images/n00/0_x.jpg",)


def test_v3det_images_may_lie_one_folder_deeper(tmp_path: Path) -> None:
    write_v3det(tmp_path)
    (tmp_path / "V3Det").mkdir()
    (tmp_path / "images").rename(tmp_path / "V3Det/images")
    assert len(samples_of(v3det.scan(tmp_path), "train")) == 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"categoryid2treeid": None}, "field 'categoryid2treeid' should be an object"),
        ({"ancestor2descendant": [["n03", "n01"]]}, "field 'ancestor2descendant' should be an object"),
        ({"ancestor2descendant": {"n03": "n01"}}, "field 'ancestor2descendant' has 'n03': 'n01', no list"),
        ({"categoryid2treeid": {"cat": "n01"}}, "field 'categoryid2treeid' has 'cat'"),
        ({"categoryid2treeid": {"1": "n01", "2": "n02"}}, r"field 'categoryid2treeid' lacks the class ids \[3\]"),
    ],
)
def test_a_surprising_tree_stops_the_scan(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    _, tree = v3det_files()
    with pytest.raises(ValueError, match=fault):
        v3det.scan(write_v3det(tmp_path, tree=tree | change))
