"""Draw an answer: all images of its question, with the true and the predicted boxes and a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.images.image_loading import ImageError, load_image
from datamodules.metrics.predictions import Prediction
from datamodules.samples.boxes import Box, ImageSizes
from datamodules.samples.sample import BoxesAnswer, ChoiceAnswer, LoadedSample, Sample, SampleError
from datamodules.samples.scores import true_boxes

PREVIEW_TEXTS = "previews.json"  # file beside previews with their texts (`describe_preview`)
WIDTH = 640  # width of every preview in pixels
TALLEST = 20 * WIDTH  # a strip of a few columns would be taller, up to all memory: it is squeezed
FONT_SIZE = 14
LINE = 3  # width of the outline of a box
LINE_HEIGHT = 18
COLUMNS, GAP = 3, 8  # most images beside each other, and the pixels between them
TRUE_COLOUR, PREDICTED_COLOUR = "#00a000", "#e02020"
Drawn = tuple[Sample, Prediction, Image.Image]


def draw_preview(images: Sequence[Image.Image], sample: Sample, prediction: Prediction) -> Image.Image:
    """All images of a question with the true (green) and the predicted (red) boxes, and a legend below.

    Args:
        images: every image of the sample, in its order.
        sample: the question and its true boxes.
        prediction: the answer.
    """
    boxes = [(box.image, box.box, TRUE_COLOUR) for box in true_boxes(sample.answer)]
    boxes += [(image, box, PREDICTED_COLOUR) for image, box in read_boxes(prediction)]
    columns = min(len(images), COLUMNS)
    side = (WIDTH - GAP * (columns - 1)) // columns
    # 1. Each image with its number above it.
    asked = {box.image for box in true_boxes(sample.answer)}
    cells = []
    for index, image in enumerate(images):
        name = f"image {index + 1}" + (", asked for" if index in asked else "")
        cells.append(_captioned(image, side, [(box, colour) for at, box, colour in boxes if at == index], name))
    # 2. Rows of them, and the legend.
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    canvas = Image.new("RGB", (WIDTH, sum(max(c.height for c in row) + GAP for row in rows) + LINE_HEIGHT), "white")
    top = 0
    for row in rows:
        for column, cell in enumerate(row):
            canvas.paste(cell, (column * (side + GAP), top))
        top += max(cell.height for cell in row) + GAP
    draw = ImageDraw.Draw(canvas)
    for left, colour, name in ((2, TRUE_COLOUR, "true box"), (110, PREDICTED_COLOUR, "predicted box")):
        draw.rectangle((left, top + 4, left + 14, top + 13), outline=colour, width=LINE)
        draw.text((left + 20, top), name, "black", ImageFont.load_default(FONT_SIZE))
    return canvas


def describe_preview(sample: Sample, prediction: Prediction) -> dict[str, str]:
    """The texts that belong to a preview: task, id, question, answer, and the score of the answer."""
    result = f"no box: {prediction.failure}" if prediction.read is None else f"IoU {prediction.value:.2f}"
    if prediction.f1 is not None:
        result = f"F1 {prediction.f1:.2f}" + (f", {result}" if prediction.failure else "")
    texts = {"question": sample.question, "answer": prediction.text, "result": result}
    return {"task": sample.task, "id": sample.id} | texts


def read_boxes(prediction: Prediction) -> list[tuple[int, Box]]:
    """(image, unit xyxy box) of every box that was read; [] for an answer without boxes."""
    if prediction.read is None or isinstance(prediction.answer, ChoiceAnswer):
        return []
    if isinstance(prediction.answer, BoxesAnswer):
        return [(int(image), tuple(box)) for image, *box in prediction.read]
    return [(prediction.answer.image, prediction.read)]


def _captioned(image: Image.Image, width: int, boxes: Sequence[tuple[Box, str]], caption: str) -> Image.Image:
    """The image at this width with unit xyxy boxes in their colours, below a line of text."""
    height = min(TALLEST, max(1, round(image.height * width / image.width)))
    picture = image.convert("RGB").resize((width, height))
    draw = ImageDraw.Draw(picture)
    for box, colour in boxes:
        pixels = ImageSizes(picture.size, picture.size).to_pixels(box)
        outline_box(draw, pixels, "white", picture.size, LINE + 2)  # a green box on a green object stays visible
        outline_box(draw, pixels, colour, picture.size)
    canvas = Image.new("RGB", (width, picture.height + LINE_HEIGHT), "white")
    canvas.paste(picture, (0, LINE_HEIGHT))
    ImageDraw.Draw(canvas).text((0, 0), caption, "black", ImageFont.load_default(FONT_SIZE))
    return canvas


def outline_box(
    draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, size: tuple[int, int], line: int = LINE
) -> tuple[float, float]:
    """Draw the outline of a box in pixels. The box may be inverted or outside the picture: it is sorted and clipped.

    Args:
        draw: Pillow's drawing interface of the picture.
        box: two corners, x1, y1, x2, y2.
        colour: colour of the line.
        size: (width, height) of the picture.
        line: width of the line in pixels.

    Returns:
        The upper left corner of the drawn box.
    """
    xs = sorted(min(max(edge, 0.0), size[0] - 1.0) for edge in box[::2])
    ys = sorted(min(max(edge, 0.0), size[1] - 1.0) for edge in box[1::2])
    draw.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=line)
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
            images = [load_image(stored, max_image_pixels) for stored in load(sample).images]
        except (ImageError, SampleError):
            continue
        rows.append((sample, prediction, draw_preview(images, sample, prediction)))
    return rows


def preview_table(rows: Sequence[Drawn]) -> Any:
    """A `wandb.Table` of the previews."""
    import wandb

    texts = [describe_preview(sample, prediction) for sample, prediction, _ in rows]
    data = [
        [text["task"], text["id"], wandb.Image(preview), text["question"], prediction.value, text["answer"]]
        for text, (_, prediction, preview) in zip(texts, rows, strict=True)
    ]
    return wandb.Table(columns=["task", "id", "preview", "question", "iou", "text"], data=data)
