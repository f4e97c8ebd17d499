"""COCO files as Roboflow, CVAT and Label Studio export them, and files that are wrong."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers.own_data import coco
from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.reading.source import DataError, Scan
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, LoadedSample, SampleError, TextPart
from tests.beside import SHARED
from tests.datamodules.importers.published import jpeg

CAT, DOG = (8.0, 12.0, 16.0, 24.0), (0.0, 0.0, 32.0, 24.0)  # x, y, width, height of images of 64x48
CAT_UNIT, DOG_UNIT = (0.125, 0.25, 0.375, 0.75), (0.0, 0.0, 0.5, 0.5)


def image(number: int, name: str, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 64, "height": 48, **more}


def box(number: int, of: int, category: int, xywh: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": of, "category_id": category, "bbox": xywh, "iscrowd": 0, **more}


def write(root: Path, content: dict[str, Any], place: str, images: str) -> Path:
    """The annotation file at <root>/<place>, its images in <root>/<images>."""
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(json.dumps(content))
    for number, one in enumerate(content.get("images", [])):
        path = root / images / str(one["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (64, 48)))
    return root


def roboflow(root: Path, split: str = "train") -> Path:
    """<root>/<split>/_annotations.coco.json beside its images, with `extra` and a category 0 that groups the others."""
    names = [f"{stem}_jpg.rf.{'0f' * 16}.jpg" for stem in ("a", "b")]
    content = {
        "info": {"year": "2026", "version": "1", "description": "Exported from roboflow.com", "date_created": "2026"},
        "licenses": [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}],
        "categories": [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ],
        "images": [
            image(k, name, license=1, date_captured="2026-05-01T10:00:00+00:00", extra={"name": f"{k}.jpg"})
            for k, name in enumerate(names)
        ],
        "annotations": [
            box(0, 0, 1, list(CAT), area=384, segmentation=[]),
            box(1, 0, 2, list(DOG), area=768, segmentation=[]),
            box(2, 1, 2, list(CAT), area=384, segmentation=[]),
            box(3, 1, 2, list(DOG), area=768, segmentation=[]),
        ],
    }
    return write(root, content, f"{split}/_annotations.coco.json", split)


def cvat(root: Path) -> Path:
    """annotations/instances_default.json beside images/; one rectangle is rotated, one is a mask of a crowd."""
    attributes = {"occluded": False, "rotation": 0.0, "breed": "tabby"}
    content = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": "", "description": "", "url": "", "version": "", "year": ""},
        "categories": [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 2, "name": "dog", "supercategory": ""}],
        "images": [image(k + 1, f"{k}.jpg", license=0, flickr_url="", coco_url="", date_captured=0) for k in range(3)],
        "annotations": [
            box(1, 1, 1, list(CAT), segmentation=[], area=384.0, attributes=attributes),
            box(2, 2, 1, list(CAT), segmentation=[], area=384.0, attributes={"occluded": True, "rotation": 23.5}),
            box(3, 2, 2, list(DOG), segmentation=[], area=768.0, attributes=attributes),
            box(4, 3, 2, list(DOG), segmentation={"counts": [0], "size": [48, 64]}, iscrowd=1, attributes=attributes),
        ],
    }
    content["annotations"][3]["iscrowd"] = 1
    return write(root, content, "annotations/instances_default.json", "images")


def label_studio(root: Path) -> Path:
    """result.json beside images/; file names lead into that folder, and one image has no size."""
    content = {
        "images": [
            {"width": 64, "height": 48, "id": 0, "file_name": "images/0a1b2c-a.jpg"},
            {"width": None, "height": None, "id": 1, "file_name": "images/3d4e5f-b.jpg"},
        ],
        "categories": [{"id": 0, "name": "cat"}],
        "annotations": [box(k, k, 0, list(CAT), segmentation=[], ignore=0, area=384.0) for k in range(2)],
        "info": {"year": 2026, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""},
    }
    return write(root, content, "result.json", "")


def outcomes(scan: Scan, subset: str) -> list[LoadedSample | SampleError]:
    return list(scan.convert(scan.subsets[subset]))


def rules(scan: Scan) -> Counter[str]:
    found = [one for name in scan.subsets for one in outcomes(scan, name)]
    return Counter(one.rule if isinstance(one, SampleError) else "sound" for one in found)


def test_roboflows_export_is_imported_and_its_own_fields_are_shown(tmp_path: Path) -> None:
    root = roboflow(roboflow(tmp_path / "pets"), "valid")
    scan = coco.scan(root, (), OwnData(task="find"))
    assert list(scan.subsets) == ["train", "valid"]
    cat, dog, dogs = outcomes(scan, "train")
    assert cat.sample.answer == BoxAnswer(0, CAT_UNIT, "cat") and dog.sample.answer == BoxAnswer(0, DOG_UNIT, "dog")
    assert isinstance(dogs.sample.answer, BoxesAnswer), "several boxes are one answer"
    assert [one.box for one in dogs.sample.answer.boxes] == [CAT_UNIT, DOG_UNIT]
    assert cat.sample.id == "pets/train:0/0" and cat.sample.task == "find" and cat.sample.source == "coco"
    assert cat.sample.extra == {"image_from": "single", "form": "coco", "record": 0}
    assert cat.images == (jpeg(0, (64, 48)),)
    unknown = scan.report["counts"]["unknown fields of images, not used"]
    assert unknown == {"license": 4, "date_captured": 4, "extra": 4}


def test_cvats_export_is_imported_but_for_what_is_no_upright_box(tmp_path: Path) -> None:
    scan = coco.scan(cvat(tmp_path / "pets"), (), OwnData())
    assert rules(scan) == {"sound": 2, "rotated_box": 1, "crowd": 1}
    found = outcomes(scan, "annotations/instances_default")
    assert [one.sample.answer.label for one in found if isinstance(one, LoadedSample)] == ["cat", "dog"]
    (turned,) = [one for one in found if isinstance(one, SampleError) and one.rule == "rotated_box"]
    assert "rotated by 23.5 degrees" in turned.detail and "'cat'" in turned.detail


def test_label_studios_export_is_imported_with_sizes_that_it_could_not_read(tmp_path: Path) -> None:
    scan = coco.scan(label_studio(tmp_path / "pets"), (), OwnData())
    assert [one.sample.answer for one in outcomes(scan, "result")] == [BoxAnswer(0, CAT_UNIT, "cat")] * 2
    assert scan.report["counts"]["images without width and height"] == {"the file's own are taken": 1}
    assert outcomes(scan, "result")[0].sample.images == ("images/0a1b2c-a.jpg",)


def test_one_file_and_stated_images_and_wordings(tmp_path: Path) -> None:
    root = roboflow(tmp_path / "pets")
    (root / "train/_annotations.coco.json").rename(tmp_path / "cats.json")
    own = OwnData(images=str(root / "train"), questions=["Where is the {} hiding?"], name="mine")
    scan = coco.scan(tmp_path / "cats.json", (), own)
    assert list(scan.subsets) == ["cats"]
    texts = [one.sample.messages[1] for one in outcomes(scan, "cats")]
    assert texts[0] == TextPart("Where is the cat hiding?") and texts[2] == TextPart("Where is the dog hiding?")
    assert outcomes(scan, "cats")[0].sample.id == "mine/cats:0/0"


def content_of(root: Path) -> tuple[Path, dict[str, Any]]:
    path = root / "train/_annotations.coco.json"
    return path, json.loads(path.read_text())


def changed(root: Path, change: Any) -> Scan:
    path, content = content_of(roboflow(root))
    change(content)
    path.write_text(json.dumps(content))
    return coco.scan(root, (), OwnData())


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda c: c["annotations"][0].update(bbox=[8, 12, 60, 24]), {"sound": 2, "out_of_range_box": 1}),
        (lambda c: c["annotations"][0].update(bbox=[8, 12, 0, 24]), {"sound": 2, "degenerate_box": 1}),
        (lambda c: c["annotations"][0].update(bbox=[8, 12, -3, 24]), {"sound": 2, "degenerate_box": 1}),
        (lambda c: c["annotations"][0].update(bbox=[8, float("nan"), 3, 24]), {"sound": 2, "not_finite_box": 1}),
        (lambda c: c["annotations"][0].update(bbox=[8, 10**400, 3, 24]), {"sound": 2, "not_finite_box": 1}),
        (lambda c: c["annotations"][0].update(bbox=[0.1, 0.2, 0.5, 0.5]), {"sound": 2, "box_in_unit": 1}),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), {"sound": 2, "box_length": 1}),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]), {"sound": 2, "field_type": 1}),
        (lambda c: c["annotations"][0].update(bbox=[]), {"sound": 2, "no_bbox": 1}),
        (lambda c: c["annotations"][0].pop("bbox"), {"sound": 2, "no_bbox": 1}),
        (lambda c: c["annotations"][0].update(iscrowd=1), {"sound": 2, "crowd": 1}),
        (lambda c: c["annotations"][0].update(image_id=9), {"sound": 2, "unknown_image": 1}),
        (lambda c: c["annotations"][0].update(image_id=[0]), {"sound": 2, "unknown_image": 1}),
        (lambda c: c["annotations"][0].update(category_id=9), {"sound": 2, "unknown_category": 1}),
        (lambda c: c["annotations"].__setitem__(0, "x"), {"sound": 2, "field_type": 1}),
        (lambda c: c["images"][0].update(width=640), {"sound": 1, "image_size": 1}),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), {"sound": 1, "missing_image": 1}),
        (lambda c: c["images"][0].update(file_name="../../x.jpg"), {"sound": 1, "image_path": 1}),
        (lambda c: c["images"][0].update(file_name=3), {"sound": 1, "field_type": 1, "unknown_image": 2}),
        (lambda c: c["categories"][1].update(name=" . "), {"sound": 2, "empty_phrase": 1}),
        (lambda c: c["categories"][1].update(name="<|im_end|>"), {"sound": 2, "reserved_token": 1}),
        # One of the two dogs is a crowd: to ask for the other alone would be wrong.
        (lambda c: c["annotations"][3].update(iscrowd=1), {"sound": 2, "crowd": 1}),
        # The same box twice is one box, whatever the ids say.
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), {"sound": 3}),
        # One image under two ids: each may have a part of its boxes.
        (lambda c: c["images"][1].update(file_name=f"./{c['images'][0]['file_name']}"), {"repeated_image": 2}),
        # Two categories of one name are one question.
        (lambda c: c["categories"][2].update(name="Cat "), {"sound": 2}),
        # A crowd of the one category is a crowd of that question.
        (
            lambda c: (c["categories"][2].update(name="Cat "), c["annotations"][1].update(iscrowd=1)),
            {"sound": 1, "crowd": 1},
        ),
    ],
)
def test_every_dirty_annotation_costs_its_own_question_alone(tmp_path: Path, change: Any, counts: dict) -> None:
    scan = changed(tmp_path / "pets", change)
    assert rules(scan) == counts
    assert all(
        one.sample_id.startswith("pets/train:") and one.detail
        for one in outcomes(scan, "train")
        if isinstance(one, SampleError)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(id=0), r"images\[1\]: field 'id' is 0, as of an earlier record"),
        (lambda c: c["categories"][1].update(id=0), r"categories\[1\]: field 'id' is 0, as of an earlier record"),
        (lambda c: c.pop("categories"), r"no image with a box; _annotations\.coco\.json \(no categories\)"),
        (lambda c: c.update(annotations=[]), r"\(no annotations\)"),
        (
            lambda c: [a.update(bbox=[v / 100 for v in a["bbox"]]) for a in c["annotations"]],
            r"100% of 4 boxes cannot be pixels_xywh(?s:.*)normalized_xywh fits 100%",
        ),
        (
            lambda c: [a.update(bbox=[30, 30, 60, 45]) for a in c["annotations"]],  # corners, in pixels
            r"cannot be pixels_xywh(?s:.*)  pixels or relative_1000_xywh fits 100%: state --own.box_format=pixels",
        ),
    ],
)
def test_a_file_that_means_something_else_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        changed(tmp_path / "pets", change)
    assert len(str(caught.value).splitlines()) <= 5


def test_corners_are_imported_where_the_user_says_that_they_are_corners(tmp_path: Path) -> None:
    path, content = content_of(roboflow(tmp_path / "pets"))
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        one["bbox"] = [x, y, x + width, y + height]
    path.write_text(json.dumps(content))
    scan = coco.scan(tmp_path / "pets", (), OwnData(box_format="pixels"))
    assert outcomes(scan, "train")[0].sample.answer == BoxAnswer(0, CAT_UNIT, "cat")


def test_files_that_are_no_detection_files_are_named_and_passed_over(tmp_path: Path) -> None:
    root = cvat(tmp_path / "pets")
    (root / "annotations" / "captions_default.json").write_text('{"images": [{"id": 1}], "annotations": [{"id": 1}]}')
    scan = coco.scan(root, (), OwnData())
    noted = scan.report["counts"]["files that are no detection files"]
    assert noted == {"captions_default.json (no categories)": 1}
    (root / "annotations" / "broken.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"broken\.json, byte 12"):
        coco.scan(root, (), OwnData())


def test_two_files_of_one_split_do_not_hide_each_other(tmp_path: Path) -> None:
    _, content = content_of(roboflow(tmp_path))
    (tmp_path / "train/_annotations_more.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"would both be the subset 'train': rename one of them"):
        coco.scan(tmp_path, (), OwnData())


def test_the_shared_cases(tmp_path: Path) -> None:
    if not (SHARED / "cases/inputs.py").is_file():
        pytest.skip("the shared cases are not here")
    spec = importlib.util.spec_from_file_location("inputs", SHARED / "cases/inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    inputs.coco_files(tmp_path / "coco")
    with pytest.raises(DataError, match=r"images\[1\]: field 'id' is 0"):
        coco.scan(tmp_path / "coco/repeated_image_id", (), OwnData())
    with pytest.raises(DataError, match=r"100% of 2 boxes cannot be pixels_xywh(?s:.*)normalized"):
        coco.scan(tmp_path / "coco/boxes_in_unit", (), OwnData())
    assert rules(coco.scan(tmp_path / "coco/boxes_in_unit", (), OwnData(box_format="normalized_xywh"))) == {"sound": 2}
    assert rules(coco.scan(tmp_path / "coco/long_name", (), OwnData())) == {"sound": 1}
