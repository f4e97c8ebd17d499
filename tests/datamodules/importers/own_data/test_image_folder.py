from __future__ import annotations

import os
from pathlib import Path

import pytest

from datamodules.images.image_files import Frame
from datamodules.importers.own_data import image_folder, jsonl
from datamodules.importers.own_data.image_folder import ImageFolder, find_image_root
from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.reading.source import DataError
from datamodules.samples.sample import LoadedSample, SampleError
from tests.datamodules.importers.own_data.own_files import write_jsonl
from tests.datamodules.importers.published import jpeg
from tests.datamodules.photographs import SIZE, STORED, photograph, place_of

INSIDE = jpeg(1, (64, 48))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with images/a.jpg, and a secret beside it."""
    (tmp_path / "root" / "images").mkdir(parents=True)
    (tmp_path / "root" / "images" / "a.jpg").write_bytes(INSIDE)
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "b.jpg").write_bytes(jpeg(3))
    return tmp_path / "root"


def rule_of(folder: ImageFolder, name: object) -> str:
    with pytest.raises(SampleError) as read:
        folder.read([name], "s")
    with pytest.raises(SampleError) as measured:
        folder.sizes([name], "s")
    assert read.value.rule == measured.value.rule
    return read.value.rule


@pytest.mark.parametrize(
    "name", ["images/a.jpg", "./images/a.jpg", "{root}/images/a.jpg", "file://{root}/images/a.jpg"]
)
def test_names_below_the_folder_are_read_whether_absolute_or_not(root: Path, name: str) -> None:
    found = ImageFolder(root).read([name.format(root=root)], "s")
    assert found.files == (INSIDE,) and found.names == ("images/a.jpg",) and found.sizes == ((64, 48),)
    assert ImageFolder(root).sizes([name.format(root=root)], "s") == [(64, 48)]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("../secret.jpg", "image_path"),
        ("images/../../secret.jpg", "image_path"),
        ("{root}/../secret.jpg", "image_path"),
        ("/etc/passwd", "image_path"),
        ("file:///etc/passwd", "image_path"),
        ("http://example.org/a.jpg", "remote_image"),
        ("s3://bucket/a.jpg", "remote_image"),
        ("data:image/png;base64,AAAA", "remote_image"),
        ("images/gone.jpg", "missing_image"),
        ("images", "missing_image"),
        ("images/a.jpg/b", "missing_image"),
        ("nul\0.jpg", "missing_image"),
        ("n" * 300, "missing_image"),
        ("", "field_type"),
        (7, "field_type"),
        (None, "field_type"),
        ({"path": "../secret.jpg", "bytes": None}, "image_path"),
        ({"path": None, "bytes": None}, "field_type"),
        ({"path": "a.jpg", "bytes": b"no image"}, "unreadable_image"),
        ("text.txt", "unreadable_image"),
    ],
)
def test_what_is_no_image_below_the_folder_is_named(root: Path, name: object, rule: str) -> None:
    (root / "text.txt").write_text("no image")
    assert rule_of(ImageFolder(root), name.format(root=root) if isinstance(name, str) else name) == rule


def test_links_may_not_lead_out_unless_the_user_says_so(root: Path) -> None:
    (root / "file.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "folder").symlink_to(root.parent / "real")
    (root / "within.jpg").symlink_to(root / "images" / "a.jpg")
    (root / "broken.jpg").symlink_to(root / "gone.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    folder = ImageFolder(root)
    assert rule_of(folder, "file.jpg") == rule_of(folder, "folder/b.jpg") == "image_path"
    assert rule_of(folder, "broken.jpg") == rule_of(folder, "circle.jpg") == "missing_image"
    assert folder.read(["within.jpg"], "s").files == (INSIDE,)
    assert ImageFolder(root, follow_links=True).read(["folder/b.jpg"], "s").files == (jpeg(3),)
    # A root that is itself a link is the user's own choice.
    (root.parent / "link").symlink_to(root)
    assert ImageFolder(root.parent / "link").read(["images/a.jpg"], "s").files == (INSIDE,)


def test_a_pipe_is_not_waited_for_and_a_huge_file_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "pipe.jpg")
    assert rule_of(ImageFolder(root), "pipe.jpg") == "missing_image"
    monkeypatch.setattr(image_folder, "MAX_BYTES", 100)
    assert rule_of(ImageFolder(root), "images/a.jpg") == "decompression_bomb"


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("frame", ["stored", "shown", None])
def test_boxes_of_photographs_that_exif_turns_follow_the_frame_or_are_rejected(
    tmp_path: Path, orientation: int, frame: Frame | None
) -> None:
    data = photograph(orientation)
    shown = place_of(data)
    box = list(STORED)
    if frame == "shown":
        width, height = SIZE if orientation == 3 else SIZE[::-1]
        box = [shown[0] * width, shown[1] * height, shown[2] * width, shown[3] * height]
    record = {"prompt": "Where?", "solution": box, "images": ["images/p.jpg"]}
    write_jsonl(tmp_path, [record])
    (tmp_path / "images" / "p.jpg").write_bytes(data)
    scan = jsonl.scan(tmp_path, (), OwnData(box_format="pixels", frame=frame))
    (found,) = scan.convert(scan.subsets["train"])
    if frame is None:
        assert isinstance(found, SampleError) and found.rule == "turned_image"
        return
    assert isinstance(found, LoadedSample)
    assert found.sample.answer.box == pytest.approx(shown, abs=0.02)
    assert found.sample.extra.get("turned") == ("1 of 1" if frame == "stored" else None)


def test_the_folder_of_an_annotation_files_images_is_found_or_asked_for(tmp_path: Path) -> None:
    root, file = tmp_path, tmp_path / "annotations" / "instances_train.json"
    file.parent.mkdir()
    file.write_text("{}")

    def place(*names: str) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")

    with pytest.raises(DataError, match=r"are in none of these folders: .*\n  name theirs by --own\.images"):
        find_image_root(root, file, ["a.jpg", "b.jpg"], "")
    assert find_image_root(root, file, ["a.jpg"], "/else") == Path("/else")
    place("train/a.jpg")
    assert find_image_root(root, file, ["a.jpg", "b.jpg"], "") == root / "train"
    place("images/a.jpg", "images/b.jpg")
    assert find_image_root(root, file, ["a.jpg", "b.jpg"], "") == root / "images"
    place("train/b.jpg")
    with pytest.raises(DataError, match="are in several folders"):
        find_image_root(root, file, ["a.jpg", "b.jpg"], "")
    assert find_image_root(root, file, [str(root / "images/a.jpg")], "") == root
