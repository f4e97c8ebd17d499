"""`make ask`: a question over a user's own images, its boxes in pixels of the originals, its picture, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from datamodules.benchmarks import mig_bench
from datamodules.metrics.drawing import TALLEST, WIDTH, draw_preview
from datamodules.metrics.predictions import Reply
from datamodules.metrics.scoring import score_reply
from datamodules.samples.answer_text import render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, ImagePart, Sample, TextPart
from experiments.asking import ask_model
from experiments.asking.one_question import (
    COLOUR,
    HEIGHT,
    WIDEST,
    Answer,
    FoundBox,
    build_question,
    draw_answer,
    read_answer,
)
from tests.experiments.conftest import ROOT

NANO = ROOT / "models" / "nano-base"
SIZES = (ImageSizes((200, 100), (100, 50)), ImageSizes((400, 400), (100, 100)))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two files: 200 x 100 and 400 x 400 pixels."""
    paths = []
    for number, sizes in enumerate(SIZES):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", sizes.original, "white").save(paths[-1])
    return paths


def reply(text: str, **fields) -> Reply:
    return Reply(text, SIZES, **fields)


def written(thinking: str, box: str = "[10, 20, 50, 50]") -> str:
    return f'<think>{thinking}</think><answer>{{"bbox_2d": {box}, "label": "cup"}}</answer>'


def test_images_stand_where_the_question_says(images: list[str]) -> None:
    plain = build_question(images, "Find it.", 10**6).sample.messages
    assert plain == (ImagePart(0), ImagePart(1), TextPart("Find it."))
    marked = build_question(images, "In <image> is a cup. Find it in <image>.", 10**6).sample.messages
    assert marked == (TextPart("In "), ImagePart(0), TextPart(" is a cup. Find it in "), ImagePart(1), TextPart("."))


@pytest.mark.parametrize(
    ("thinking", "question", "target", "image", "source"),
    [
        ("It is in image 1.", "Find it in image 2.", None, 1, "thinking"),
        ("Image 1 has none. It is in the second image.", "Find it.", None, 2, "thinking"),
        ("There it is.", "Find the cup of image 2 in the first image.", None, 1, "question"),
        ("It is in image 7.", "Find it in image 1.", None, 1, "question"),
        ("There it is.", "Find it.", None, 2, "last"),
        ("It is in image 1.", "Find it.", 2, 2, "target"),
    ],
)
def test_the_image_of_a_box_and_its_pixels(thinking, question, target, image, source) -> None:
    answer = read_answer(reply(written(thinking)), question, BoxFormat.ABSOLUTE_PIXELS, target)
    (found,) = answer.boxes
    scale = {1: 2, 2: 4}[image]
    assert (found.image, answer.image_from, found.label) == (image, source, "cup")
    assert found.box == tuple(edge * scale for edge in (10, 20, 50, 50))


def test_boxes_that_name_their_images_are_in_these() -> None:
    boxes = [ParsedBox((10, 20, 50, 50), "cup", image) for image in (2, 1)]
    answer = read_answer(reply(render_boxes(boxes, "Image 1.")), "Find all in image 1.", BoxFormat.ABSOLUTE_PIXELS, 1)
    assert [found.image for found in answer.boxes] == [2, 1] and answer.image_from == "answer"
    assert [found.box for found in answer.boxes] == [(40, 80, 200, 200), (20, 40, 100, 100)]
    mixed = [ParsedBox((10, 20, 50, 50), "cup", image) for image in (1, 7)]
    answer = read_answer(reply(render_boxes(mixed, "")), "Find it.", BoxFormat.ABSOLUTE_PIXELS)
    assert [found.box for found in answer.boxes] == [(20, 40, 100, 100), (40, 80, 200, 200)], (
        "the last image for the 7th"
    )
    assert "(not every box names its image: nothing names one)" in ask_model.format_answer(answer, "a.png")
    absent = [ParsedBox((10, 20, 50, 50), "cup", 7)]
    answer = read_answer(reply(render_boxes(absent, "Image 1.")), "Find it.", BoxFormat.ABSOLUTE_PIXELS)
    assert [found.image for found in answer.boxes] == [1] and answer.image_from == "thinking"


def test_an_answer_without_a_box_says_why() -> None:
    answer = read_answer(reply("I see nothing.", finished=False), "Find it.", BoxFormat.ABSOLUTE_PIXELS)
    assert answer.boxes == () and answer.failure == "no_json" and not answer.finished
    text = ask_model.format_answer(answer, "a.png")
    assert "No box: no_json" in text and "max_new_tokens" in text and "I see nothing." in text
    refused = read_answer(Reply("", (), refused="prompt_too_long"), "Find it.", BoxFormat.ABSOLUTE_PIXELS)
    assert "prompt_too_long" in refused.failure


@pytest.mark.parametrize("box", ["[10, 20, 50, 50]", "[50, 50, 10, 20]", "[-900, 20, 1e9, 50]"])
def test_the_box_is_drawn_in_its_image_alone(images: list[str], box: str) -> None:
    loaded = build_question(images, "Find it.", 10**6)
    answer = read_answer(reply(written("Image 2.", box)), "Find it.", BoxFormat.ABSOLUTE_PIXELS)
    drawing = draw_answer(loaded.images, answer, 10**6)
    assert drawing.size == (2 * HEIGHT + 8 + HEIGHT, HEIGHT)
    colour = tuple(int(COLOUR[i : i + 2], 16) for i in (1, 3, 5))
    first, second = drawing.crop((0, 0, 2 * HEIGHT, HEIGHT)), drawing.crop((2 * HEIGHT + 8, 0, *drawing.size))
    assert colour not in {pixel for _, pixel in first.getcolors(10**6)}
    assert colour in {pixel for _, pixel in second.getcolors(10**6)}


def test_a_strip_of_a_few_rows_or_columns_is_squeezed_in_drawings() -> None:
    strip = Image.new("RGB", (40_000, 2), "blue")
    (data,) = build_question([strip], "Where?", 10**6).images
    box = FoundBox(1, (20_000.0, 0.0, 40_000.0, 2.0), "")
    drawing = draw_answer([data], Answer("", None, None, (box,), "only", None, True), 10**6)
    assert drawing.size == (WIDEST, HEIGHT)
    row = [drawing.getpixel((x, HEIGHT // 2)) != (0, 0, 255) for x in range(WIDEST)]
    assert row.index(True) == WIDEST // 2 and row[-1], "the box is the right half"
    truth = BoxAnswer(0, (0.0, 0.5, 1.0, 1.0), "")
    sample = Sample("a", "b", "c", ("a.png",), (ImagePart(0), TextPart("Where?")), truth)
    reply = Reply("", (ImageSizes((2, 40_000), (28, 28)),))
    prediction = score_reply(sample, reply, BoxFormat.ABSOLUTE_PIXELS, mig_bench.RULE, mig_bench.OFFICIAL)
    preview = draw_preview([strip.transpose(Image.Transpose.ROTATE_90)], sample, prediction)
    assert preview.width == WIDTH and TALLEST < preview.height < TALLEST + 100


def test_the_command_answers_in_json_with_the_committed_base(images: list[str], tmp_path: Path, capsys) -> None:
    output = tmp_path / "made" / "answer.png"
    args = [f"--model={NANO}", f"--images=[{','.join(images)}]", "--question=Find the red square in image-2."]
    ask_model.main([*args, f"--output={output}", "--json=true", "--decoding.max_new_tokens=48", "--device=cpu"])
    answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (
        set(answer) == {"text", "thinking", "answer", "boxes", "image_from", "failure", "finished"} and answer["text"]
    )
    with Image.open(output) as drawing:
        assert drawing.size == (2 * HEIGHT + 8 + HEIGHT, HEIGHT)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"images": "[nowhere.png]", "question": " "}, ["nowhere.png: No such file", "question: it is empty"]),
        ({"images": "[setup.cfg]"}, ["setup.cfg: unreadable_image"]),
        ({"target": "3"}, ["target=3 is none of 2 images"]),
        ({"question": "<image> or <image> or <image>"}, ["3 <image> marks for 2 images"]),
        ({"model": "nowhere/at-all"}, ["nowhere/at-all"]),
        ({"form.model_family": "klingon", "endpoint.base_url": "http://a/v1"}, ["klingon"]),
        ({"output": "/dev/null/answer.png"}, ["output='/dev/null/answer.png' cannot be written"]),
    ],
)
def test_mistakes_are_told_in_short(images, change, messages, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = {"model": str(NANO), "images": f"[{','.join(images)}]", "question": "Find it.", "device": "cpu"}
    settings |= {"decoding.max_new_tokens": "4", "output": str(tmp_path / "answer.png")} | change
    with pytest.raises(SystemExit) as caught:
        ask_model.main([f"--{name}={value}" for name, value in settings.items()])
    text = str(caught.value)
    assert all(message in text for message in messages) and len(text.splitlines()) <= 5, text
