from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from datamodules.images.image_files import Frame
from datamodules.images.image_loading import load_image
from datamodules.importers.reading.image_bytes import load_images
from datamodules.samples.sample import BoxAnswer, BoxPart, ImagePart, Sample, SampleError, TextPart
from tests.datamodules.image_mutations import PNG_MAGIC, encoded, grey16, pixels, png_chunk
from tests.datamodules.importers.published import jpeg
from tests.datamodules.photographs import QUERY, SIZE, photograph, place_of, unit


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


def late_turn() -> bytes:
    """A PNG whose EXIF stands behind its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(pixels(0), "PNG")
    return whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]


def png_of(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are missing."""
    header = png_chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")
    return PNG_MAGIC + header + (10**6).to_bytes(4, "big") + b"IDAT" + bytes(100)


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
        (encoded(pixels(0), "EPS"), {}, "unreadable_image"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), {}, "unknown_value_range"),
        (encoded(grey16(), "PNG"), {"sizes": [[24, 16]]}, None),
        (late_turn(), {}, "turned_image"),
        (png_of(40_000, 40_000), {}, "decompression_bomb"),
    ],
)
def test_files_that_boxes_would_not_fit_break_a_rule(
    tmp_path: Path, data: bytes, extra: dict, rule: str | None
) -> None:
    assert rule_of(tmp_path, data, **extra) == rule


def boxed(*names: str, **extra: object) -> Sample:
    """A question that marks the blue thing of image 0; the answer is the red thing of the last image."""
    parts = [ImagePart(k) for k in range(len(names))]
    marked = BoxPart(0, tuple(unit(QUERY)), "<|box_start|>(500,600),(900,900)<|box_end|>")
    answer = BoxAnswer(len(names) - 1, tuple(unit()), "thing")
    return Sample("s", "test", "rec", names, (*parts, TextPart("Where is "), marked), answer, extra=extra)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_stored_pixels_become_boxes_of_what_is_shown(tmp_path: Path, orientation: int) -> None:
    data = photograph(1), photograph(orientation)
    for index, file in enumerate(data):
        (tmp_path / f"{index}.jpg").write_bytes(file)
    loaded = load_images(boxed("0.jpg", "1.jpg", sizes=[list(SIZE)] * 2), tmp_path, "stored")
    assert loaded.images == data
    assert loaded.sample.answer.box == pytest.approx(place_of(data[1]))
    assert loaded.sample.messages[-1].box == pytest.approx(place_of(data[0], "blue"))
    shown = load_image(data[1], 10**6).size
    assert loaded.sample.extra["sizes"] == [list(SIZE), list(shown)]
    assert loaded.sample.extra.get("turned") == (None if orientation == 1 else "1 of 2")
    assert Sample.from_json(loaded.sample.to_json()) == loaded.sample


@pytest.mark.parametrize(
    ("frame", "sizes", "rule"),
    [
        ("stored", [[80, 120]], "image_size"),  # measured in the image as it is shown, then
        ("shown", [[120, 80]], "image_size"),
        ("shown", [[80, 120]], None),
        (None, [[120, 80]], "turned_image"),
        (None, [[80, 120]], "turned_image"),
    ],
)
def test_the_annotations_size_must_be_that_of_its_frame(
    tmp_path: Path, frame: Frame | None, sizes: list, rule: str | None
) -> None:
    (tmp_path / "a.jpg").write_bytes(photograph(6))
    sample = boxed("a.jpg", sizes=sizes)
    if rule is None:
        assert load_images(sample, tmp_path, frame).sample == sample
    else:
        with pytest.raises(SampleError) as caught:
            load_images(sample, tmp_path, frame)
        assert caught.value.rule == rule


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"missing_image.*gone\.jpg"):
        load_images(sample("gone.jpg"), tmp_path)
