"""Draw an answer: the predicted and the true box on the target image, with the question and the answer below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.images.image_loading import ImageError, load_image
from datamodules.metrics.predictions import Prediction
from datamodules.samples.boxes import ImageSizes
from datamodules.samples.sample import BoxPart, LoadedSample, Sample, SampleError, TextPart

WIDTH = 640  # width of every preview in pixels
FONT_SIZE = 14
LINE = 3  # width of the outline of a box
LINE_HEIGHT = 18
TRUE_COLOUR, PREDICTED_COLOUR = "#00a000", "#e02020"
Drawn = tuple[Sample, Prediction, Image.Image]


def draw_preview(image: Image.Image, sample: Sample, prediction: Prediction) -> Image.Image:
    """The target `image` with the true (green) and the predicted (red) box, above the question and the answer."""
    picture = image.convert("RGB").resize((WIDTH, max(1, round(image.height * WIDTH / image.width))))
    draw = ImageDraw.Draw(picture)
    for box, colour in ((sample.answer.box, TRUE_COLOUR), (prediction.read, PREDICTED_COLOUR)):
        if box is not None:
            outline_box(draw, ImageSizes(picture.size, picture.size).to_pixels(box), colour, picture.size)
    question = "".join(part.text for part in sample.messages if isinstance(part, TextPart | BoxPart))
    result = f"no box: {prediction.failure}" if prediction.read is None else f"IoU {prediction.value:.2f}"
    heading = f"{sample.task} {sample.id}, image {sample.answer.image + 1} of {len(sample.images)}, {result}"
    lines = [line for text in (heading, question, prediction.text) for line in textwrap.wrap(text, WIDTH // 8) or [""]]
    canvas = Image.new("RGB", (WIDTH, picture.height + LINE_HEIGHT * len(lines) + 8), "white")
    canvas.paste(picture)
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((4, picture.height + 4 + number * LINE_HEIGHT), line, "black", font)
    return canvas


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
        samples: questions for one box.
        predictions: one for each sample.
        load: reads the images of a sample.
        max_image_pixels: a larger image is skipped.
    """
    rows = []
    for sample, prediction in zip(samples, predictions, strict=True):
        try:
            image = load_image(load(sample).images[sample.answer.image], max_image_pixels)
        except (ImageError, SampleError):
            continue
        rows.append((sample, prediction, draw_preview(image, sample, prediction)))
    return rows


def preview_table(rows: Sequence[Drawn]) -> Any:
    """A `wandb.Table` of the previews."""
    import wandb

    data = [[s.task, s.id, wandb.Image(preview), p.value, p.text] for s, p, preview in rows]
    return wandb.Table(columns=["task", "id", "preview", "iou", "text"], data=data)
