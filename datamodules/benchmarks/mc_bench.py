"""MC-Bench (Xu et al., arXiv:2410.12332): a description of instances in two images. Several boxes or none answer it.

    MC-Bench/mc-bench_v0.2_val.json      descriptions, images, annotations (bbox [x, y, w, h] in pixels), categories
    MC-Bench/mc-bench_images/<set>/…     the images; the folder may be called MC-Bench_images

A category is a group, and the label of its boxes: "people with the same role" has a group for each role, most
descriptions have only "group 1". The boxes alone decide whether a description has an answer, as in the official script.
The field `positive_sample` contradicts them in a few descriptions; these are counted. So is the box of the published
file that lies outside its image: AP cannot reach 100 there.

The score is average precision (`datamodules/metrics/detections.py`). The question is worded here: no official wording
is published with the data. The official script reads no images, so it is not known whether its boxes refer to the
stored pixels. They are taken to do so, as in COCO. Where EXIF turns an image by 90 degrees and this is wrong, the
question counts as wrong under "size_mismatch".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import (
    IN_UNIT,
    Benchmark,
    Rule,
    by_id,
    file_benchmark,
    is_xywh,
    make_sample,
    read_object,
    require_fields,
    require_types,
)
from datamodules.benchmarks.mig_bench import relative_name
from datamodules.samples.boxes import box_fault, from_pixels_clipped, is_unit_xywh
from datamodules.samples.sample import Sample

NAME, FOLDER, FILE = "mc_bench", "MC-Bench", "mc-bench_v0.2_val.json"
IMAGES = ("mc-bench_images", "MC-Bench_images")
COLUMNS = ("Referring", "Comparison", "Reasoning")  # styles of the descriptions
AVERAGES = {"avg": COLUMNS}
RULE = Rule(
    source="MC-Bench AP50 over all questions, groups of every answer renamed to those of the truth",
    inclusive=True,
    across="micro",
    measure="average_precision",
)
OFFICIAL = Rule(
    source="MC-Bench eval_mc_bench.py: AP50, groups as they are written, a text without a box says that there is none",
    inclusive=True,
    across="micro",
    reader="mc_bench",
    measure="average_precision",
)
QUESTION = (
    "Locate every instance in the two images that this description means: {}. If it means several groups of instances,"
    ' label the instances "group 1", "group 2" and so on. If there is no such instance, answer with an empty list.'
)
CONTRADICTION = "kept: positive_sample contradicts the boxes"
OUTSIDE = "kept: box outside its image, which no answer reaches"
_FIELDS = {
    "descriptions": ("id", "images_id", "text", "positive_sample", "text_style"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "text_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_GROUP = re.compile(r"\s*group\s*([1-9]\d{0,2})\s*", re.IGNORECASE | re.ASCII)


def group_of(label: str | None) -> int:
    """The number in a label such as "group 2"; 1 for any other label."""
    found = _GROUP.fullmatch(label or "")
    return int(found[1]) if found else 1


def load(root: Path) -> Benchmark:
    """Raises ValueError that names a missing or contradictory field, FileNotFoundError without file or images."""
    folder = next((root / name for name in IMAGES if (root / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {IMAGES[0]}/ with the images")
    data = read_object(root / FILE)
    require_fields(data, tuple(_FIELDS), FILE)
    require_types(data, FILE, **dict.fromkeys(_FIELDS, list))
    tables = {}
    for what, names in _FIELDS.items():
        tables[what] = by_id(data[what], what, FILE)
        for position, record in enumerate(tables[what].values()):
            require_fields(record, names, f"{FILE}: {what}[{position}]")
    samples, dropped = _samples(tables)
    return file_benchmark(NAME, samples, folder, RULE, OFFICIAL, AVERAGES, dropped, frame="stored")


def _samples(tables: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> tuple[list[Sample], dict[str, int]]:
    """The samples in the order of the descriptions, and the counts of records with a peculiarity."""
    descriptions, images = tables["descriptions"], tables["images"]
    for number, description in descriptions.items():
        _check(description, f"{FILE}: description {number}", images)
    boxes: dict[Any, list[Mapping[str, Any]]] = {number: [] for number in descriptions}
    for number, annotation in tables["annotations"].items():
        owner, image = _entry(descriptions, annotation["text_id"]), annotation["image_id"]
        if owner is None or image not in owner["images_id"]:
            ids = f"text_id={annotation['text_id']!r:.40}, image_id={image!r:.40}"
            raise ValueError(f"{FILE}: annotation {number} has {ids}: no description with this image")
        boxes[owner["id"]].append(annotation)
    samples = []
    dropped = {IN_UNIT: 0, CONTRADICTION: 0, OUTSIDE: 0}
    for number, description in descriptions.items():
        pair, style = description["images_id"], description["text_style"]
        sizes = [(images[image]["width"], images[image]["height"]) for image in pair]
        found = [_box(annotation, pair, sizes, tables["categories"]) for annotation in boxes[number]]
        if None in found:
            dropped[IN_UNIT] += 1
            continue
        dropped[OUTSIDE] += sum(box_fault(tuple(one["box"])) is not None for one in found)
        dropped[CONTRADICTION] += bool(found) != description["positive_sample"]
        names = [relative_name(images[image]["file_name"], f"{NAME}/{number}") for image in pair]
        question = QUESTION.format(description["text"].strip().rstrip("."))
        extra = {"sizes": [list(size) for size in sizes]}
        samples.append(make_sample(NAME, number, style, names, question, {"boxes": found}, **extra))
    return samples, dropped


def _check(description: Mapping[str, Any], where: str, images: Mapping[Any, Mapping[str, Any]]) -> None:
    pair, style, text = description["images_id"], description["text_style"], description["text"]
    if not isinstance(pair, list) or len(pair) != 2 or any(_entry(images, image) is None for image in pair):
        raise ValueError(f"{where}: images_id={pair!r:.80} are not the ids of two images")
    if style not in COLUMNS:
        raise ValueError(f"{where}: text_style={style!r:.80} is none of {', '.join(COLUMNS)}")
    if not isinstance(text, str):
        raise ValueError(f"{where}: text={text!r:.80} is no text")
    for image in pair:
        size = (images[image]["width"], images[image]["height"])
        if not all(isinstance(side, int) and side >= 1 for side in size):
            raise ValueError(f"{where}: image {image} has width={size[0]!r:.40}, height={size[1]!r:.40}")


def _entry(table: Mapping[Any, Mapping[str, Any]], number: Any) -> Mapping[str, Any] | None:
    """The record with this id; None if there is none, or if `number` is no id."""
    return table.get(number) if isinstance(number, int | str) else None


def _box(
    annotation: Mapping[str, Any],
    pair: list[Any],
    sizes: list[tuple[int, int]],
    categories: Mapping[Any, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """A true box with its group; None if it is in 0-1."""
    where = f"{FILE}: annotation {annotation['id']}"
    name = (_entry(categories, annotation["category_id"]) or {}).get("name")
    if not isinstance(name, str) or not _GROUP.fullmatch(name):
        raise ValueError(f"{where}: category_id={annotation['category_id']!r:.40} is no group, such as 'group 1'")
    box, image = annotation["bbox"], pair.index(annotation["image_id"])
    if not is_xywh(box):
        raise ValueError(f"{where}: bbox={box!r:.80} is not [x, y, w, h]")
    if is_unit_xywh(box, sizes[image]):
        return None
    x, y, w, h = box
    return {"image": image, "box": from_pixels_clipped((x, y, x + w, y + h), sizes[image]), "label": name}
