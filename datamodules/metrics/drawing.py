"""Draw an answer: the predicted and the true boxes on their images, with the question and the answer below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.images.image_loading import ImageError, load_image
from datamodules.metrics.predictions import Prediction
from datamodules.samples.boxes import Box, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, BoxPart, LoadedSample, Sample, SampleError, TextPart
from datamodules.samples.scores import true_boxes

WIDTH = 640  # width of every preview in pixels
FONT_SIZE = 14
LINE = 3  # width of the outline of a box
LINE_HEIGHT = 18
TRUE_COLOUR, PREDICTED_COLOUR = "#00a000", "#e02020"
Drawn = tuple[Sample, Prediction, Image.Image]


def draw_preview(images: Mapping[int, Image.Image], sample: Sample, prediction: Prediction) -> Image.Image:
    """The images with the true (green) and the predicted (red) boxes, above the question and the answer.

    Args:
        images: by their index in the sample: the target image, or, of an answer of several boxes, all images.
        sample: the question and its true boxes.
        prediction: the answer.
    """
    boxes = [(box.image, box.box, TRUE_COLOUR) for box in true_boxes(sample.answer)]
    boxes += [(image, box, PREDICTED_COLOUR) for image, box in _read_boxes(sample, prediction)]
    # One image below the other, each as wide as the preview.
    pictures = [
        _with_boxes(image, [(box, colour) for place, box, colour in boxes if place == index])
        for index, image in images.items()
    ]
    picture = Image.new("RGB", (WIDTH, sum(one.height for one in pictures)))
    for number, one in enumerate(pictures):
        picture.paste(one, (0, sum(above.height for above in pictures[:number])))
    question = "".join(part.text for part in sample.messages if isinstance(part, TextPart | BoxPart))
    result = f"no box: {prediction.failure}" if prediction.read is None else f"IoU {prediction.value:.2f}"
    if prediction.f1 is not None:
        result = f"F1 {prediction.f1:.2f}" + (f", {result}" if prediction.failure else "")
    shown = ", ".join(str(index + 1) for index in images)
    heading = f"{sample.task} {sample.id}, image {shown} of {len(sample.images)}, {result}"
    lines = [line for text in (heading, question, prediction.text) for line in textwrap.wrap(text, WIDTH // 8) or [""]]
    canvas = Image.new("RGB", (WIDTH, picture.height + LINE_HEIGHT * len(lines) + 8), "white")
    canvas.paste(picture)
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((4, picture.height + 4 + number * LINE_HEIGHT), line, "black", font)
    return canvas


def _read_boxes(sample: Sample, prediction: Prediction) -> list[tuple[int, Box]]:
    """(image, unit xyxy box) of every box that was read."""
    if prediction.read is None:
        return []
    if isinstance(sample.answer, BoxesAnswer):
        return [(int(image), tuple(box)) for image, *box in prediction.read]
    return [(sample.answer.image, prediction.read)]


def _with_boxes(image: Image.Image, boxes: Sequence[tuple[Box, str]]) -> Image.Image:
    """The image, WIDTH pixels wide, with unit xyxy boxes in their colours."""
    picture = image.convert("RGB").resize((WIDTH, max(1, round(image.height * WIDTH / image.width))))
    draw = ImageDraw.Draw(picture)
    for box, colour in boxes:
        outline_box(draw, ImageSizes(picture.size, picture.size).to_pixels(box), colour, picture.size)
    return picture


def outline_box(
    draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, size: tuple[int, int]
) -> tuple[float, float]:
    """Draw the outline of a box in pixels. The box may be inverted or outside the picture: it is sorted and clipped.

    Args:
        draw: Pillow's drawing interface of the picture.
        box: two corners, x1, y1, x2, y2.
        colour: colour of the line, which is LINE pixels wide.
        size: (width, height) of the picture.

    Returns:
        The upper left corner of the drawn box.
    """
    xs = sorted(min(max(edge, 0.0), size[0] - 1.0) for edge in box[::2])
    ys = sorted(min(max(edge, 0.0), size[1] - 1.0) for edge in box[1::2])
    draw.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=LINE)
    return xs[0], ys[0]


def draw_previews(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    load: Callable[[Sample], LoadedSample],
    max_image_pixels: int,
) -> list[Drawn]:
    """Yields each sample with its prediction and its preview.

    Samples with an unreadable image are skipped; the evaluation has logged a warning about them.

    Args:
        samples: questions for one box or several.
        predictions: one for each sample.
        load: reads the images of a sample.
        max_image_pixels: a larger image is skipped.
    """
    rows = []
    for sample, prediction in zip(samples, predictions, strict=True):
        try:
            one_box = isinstance(sample.answer, BoxAnswer)
            shown = [sample.answer.image] if one_box else range(len(sample.images))
            stored = load(sample).images
            images = {index: load_image(stored[index], max_image_pixels) for index in shown}
        except (ImageError, SampleError):
            continue
        rows.append((sample, prediction, draw_preview(images, sample, prediction)))
    return rows


def preview_table(rows: Sequence[Drawn]) -> Any:
    """A `wandb.Table` of the previews."""
    import wandb

    data = [[s.task, s.id, wandb.Image(preview), p.value, p.text] for s, p, preview in rows]
    return wandb.Table(columns=["task", "id", "preview", "iou", "text"], data=data)
