"""One question about a user's own images: make its sample, and convert the answer's boxes to pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.images.image_loading import ImageError, load_image
from datamodules.importers.reading.image_references import named_images
from datamodules.metrics.drawing import LINE, outline_box
from datamodules.metrics.drawing import PREDICTED_COLOUR as COLOUR
from datamodules.metrics.predictions import Reply
from datamodules.persistence.user_error import UserError
from datamodules.samples.answer_text import ParsedAnswer, answer_text, parse_answer
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart

ImageSource = str | Path | Image.Image
MARK = "<image>"  # marks the position of an image in a question
HEIGHT = 420  # height of every image in the drawing, in pixels
WIDEST = 20 * HEIGHT  # a strip of a few rows would be wider, up to all memory: it is squeezed
GAP = 8  # between two images
FONT_SIZE, NUMBER_SIZE = 15, 28
NUMBER_PLACE = (6, HEIGHT - 2)  # left, and bottom, of an image's number


class QuestionError(UserError, ValueError):
    """The question cannot be asked. The message names each problem."""


@dataclass(frozen=True)
class FoundBox:
    """One box of an answer.

    Args:
        image: number of the image, from 1
        box: x1, y1, x2, y2 in pixels of the original image
        label: the name that the model gave
    """

    image: int
    box: tuple[float, float, float, float]
    label: str


@dataclass(frozen=True)
class Answer:
    """The text of the model, and its parts.

    Args:
        text: the whole text of the model
        thinking: the part between the think tags; None without them
        answer: the part with the answer
        boxes: the boxes in the order of the text; () if there are none
        image_from: the source that names the image of the boxes: "answer" (each box names its own), "target",
            "thinking", "question", "only" or "last". Boxes that name an image of the question are in that one
        failure: the reason if no box was found, or if the question was not asked
        finished: False if the answer was cut at the token limit
    """

    text: str
    thinking: str | None
    answer: str | None
    boxes: tuple[FoundBox, ...]
    image_from: str | None
    failure: str | None
    finished: bool


def build_question(
    images: Sequence[ImageSource], question: str, max_image_pixels: int, target: int | None = None
) -> LoadedSample:
    """Make the sample of a question about a user's images.

    Args:
        images: paths of files, or Pillow images, in the order in which the model sees them.
        question: the text. The images are at its <image> marks; without marks, they come before the text.
        max_image_pixels: a larger image is refused.
        target: number of the image for the answer's box, from 1; None if the answer decides.

    Raises:
        QuestionError: a file cannot be read as an image, the question is empty, or `target` or the number of <image>
            marks is wrong. The message names all problems.
    """
    problems, data = [], []
    if target is not None and not 1 <= target <= len(images):
        problems.append(f"target={target} is none of {len(images)} images; they count from 1")
    for number, image in enumerate(images, 1):
        try:
            data.append(_stored(image))
            load_image(data[-1], max_image_pixels)
        except (OSError, ImageError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            problems.append(f"images: {number if isinstance(image, Image.Image) else image}: {reason}")
    marks = question.count(MARK)
    if not images:
        problems.append("images: none is given")
    if not question.replace(MARK, "").strip():
        problems.append("question: it is empty")
    if marks not in (0, len(images)):
        problems.append(f"question: {marks} {MARK} marks for {len(images)} images; write one for each image, or none")
    if problems:
        raise QuestionError("\n".join(problems))
    # The true answer is unknown. This placeholder is never shown to the model.
    truth = BoxAnswer(0, (0.0, 0.0, 1.0, 1.0), "")
    names = tuple(
        str(number) if isinstance(image, Image.Image) else str(image) for number, image in enumerate(images, 1)
    )
    sample = Sample("question", "user", "question", names, _parts(question, len(images)), truth)
    return LoadedSample(sample, tuple(data))


def _stored(image: ImageSource) -> bytes:
    """The bytes of an image file. A Pillow image becomes a PNG of its pixels as they are, which is lossless."""
    if not isinstance(image, Image.Image):
        return Path(image).read_bytes()
    file = io.BytesIO()
    # A PNG cannot hold the other modes, such as CMYK.
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()


def _parts(question: str, num_images: int) -> tuple[ImagePart | TextPart, ...]:
    """Put the images at the marks of the text; without marks, the images come first."""
    if MARK not in question:
        question = MARK * num_images + question
    before, *texts = question.split(MARK)
    parts: list[ImagePart | TextPart] = [TextPart(before)] if before else []
    for image, text in enumerate(texts):
        parts += [ImagePart(image), *([TextPart(text)] if text else [])]
    return tuple(parts)


def read_answer(reply: Reply, question: str, box_format: BoxFormat, target: int | None = None) -> Answer:
    """The answer with its boxes in pixels.

    A box that names an image of the question is in it. The paper's answer with one box does not name its image. Such a
    box is in the first of these that exists: `target` (from 1), the image that the thinking names last, the image that
    the question names last, the only or last image.
    """
    if reply.refused is not None:
        return Answer("", None, None, (), None, f"the question was not put to the model: {reply.refused}", True)
    parsed = parse_answer(reply.text, lenient=True)
    if not isinstance(parsed, ParsedAnswer):
        return Answer(reply.text, None, answer_text(reply.text), (), None, parsed.kind, reply.finished)
    count = len(reply.image_sizes)
    numbers, source = [box.image for box in parsed.boxes], "answer"
    is_named = [number is not None and 1 <= number <= count for number in numbers]
    if not all(is_named):
        index, source = _find_image(parsed.thinking, question, count, target)
        numbers = [number if named else index + 1 for number, named in zip(numbers, is_named, strict=True)]
    boxes = tuple(
        FoundBox(number, sizes.to_pixels(sizes.to_unit(box.values, box_format)), box.label or "")
        for number, box in zip(numbers, parsed.boxes, strict=True)
        for sizes in (reply.image_sizes[number - 1],)
    )
    return Answer(reply.text, parsed.thinking, answer_text(reply.text), boxes, source, None, reply.finished)


def split_text(text: str) -> tuple[str, str]:
    """(thinking, answer) of a text that may still be growing; the tags are left out."""
    before, opened, rest = text.partition("<think>")
    if not opened:
        return "", text.replace("<answer>", "").replace("</answer>", "").strip()
    thinking, _, answer = rest.partition("</think>")
    return thinking.strip(), (before + answer).replace("<answer>", "").replace("</answer>", "").strip()


def _find_image(thinking: str | None, question: str, num_images: int, target: int | None) -> tuple[int, str]:
    """0-based index of the image of the boxes, and the source that names it."""
    if target is not None:
        return target - 1, "target"
    if num_images == 1:
        return 0, "only"
    for source, text in (("thinking", thinking), ("question", question)):
        try:
            named = named_images(text or "", num_images, source)
        except SampleError:  # it names an image that does not exist
            continue
        if named:
            return named[-1][1], source
    return num_images - 1, "last"


def describe_boxes(answer: Answer) -> list[str]:
    """Lines about the boxes: their pixels, why they are in their image, or why there are none."""
    lines = []
    for found in answer.boxes:
        numbers = ", ".join(f"{edge:.1f}" for edge in found.box)
        lines.append(f"Box in image {found.image}, pixels: [{numbers}]" + (f" {found.label}" if found.label else ""))
    if answer.image_from in ("thinking", "question", "last"):
        why = {"thinking": "the thinking names it", "question": "the question names it", "last": "nothing names one"}
        images = sorted({found.image for found in answer.boxes})
        what = "not every box names its image" if images[1:] else f"the answer names no image; image {images[0]}"
        lines.append(f"({what}: {why[answer.image_from]})")
    if answer.failure:
        lines.append(f"No box: {answer.failure}")
    if not answer.finished:
        lines.append("The answer was cut at decoding.max_new_tokens")
    return lines


def draw_images(images: Sequence[bytes], max_image_pixels: int) -> Image.Image:
    """All images side by side with their numbers, each scaled to one height."""
    return _draw(images, (), max_image_pixels)


def draw_answer(images: Sequence[bytes], answer: Answer, max_image_pixels: int) -> Image.Image:
    """The same with the boxes of the answer and their labels."""
    return _draw(images, answer.boxes, max_image_pixels)


def _draw(images: Sequence[bytes], boxes: Sequence[FoundBox], max_image_pixels: int) -> Image.Image:
    pictures = [load_image(data, max_image_pixels).convert("RGB") for data in images]
    scales = [(min(HEIGHT / p.height, WIDEST / p.width), HEIGHT / p.height) for p in pictures]
    small = [p.resize((max(1, round(p.width * s)), HEIGHT)) for p, (s, _) in zip(pictures, scales, strict=True)]
    canvas = Image.new("RGB", (sum(p.width for p in small) + GAP * (len(small) - 1), HEIGHT), "grey")
    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(NUMBER_SIZE)
    left = 0
    for number, (picture, scale) in enumerate(zip(small, scales, strict=True), 1):
        draw = ImageDraw.Draw(picture)
        draw.rectangle(draw.textbbox(NUMBER_PLACE, str(number), large, anchor="ld"), fill="white")
        draw.text(NUMBER_PLACE, str(number), "black", large, anchor="ld")
        for found in boxes:
            if found.image == number:
                pixels = [edge * scale[axis % 2] for axis, edge in enumerate(found.box)]
                _draw_box(draw, pixels, found.label, picture.size, font)
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return canvas


def _draw_box(draw: ImageDraw.ImageDraw, box: Sequence[float], label: str, size: tuple[int, int], font: Any) -> None:
    """Draw the outline of a box, with its label above it."""
    left, top = outline_box(draw, box, COLOUR, size)
    if label:
        place = (left + LINE, max(0.0, top - FONT_SIZE - LINE))
        draw.rectangle(draw.textbbox(place, label, font), fill="white")
        draw.text(place, label, COLOUR, font)
