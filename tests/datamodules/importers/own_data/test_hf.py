"""Data sets of the library `datasets`: saved by it, read by it from files, with images inside or beside."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.importers.own_data import hf
from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.reading.source import DataError, Scan
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, LoadedSample, SampleError
from tests.datamodules.importers.own_data import own_files
from tests.datamodules.importers.own_data.own_files import SIZES, numbers, true_boxes
from tests.datamodules.importers.published import jpeg

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
PIXELS = OwnData(box_format="pixels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load_dataset` converts stays in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    hf._open.cache_clear()


def outcomes(scan: Scan, split: str) -> list[LoadedSample | SampleError]:
    return list(scan.convert(scan.subsets[split]))


def with_images(form: str) -> list[dict[str, Any]]:
    """Records of a form, their images decoded, as people hand them to the library."""
    rows = own_files.records(form)
    pictures = [Image.open(io.BytesIO(jpeg(k, SIZES[k]))) for k in range(2)]
    for row in rows:
        row.pop("image", None)
        row["images"] = pictures
        row["id"] = str(row["id"])
    return rows


@pytest.mark.parametrize("form", ["qwen", "sharegpt", "trl"])
def test_a_saved_data_set_comes_back_to_its_boxes(tmp_path: Path, form: str) -> None:
    rows = datasets.Dataset.from_list(with_images(form))
    rows.save_to_disk(tmp_path / "kites")
    scan = hf.scan(tmp_path / "kites", (), PIXELS)
    assert list(scan.subsets) == ["all"] and len(scan.subsets["all"]) == 10
    found = outcomes(scan, "all")
    turns = 2 if form == "sharegpt" else 1
    for loaded, (image, box) in zip(found, [b for b in true_boxes() for _ in range(turns)], strict=True):
        assert loaded.sample.answer.image == image
        assert loaded.sample.answer.box == pytest.approx(box, abs=1e-9)
        assert [Image.open(io.BytesIO(data)).size for data in loaded.images] == list(SIZES[:2])
    first = found[0].sample
    assert first.source == "hf" and first.id.startswith("kites/all:0") and first.extra["record"] in ("q0", "0", "t0")


def test_splits_are_subsets_and_ms_swifts_form_says_its_own_format(tmp_path: Path) -> None:
    rows = [
        {**own_files.swift(k, image, numbers(box, SIZES[image], "pixels")), "id": f"s{k}"}
        for k, (image, box) in enumerate(true_boxes())
    ]
    own_files.write_images(tmp_path / "pictures")
    made = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "kites")
    own = OwnData(images=str(tmp_path / "pictures"))  # the rows name files
    scan = hf.scan(tmp_path / "kites", (), own)
    assert {name: len(entries) for name, entries in scan.subsets.items()} == {"train": 10, "test": 3}
    for loaded, (image, box) in zip(outcomes(scan, "train"), true_boxes(), strict=True):
        assert loaded.sample.answer == BoxAnswer(image, box, "its tail")
    assert all(path.is_relative_to(tmp_path / "kites") for path in hf.annotation_files(tmp_path / "kites", own))


def test_images_that_the_messages_name_themselves_are_found(tmp_path: Path) -> None:
    def part(kind: str, value: str) -> dict[str, Any]:
        return {"type": kind, "image": None, "text": None, kind: value}

    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [*(part("image", f"images/{k}.jpg") for k in (1, 0)), part("text", "Where?")],
                },
                {"role": "assistant", "content": [part("text", "In the second image: [0, 12, 32, 48]")]},
            ]
        }
    ]
    own_files.write_images(tmp_path / "pictures")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "kites")
    scan = hf.scan(tmp_path / "kites", (), OwnData(box_format="pixels", images=str(tmp_path / "pictures")))
    (loaded,) = outcomes(scan, "all")
    assert loaded.sample.images == ("images/1.jpg", "images/0.jpg")
    assert loaded.sample.answer == BoxAnswer(1, (0.0, 0.25, 0.5, 1.0), "")


def detection_rows(names: bool) -> Any:
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {
                "id": datasets.List(datasets.Value("int64")),
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(
                    datasets.ClassLabel(names=["mask", "glove"]) if names else datasets.Value("int64")
                ),
            },
        }
    )
    picture = {"bytes": jpeg(0, (64, 48)), "path": "p.jpg"}
    objects = {"id": [1, 2, 3], "bbox": [[8, 12, 16, 24], [0, 0, 32, 24], [32, 24, 8, 8]], "category": [0, 1, 1]}
    row = {"image_id": 7, "image": picture, "width": 64, "height": 48, "objects": objects}
    return datasets.Dataset.from_list([row] * 3, features=features)


def test_a_detection_set_asks_for_each_category_by_the_names_of_its_features(tmp_path: Path) -> None:
    detection_rows(names=True).save_to_disk(tmp_path / "ppe")
    with pytest.raises(DataError, match=r"nothing says what the numbers of a box mean(?s:.*)pixels_xywh 100%"):
        hf.scan(tmp_path / "ppe", (), OwnData())
    scan = hf.scan(tmp_path / "ppe", (), OwnData(box_format="pixels_xywh"))
    single, several = outcomes(scan, "all")[:2]
    assert single.sample.answer == BoxAnswer(0, (0.125, 0.25, 0.375, 0.75), "mask")
    assert isinstance(several.sample.answer, BoxesAnswer) and several.sample.answer.boxes[0].label == "glove"
    assert single.sample.images == ("0.jpg",) and single.images == (jpeg(0, (64, 48)),)


def test_numbers_of_categories_without_names_are_asked_for(tmp_path: Path) -> None:
    detection_rows(names=False).save_to_disk(tmp_path / "ppe")
    own = OwnData(box_format="pixels_xywh")
    assert {one.rule for one in outcomes(hf.scan(tmp_path / "ppe", (), own), "all")} == {"category_name"}
    named = OwnData(box_format="pixels_xywh", categories=["mask", "glove"])
    assert outcomes(hf.scan(tmp_path / "ppe", (), named), "all")[0].sample.answer.label == "mask"


def test_a_folder_of_images_with_metadata_is_read(tmp_path: Path) -> None:
    root = tmp_path / "birds"
    own_files.write_images(root)
    (root / "train").mkdir()
    lines = []
    for number in range(2):
        (root / "images" / f"{number}.jpg").rename(root / "train" / f"{number}.jpg")
        lines.append({"file_name": f"{number}.jpg", "objects": {"bbox": [[0, 0, 20, 24]], "category": ["bird"]}})
    (root / "images" / "2.jpg").unlink()
    (root / "images").rmdir()
    (root / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scan = hf.scan(root, (), PIXELS)
    first, second = outcomes(scan, "train")
    assert first.sample.answer == BoxAnswer(0, (0.0, 0.0, 20 / 64, 0.5), "bird")
    assert second.sample.answer.box == (0.0, 0.0, 0.5, 24 / 80)


def test_parquet_files_are_read(tmp_path: Path) -> None:
    root = tmp_path / "kites"
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_list(with_images("trl")).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    scan = hf.scan(root, (), PIXELS)
    answers = [one.sample.answer for one in outcomes(scan, "train")]
    assert [answer.image for answer in answers] == [image for image, _ in true_boxes()]


def test_the_scan_reads_no_embedded_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_images("trl")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "kites")
    seen: list[Any] = []
    look = hf.RecordScan.look
    monkeypatch.setattr(
        hf.RecordScan, "look", lambda self, record, *more: seen.append(record) or look(self, record, *more)
    )
    hf.scan(tmp_path / "kites", (), PIXELS)
    assert [record["images"] for record in seen] == [["image", "image"]] * 10


def test_a_row_may_name_no_file_outside(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "solution": datasets.List(datasets.Value("int64")),
            "image": datasets.Image(),
        }
    )
    (tmp_path / "secret.jpg").write_bytes(jpeg(0, (64, 48)))
    row = {"prompt": "Where?", "solution": [0, 0, 8, 8], "image": {"path": str(tmp_path / "secret.jpg"), "bytes": None}}
    rows = datasets.Dataset.from_list([row], features=features)
    rows.save_to_disk(tmp_path / "kites")
    # `save_to_disk` takes the file in; a row that only names it is what somebody else may have made.
    named = datasets.load_from_disk(str(tmp_path / "kites")).with_format("arrow")[0].to_pylist()[0]
    if named["image"]["bytes"] is None:
        (error,) = outcomes(hf.scan(tmp_path / "kites", (), PIXELS), "all")
        assert error.rule == "image_path"
    reader = hf.RecordReader("hf", "kites", PIXELS, hf.ImageFolder(tmp_path / "kites"))
    (error,) = reader.samples(row, "all:0")
    assert isinstance(error, SampleError) and error.rule == "image_path"


def test_what_the_library_cannot_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the library datasets cannot read it"):
        hf.annotation_files(tmp_path / "empty", OwnData())
    with pytest.raises(DataError, match="the library datasets cannot read it"):
        hf.scan(Path("nobody/no-such-data-set"), (), OwnData())
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert hf.root_problems("x", OwnData()) == [
        "source='hf' needs the package datasets: pip install 'multi-image-grounding[hf]'"
    ]
    assert "root=''" in hf.root_problems("", OwnData())[0]
