"""Boxes of photographs that EXIF turns, against things that are drawn and then found in the pixels that are shown."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.images.image_files import Header, file_size, read_header, read_image_file, refuse_turned
from datamodules.images.image_loading import load_image
from datamodules.images.turned import boxed_images, turn_sample
from datamodules.samples.boxes import turn_box, turn_size
from datamodules.samples.sample import (
    BoxAnswer,
    BoxesAnswer,
    BoxPart,
    ChoiceAnswer,
    ImagePart,
    Sample,
    SampleError,
    TextPart,
)
from tests.datamodules.photographs import QUERY, SIZE, drawn_box, photograph, place_of, unit

WRITTEN = "(<|box_start|>(500,600),(900,900)<|box_end|>)"
PARTS = (ImagePart(0), ImagePart(1), TextPart("This "), BoxPart(0, (0.5, 0.6, 0.9, 0.9), WRITTEN), TextPart(" where?"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_box_is_where_the_drawn_thing_is_shown(orientation: int) -> None:
    data = photograph(orientation)
    assert turn_box(tuple(unit()), orientation) == pytest.approx(place_of(data), abs=1e-9)
    shown = Image.open(io.BytesIO(data))
    assert turn_size(SIZE, orientation) == (SIZE if orientation < 5 else (SIZE[1], SIZE[0]))
    assert read_header(io.BytesIO(data)) == Header(shown.size, orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_inverted_box_stays_inverted(orientation: int) -> None:
    x1, y1, x2, y2 = turn_box((0.6, 0.2, 0.3, 0.9), orientation)
    assert (x2 < x1) != (y2 < y1)


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_a_value_that_is_no_orientation_turns_nothing(orientation: int) -> None:
    data = photograph(orientation)
    assert read_header(io.BytesIO(data)).orientation == 1
    assert place_of(data) == pytest.approx(unit(), abs=1e-9)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "MPO"])
def test_other_formats_say_how_they_are_turned(form: str) -> None:
    assert read_header(io.BytesIO(photograph(6, form))) == Header(SIZE, 6)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "MPO", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reading_that_knows_no_exif_and_the_header_make_the_image_as_shown(form: str, orientation: int) -> None:
    data = photograph(orientation, form)
    as_read = drawn_box(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    header = read_header(io.BytesIO(data))
    assert turn_box(as_read, header.orientation) == pytest.approx(place_of(data), abs=1e-9)
    assert header.size_in("shown") == load_image(data, 10**7).size


def test_a_png_that_says_nothing_is_not_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    cut = file.getvalue()[:60]  # its pixels are not there
    assert read_header(io.BytesIO(cut)) == Header((40, 30))


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"II*\0" + b"\xff" * 60])
def test_what_is_no_image_is_one_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="unreadable_image"):
        read_header(io.BytesIO(data))


def test_boxes_of_question_and_answer_turn_with_their_own_image() -> None:
    answer = BoxesAnswer((BoxAnswer(0, tuple(unit(QUERY)), "a"), BoxAnswer(1, tuple(unit()), "b")))
    sample = Sample("s", "test", "rec", ("a.jpg", "b.jpg"), PARTS, answer)
    assert boxed_images(sample) == {0, 1}
    turned = turn_sample(sample, {0: 3, 1: 6})
    part = turned.messages[3]
    assert isinstance(part, BoxPart) and part.box == pytest.approx((0.1, 0.1, 0.5, 0.4))
    assert part.text == "(<|box_start|>(100,100),(500,400)<|box_end|>)"
    assert turned.answer.boxes[0].box == pytest.approx(place_of(photograph(3), "blue"))
    assert turned.answer.boxes[1].box == pytest.approx(place_of(photograph(6)))
    assert turn_sample(sample, {0: 1, 1: 1}) is sample
    assert turn_sample(turned, {0: 3, 1: 8}).messages == sample.messages  # 6 and 8 undo each other


def test_a_choice_has_no_box_to_turn() -> None:
    sample = Sample("s", "test", "x", ("a",), (ImagePart(0), TextPart("?")), ChoiceAnswer("A", ("a", "b")))
    assert boxed_images(sample) == set() and turn_sample(sample, {0: 6}) == sample


def test_a_turned_image_is_refused_by_name_and_damage_left_to_the_decoder() -> None:
    refuse_turned("s", "a.jpg", photograph(1))
    refuse_turned("s", "a.jpg", b"no image")
    with pytest.raises(SampleError, match=r"turned_image: a\.jpg has EXIF orientation 6"):
        refuse_turned("s", "a.jpg", photograph(6))


@pytest.mark.parametrize("name", ["gone.jpg", "x" * 300 + ".jpg", "a\0b.jpg", "file/a.jpg", "folder", "\ud800.jpg"])
def test_a_name_that_no_file_has_is_a_missing_image(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SampleError) as caught:
        read_image_file(tmp_path / name, "s")
    assert caught.value.rule == "missing_image" and len(str(caught.value)) < 400 + len(str(tmp_path))
    assert file_size(tmp_path / name) is None


def test_a_file_that_cannot_be_read_is_no_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError):
        read_image_file(tmp_path / "a.jpg", "s")
