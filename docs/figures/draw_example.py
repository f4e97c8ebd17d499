"""Draw the README's example: one question of the nano MIG-Bench on its images, with the true box and a model's answer.

    python -m docs.figures.draw_example --id mig_bench/30 \
        --predictions outputs/nano/grpo/benchmarks/mig_bench/predictions.jsonl
    python -m docs.figures.draw_example    # draws example.json again

The first form takes a stored answer into example.json. Both need the nano benchmark in data/nano (`make shards`).
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from datamodules.benchmarks.registry import load_benchmark
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, load_image
from datamodules.metrics.drawing import PREDICTED_COLOUR, TRUE_COLOUR
from datamodules.metrics.result_files import read_predictions
from datamodules.samples.boxes import Box, ImageSizes
from datamodules.samples.sample import BoxPart, Sample, TextPart

HERE = Path(__file__).resolve().parent
DATA = Path("data/nano")
HEIGHT, GAP, LINE, FONT_SIZE = 220, 12, 22, 16
CHARACTERS = 100  # in a line of text


def take(predictions: Path, identity: str, model: str) -> dict:
    """The stored answer to one question, as it stands in example.json."""
    for found in read_predictions(predictions):
        if found.id == identity:
            answer = {"id": identity, "model": model, "text": found.text, "box": found.read}
            return answer | {"iou": round(found.value, 2)}
    raise SystemExit(f"{predictions} has no answer to {identity}")


def draw_box(draw: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], colour: str, dashed: bool) -> None:
    """Outline a box in 0-1; a dashed line shows a solid one below it."""
    x1, y1, x2, y2 = ImageSizes(original=size, resized=size).to_pixels(box)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for (ax, ay), (bx, by) in pairwise(corners):
        length = max(abs(bx - ax), abs(by - ay))
        steps = max(1, round(length / 7)) if dashed else 1
        for step in range(0, steps, 2 if dashed else 1):
            ends = [(ax + (bx - ax) * k / steps, ay + (by - ay) * k / steps) for k in (step, step + 1)]
            draw.line(ends, fill=colour, width=3)


def draw(sample: Sample, images: Sequence[Image.Image], answer: dict) -> Image.Image:
    """All images in a row, the boxes on the image of the answer, and the text below."""
    scaled = [image.resize((round(image.width * HEIGHT / image.height), HEIGHT)) for image in images]
    question = "".join(part.text for part in sample.messages if isinstance(part, TextPart | BoxPart)).strip()
    texts = [f"Question: {question}", f"Answer of {answer['model']}: {answer['text']}"]
    lines = [line for text in texts for line in [*textwrap.wrap(text, CHARACTERS), ""]]
    lines.append(f"Green: the true box. Red, dashed: the model's box. IoU {answer['iou']:.2f}.")
    width = max(sum(image.width + GAP for image in scaled) + GAP, 8 * CHARACTERS)
    canvas = Image.new("RGB", (width, HEIGHT + LINE * (len(lines) + 2) + GAP), "white")
    pen, font, x = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE), GAP
    for number, image in enumerate(scaled):
        if number == sample.answer.image:
            on_image = ImageDraw.Draw(image)
            draw_box(on_image, sample.answer.box, image.size, TRUE_COLOUR, dashed=False)
            if answer["box"] is not None:
                draw_box(on_image, tuple(answer["box"]), image.size, PREDICTED_COLOUR, dashed=True)
        pen.text((x, 2), f"Image-{number + 1}", "black", font)
        canvas.paste(image, (x, LINE + 2))
        x += image.width + GAP
    for number, line in enumerate(lines):
        pen.text((GAP, HEIGHT + LINE * (number + 1) + GAP), line, "black", font)
    return canvas


def main(args: Sequence[str] | None = None) -> None:
    """Write example.json, where an answer is given, and example.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--predictions", type=Path, help="predictions.jsonl of a MIG-Bench evaluation")
    parser.add_argument("--id", help="id of the question")
    parser.add_argument("--model", default="the nano model after GRPO", help="name of the model in the picture")
    given = parser.parse_args(args)
    record = HERE / "example.json"
    if given.predictions is not None:
        answer = take(given.predictions, given.id, given.model)
        record.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    answer = json.loads(record.read_text(encoding="utf-8"))
    benchmark = load_benchmark("mig_bench", str(DATA))
    sample = next(sample for sample in benchmark.samples if sample.id == answer["id"])
    images = [load_image(data, MAX_IMAGE_PIXELS) for data in benchmark.load(sample).images]
    draw(sample, images, answer).save(HERE / "example.png", optimize=True)


if __name__ == "__main__":
    main()
