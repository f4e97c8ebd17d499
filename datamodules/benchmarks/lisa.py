"""LISA-Grounding: the ReasonSeg questions of LISA (Lai et al.), answered with a box instead of a mask.

    ReasonSeg/{val,test}/X.jpg + X.json   {"text": […], "is_sentence": …, "shapes": [{"label", "points", …}, …]}

Boxes from masks: around all target pixels (`boxes="targets"`). UniVG-R1 and Visual-RFT take the points of shapes[0]
alone, whatever its label is (`boxes="first_shape"`). The question is text[0]: official evaluation asks no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from datamodules.benchmarks.masks import polygons_box
from datamodules.benchmarks.schema import (
    PAPER,
    Benchmark,
    Rule,
    file_benchmark,
    image_parts,
    make_sample,
    require_fields,
)
from datamodules.boxes import from_pixels_clipped
from datamodules.image_loading import ImageError, open_image
from datamodules.samples import Sample

NAME, FOLDER = "lisa", "ReasonSeg"
COLUMNS = ("val", "test")
AVERAGES = {"avg": COLUMNS}
RULE = Rule(source=PAPER)
OFFICIAL = Rule(source="UniVG-R1 eval/zero_shot/lisa_evaluation: first box, IoU >= 0.5", inclusive=True)
QUESTION = "Output the bounding box in the image corresponding to the instruction: {}."
IGNORE = 255


def load(root: Path, boxes: Literal["targets", "first_shape"] = "targets") -> Benchmark:
    """Raises ValueError for a file of another form, naming it and the field, FileNotFoundError for a missing folder."""
    samples: list[Sample] = []
    dropped = {"no target in the mask": 0}
    for split in COLUMNS:
        files = sorted((root / split).glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{root / split} holds no X.json beside its X.jpg")
        for file in files:
            sample = _sample(file, split, boxes)
            if sample is None:
                dropped["no target in the mask"] += 1
            else:
                samples.append(sample)

    return file_benchmark(NAME, samples, root, RULE, OFFICIAL, AVERAGES, dropped)


def _sample(file: Path, split: str, boxes: str) -> Sample | None:
    record = _read(file)
    image = file.with_suffix(".jpg")
    try:
        size = open_image(image.read_bytes()).size
    except ImageError as error:
        raise ValueError(f"{image}: {error}") from error
    if boxes == "first_shape":
        xs, ys = zip(*record["shapes"][0]["points"], strict=True)
        box = (min(xs), min(ys), max(xs), max(ys))
    else:
        box = polygons_box([(shape["points"], _value(shape["label"])) for shape in _drawn(record["shapes"])], size)
    if box is None:
        return None
    return make_sample(
        {
            "id": f"{NAME}/{split}/{file.stem}",
            "source": NAME,
            "task": "sentence" if record["is_sentence"] else "phrase",
            "images": [f"{split}/{image.name}"],
            "messages": image_parts(1, QUESTION.format(record["text"][0].strip().rstrip("."))),
            "answer": {"image": 0, "box": from_pixels_clipped(box, size), "label": ""},
        },
        column=split,
        size=list(size),
    )


def _read(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252")  # some of the published files are
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    require_fields(record, ("text", "is_sentence", "shapes"), str(file))
    if not isinstance(record["text"], list) or not record["text"] or not record["shapes"]:
        raise ValueError(f"{file}: text={record['text']!r:.80} and shapes must be lists that hold something")
    for shape in record["shapes"]:
        require_fields(shape, ("label", "points"), f"{file}: a shape")
    return record


def _drawn(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [shape for shape in shapes if "flag" not in shape["label"].lower()]  # deprecated marks, no regions


def _value(label: str) -> int:
    return IGNORE if "ignore" in label.lower() else 1
