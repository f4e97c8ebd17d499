"""LISA-Grounding: the ReasonSeg questions of LISA (Lai et al.), answered with a box instead of a mask.

    ReasonSeg/{val,test}/X.jpg + X.json   {"text": […], "is_sentence": …, "shapes": [{"label", "points", …}, …]}

With `boxes="targets"`, the box is drawn around all pixels of the target mask, which is drawn by LISA's method
(`polygons.py`). With `boxes="first_shape"`, it is drawn around the points of shapes[0] only, whatever its label is, as
in UniVG-R1 and Visual-RFT. The question is text[0], as in the official evaluation. LISA reads an image after EXIF's
rotation, so the points refer to that frame. UniVG-R1 divides them by the stored size; this error for rotated
photographs is not repeated here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from datamodules.benchmarks.base import (
    IN_UNIT,
    PAPER,
    Benchmark,
    Rule,
    file_benchmark,
    make_sample,
    require_fields,
    require_types,
)
from datamodules.benchmarks.reading.polygons import points_fault, polygons_box
from datamodules.images.image_files import read_header
from datamodules.samples.boxes import from_pixels_clipped
from datamodules.samples.sample import Sample

NAME, FOLDER = "lisa", "ReasonSeg"
COLUMNS = ("val", "test")
AVERAGES = {"avg": COLUMNS}
RULE = Rule(source=PAPER)
OFFICIAL = Rule(source="UniVG-R1 eval/zero_shot/lisa_evaluation: first box, IoU >= 0.5", inclusive=True)
QUESTION = "Output the bounding box in the image corresponding to the instruction: {}."
IGNORE = 255


def load(root: Path, boxes: Literal["targets", "first_shape"] = "targets") -> Benchmark:
    """Raises ValueError that names the file and the field for a file of another format; FileNotFoundError without the
    folder.
    """
    samples: list[Sample] = []
    dropped = {"no target in the mask": 0, IN_UNIT: 0}
    for split in COLUMNS:
        files = sorted((root / split).glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{root / split} holds no X.json beside its X.jpg")
        for file in files:
            sample = _sample(file, split, boxes)
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                dropped[sample] += 1

    return file_benchmark(NAME, samples, root, RULE, OFFICIAL, AVERAGES, dropped, frame="shown")


def _sample(file: Path, split: str, boxes: str) -> Sample | str:
    """The question, or the reason why the file has no usable question."""
    record = _read(file)
    image = file.with_suffix(".jpg")
    with image.open("rb") as opened:
        try:
            # (width, height) after EXIF's rotation: the frame of LISA's points.
            size = read_header(opened).size_in("shown")
        except ValueError as error:
            raise ValueError(f"{image}: {error}") from error
    # As pixels, such points would all be in the top left corner of the image.
    if max(max(point) for shape in record["shapes"] for point in shape["points"]) <= 1:
        return IN_UNIT
    if boxes == "first_shape":
        xs, ys = zip(*record["shapes"][0]["points"], strict=True)
        box = (min(xs), min(ys), max(xs), max(ys))
    else:
        box = polygons_box([(shape["points"], _value(shape["label"])) for shape in _drawn(record["shapes"])], size)
    if box is None:
        return "no target in the mask"
    task = "sentence" if record["is_sentence"] else "phrase"
    question = QUESTION.format(record["text"][0].strip().rstrip("."))
    answer = {"image": 0, "box": from_pixels_clipped(box, size), "label": ""}
    images = [f"{split}/{image.name}"]
    return make_sample(NAME, f"{split}/{file.stem}", task, images, question, answer, column=split, size=list(size))


def _read(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252")  # some published files have this encoding
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    require_fields(record, ("text", "is_sentence", "shapes"), str(file))
    require_types(record, str(file), text=list, shapes=list)
    if not record["text"] or not record["shapes"]:
        raise ValueError(f"{file}: text={record['text']!r:.80} and shapes must be lists that hold something")
    if not isinstance(record["text"][0], str):
        raise ValueError(f"{file}: text={record['text']!r:.80} holds no text")
    for shape in record["shapes"]:
        require_fields(shape, ("label", "points"), f"{file}: a shape")
        if not isinstance(shape["label"], str):
            raise ValueError(f"{file}: label={shape['label']!r:.80} of a shape is no text")
        if (fault := points_fault(shape["points"])) is not None:
            raise ValueError(f"{file}: points of a shape with label={shape['label']!r:.40} {fault}")
    return record


def _drawn(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [shape for shape in shapes if shape["label"].lower() != "flag"]  # deprecated marks that are not regions


def _value(label: str) -> int:
    return IGNORE if "ignore" in label.lower() else 1
