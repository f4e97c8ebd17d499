from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from datamodules.importers.images import load_images
from datamodules.samples import BoxAnswer, ImagePart, Sample, SampleError, TextPart
from tests.datamodules.importers.published import jpeg


def sample(*names: str, **extra: object) -> Sample:
    parts = (*(ImagePart(k) for k in range(len(names))), TextPart("Where?"))
    return Sample("s", "test", "rec", names, parts, BoxAnswer(0, (0.1, 0.1, 0.2, 0.2), ""), extra=extra)


def rule_of(tmp_path: Path, data: bytes, **extra: object) -> str | None:
    (tmp_path / "a").write_bytes(data)
    try:
        load_images(sample("a", **extra), tmp_path)
    except SampleError as error:
        return error.rule
    return None


def turned_png() -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.new("RGB", (4, 4)).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_bytes_are_kept_as_they_are(tmp_path: Path) -> None:
    files = jpeg(0), jpeg(1)[:-200], jpeg(2, orientation=1)  # the second is cut short: only its header is looked at
    for index, data in enumerate(files):
        (tmp_path / f"{index}.jpg").write_bytes(data)
    loaded = load_images(sample("0.jpg", "1.jpg", "2.jpg", sizes=[[64, 48]] * 3), tmp_path)
    assert loaded.images == files


@pytest.mark.parametrize(
    ("data", "extra", "rule"),
    [
        (b"", {}, "unreadable_image"),
        (b"<html>404</html>", {}, "unreadable_image"),
        (jpeg(orientation=6), {}, "turned_image"),
        (turned_png(), {}, "turned_image"),
        (jpeg(), {"sizes": [[48, 64]]}, "image_size"),
        (jpeg(), {"sizes": [[64, 48]]}, None),
    ],
)
def test_files_that_boxes_would_not_fit_break_a_rule(
    tmp_path: Path, data: bytes, extra: dict, rule: str | None
) -> None:
    assert rule_of(tmp_path, data, **extra) == rule


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"missing_image.*gone\.jpg"):
        load_images(sample("gone.jpg"), tmp_path)
