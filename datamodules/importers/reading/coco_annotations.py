"""Read COCO's annotation format, as used by RefCOCO, ODinW and V3Det, and make single-image questions from it.

{"images": [{"id", "file_name", "height", "width"}], "categories": [{"id", "name"}],
 "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height]}]}     pixels of the stored image
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.benchmarks.base import refuse_repeated
from datamodules.benchmarks.mig_bench import relative_name
from datamodules.importers.reading.field_checks import NUMBER, Kinds, Schema
from datamodules.importers.reading.json_stream import stream_json
from datamodules.samples.boxes import from_pixels_xywh, is_unit_xywh
from datamodules.samples.sample import Sample, SampleError

# For each array, its required and optional fields. A source passes its additional fields as `more`.
_REQUIRED: dict[str, dict[str, Kinds]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": (int, str), "category_id": int, "bbox": list},
}
_OPTIONAL: dict[str, dict[str, Kinds]] = {
    "images": dict.fromkeys(("license", "date_captured", "coco_url", "flickr_url"), object),
    "categories": {"supercategory": (str, type(None))},
    "annotations": {"id": (int, str), "area": NUMBER, "iscrowd": int, "segmentation": (list, dict)},
}
_OTHER = ("info", "licenses")  # top-level keys without use here

# The wordings of a question. The sample's id decides which one is used.
QUESTIONS = (
    "Locate this in the image: {}.",
    "Find {} in the image.",
    "Where in the image is {}?",
    "Give the bounding box of what this describes: {}.",
)


class Entry(NamedTuple):
    """One question without the bytes of its image."""

    id: str
    task: str
    image: str  # relative to the scan's image root
    size: tuple[int, int]  # width, height in pixels
    box: Sequence[float]  # x, y, width, height in pixels
    phrase: str


class Annotation(NamedTuple):
    id: int | str
    image: int | str
    category: int
    box: list[Any]
    crowd: bool


@dataclass
class CocoFile:
    """One annotation file; `images` maps ids to (file name, (width, height)), `categories` ids to names."""

    images: dict[int | str, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    annotations: list[Annotation] = field(default_factory=list)
    ids: set[int | str] = field(default_factory=set)  # ids of annotations, if the file has them


def read_coco(path: Path, schema: Schema, more: Mapping[str, Mapping[str, Kinds]] | None = None) -> CocoFile:
    """Read and check a file.

    Raises ValueError for a field that is missing, unknown or of another type, for two images, categories or annotations
    with the same id, and for an annotation of an image or category that is not listed.
    """
    coco, counts = CocoFile(), Counter()
    for item in stream_json(path):
        if item.key not in _REQUIRED:
            if item.key not in _OTHER and item.key not in schema.allow:
                raise ValueError(f"{path}: unknown top-level field {item.key!r}; --allow admits it")
            continue
        where = f"{path.name}: {item.key}[{counts[item.key]}]"
        counts[item.key] += 1
        # The file is checked while it is streamed; only the needed fields stay in memory.
        optional = _OPTIONAL[item.key] | dict((more or {}).get(item.key, {}))
        schema.check(item.key, item.value, where, _REQUIRED[item.key], optional)
        _keep(coco, item.key, item.value, where)
    for key in _REQUIRED:
        if not counts[key]:
            raise ValueError(f"{path}: field {key!r} is missing or empty")
    for annotation in coco.annotations:
        if annotation.image not in coco.images or annotation.category not in coco.categories:
            raise ValueError(
                f"{path}: annotation {annotation.id} has image_id={annotation.image!r},"
                f" category_id={annotation.category}, and one of them is not listed"
            )
    return coco


def _keep(coco: CocoFile, key: str, value: dict[str, Any], where: str) -> None:
    if key == "images":
        # Boxes are divided by these sides later.
        if min(value["width"], value["height"]) < 1:
            raise ValueError(f"{where}: width={value['width']}, height={value['height']}")
        refuse_repeated(value["id"], coco.images, where)
        coco.images[value["id"]] = value["file_name"], (value["width"], value["height"])
    elif key == "categories":
        refuse_repeated(value["id"], coco.categories, where)
        coco.categories[value["id"]] = value["name"]
    else:
        box = value["bbox"]
        if len(box) != 4 or not all(isinstance(number, int | float) for number in box):
            raise ValueError(f"{where}: field 'bbox' should be four numbers, found {box!r:.200}")
        # The id is optional. Without it, messages name the position of the annotation.
        number = value.get("id", len(coco.annotations))
        if "id" in value:
            refuse_repeated(number, coco.ids, where)
            coco.ids.add(number)
        crowd = bool(value.get("iscrowd", 0))
        coco.annotations.append(Annotation(number, value["image_id"], value["category_id"], box, crowd))


def single_box_entries(
    coco: CocoFile, source: str, subset: str, skipped: Counter[str], folder: str = "", related: Mapping[int, Any] = {}
) -> list[Entry]:
    """Make a question for each image and category with exactly one box, in the order of the file's annotations.

    `related` maps a category to other categories that must not be in the same image. `folder` is added before image
    names. Skipped annotations are counted in `skipped`.
    """
    # 1. Boxes by image, then by category: [image][category] -> annotations.
    boxes: defaultdict[int | str, defaultdict[int, list[Annotation]]] = defaultdict(lambda: defaultdict(list))
    for annotation in coco.annotations:
        boxes[annotation.image][annotation.category].append(annotation)
    # 2. A question must have one right answer: exactly one box, no crowd, and no related category in the image.
    entries = []
    for image, by_category in boxes.items():
        name, size = coco.images[image]
        for category, found in by_category.items():
            if len(found) > 1 or found[0].crowd:
                skipped["several_boxes" if len(found) > 1 else "crowd"] += 1
            elif not by_category.keys().isdisjoint(related.get(category, ())):
                skipped["related_class"] += 1
            else:
                uid = f"{source}/{subset}/{image}/{category}"
                entries.append(Entry(uid, source, f"{folder}{name}", size, found[0].box, coco.categories[category]))
    return entries


def convert(source: str, entries: Sequence[Entry]) -> Iterator[Sample | SampleError]:
    """Make a single-image sample or an error for each entry."""
    for entry in entries:
        try:
            yield _sample(source, Entry(*entry))
        except SampleError as error:
            yield error


def as_phrase(name: str) -> str:
    """The name of a category, or an expression, as it stands in a question; "" if it names nothing."""
    return " ".join(name.split()).rstrip(".?! ")


def _sample(source: str, entry: Entry) -> Sample:
    phrase = as_phrase(entry.phrase)
    if not phrase:
        raise SampleError(entry.id, "empty_phrase", f"{entry.phrase!r} names nothing")
    # As pixels, such a box would be a dot in the corner and would pass every other check.
    if is_unit_xywh(entry.box, entry.size):
        detail = f"bbox={list(entry.box)} of {entry.size[0]}x{entry.size[1]} pixels is in 0-1, where COCO means pixels"
        raise SampleError(entry.id, "box_in_unit", detail)
    box, clamped = from_pixels_xywh(entry.box, entry.size)
    # A hash of the id: the same sample has the same wording in every import.
    wording = QUESTIONS[hashlib.sha256(entry.id.encode()).digest()[0] % len(QUESTIONS)]
    return Sample.from_json(
        {
            "id": entry.id,
            "source": source,
            "task": entry.task,
            "images": [relative_name(entry.image, entry.id)],
            "messages": [{"type": "image", "image": 0}, {"type": "text", "text": wording.format(phrase)}],
            "answer": {"image": 0, "box": list(box), "label": phrase},
            "extra": {"sizes": [list(entry.size)]} | ({"repaired": "clamped_box"} if clamped else {}),
        }
    )
