"""Read COCO detection files that annotation tools export. Additional fields are counted and shown, not refused.

{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
 "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height]}]}

`bbox` is in pixels of the image, from its upper left corner (cocodataset.org, "Data format"). Several tools add fields:
    Roboflow   writes <split>/_annotations.coco.json next to the images, `images[].extra`, and a category 0 that groups
               the others and has no boxes (roboflow/rf-detr, pull request 1303);
    CVAT       writes annotations/instances_<subset>.json beside images/, `annotations[].attributes` with "occluded",
               "rotation" and the user's own (docs.cvat.ai, "COCO"). The box of a rotated rectangle is the one before
               its rotation, so it is rejected;
    Label Studio  writes result.json beside images/, `annotations[].ignore`, and null for a size that it could not read
               (HumanSignal/label-studio-converter, converter.py, `convert_to_coco`).

Each category in an image becomes a question. Its answer is the list of all boxes of the category.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.importers.own_data.coordinates import Size, read_numbers
from datamodules.importers.own_data.drafts import Draft, DraftBox, DraftRecord, detection_drafts, question_key
from datamodules.importers.own_data.image_folder import ImageFolder, find_image_root
from datamodules.importers.own_data.records import Kept, RecordReader, Reservoir, compare_boxes
from datamodules.importers.own_data.statement import TRAIN, OwnData
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.json_stream import stream_json
from datamodules.importers.reading.source import MAX_DEPTH, DataError, Scan, find_files, name_subset
from datamodules.samples.sample import LoadedSample, SampleError

DEFAULT_SUBSETS = TRAIN
KNOWN = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name", "supercategory"),
    "annotations": ("id", "image_id", "category_id", "bbox", "iscrowd", "area", "segmentation"),
}
Fault = tuple[str, str]  # rule, detail


class ImageEntry(NamedTuple):
    """One image: its file, id, size (None: read from the file), and boxes as (category, four numbers or a problem)."""

    file: int
    id: int | str
    name: str
    size: Size | None
    boxes: tuple[tuple[str, Any], ...]
    faults: tuple[Fault, ...] = ()


@dataclass
class DetectionFile:
    """The content of one annotation file. `images` maps ids to (file name, size), `categories` ids to names."""

    images: dict[Any, tuple[str, Size | None]] = field(default_factory=dict)
    categories: dict[Any, str] = field(default_factory=dict)
    annotations: list[tuple[Any, Any, Any]] = field(default_factory=list)  # image, category, numbers or Fault
    faults: list[Fault] = field(default_factory=list)  # problems of items that belong to no image
    found: Counter[str] = field(default_factory=Counter)  # array -> number of items


def root_problems(root: str, own: OwnData) -> list[str]:
    """The problems of ROOT, as messages."""
    return [] if root and Path(root).exists() else [f"root={root!r} is neither a folder nor a COCO file"]


def annotation_files(root: Path, own: OwnData) -> list[Path]:
    """Every .json file in `root`, or `root` itself; DataError if there is none."""
    files = find_files(root, "*.json")
    if not files:
        raise DataError(f"root={str(root)!r}: no .json file, at most {MAX_DEPTH - 1} folders down")
    return files


def scan(root: Path, allow: Sequence[str], own: OwnData) -> Scan:
    """Read every annotation file.

    Raises:
        DataError: the boxes of a file contradict the box format of COCO or of the user, two images or two categories
            have the same id, two files are the same subset, or no file has a question.
    """
    # Each annotation file has its own image folder, because exports of several splits are side by side.
    schema, skipped, subsets = Schema(allow), Counter({"no_box": 0}), {}
    name, folders, passed_over = own.dataset_name(root), [], []
    named: dict[str, Path] = {}
    for path in annotation_files(root, own):
        # 1. Read the file.
        content = _read(path, schema)
        if missing := [key for key in KNOWN if not content.found[key]]:
            passed_over.append(f"{path.name} (no {', '.join(missing)})")
            continue
        subset = name_subset(_subset(root, path), path, named)
        # 2. Its images, and a question for each category of each image.
        names = [file_name for file_name, _ in content.images.values()]
        folder = ImageFolder(find_image_root(root, path, names, own.images), own.follow_links, own.frame)
        entries = list(_entries(len(folders), content, skipped, schema))
        folders.append(folder)
        # 3. Check that its boxes can have COCO's format.
        _check_boxes(path, entries, folder, own, schema)
        schema.counts["images with a question"][subset] = len(entries)
        subsets[subset] = entries
    for note in passed_over:
        schema.count("files that are no detection files", note)
    # A folder may contain other JSON files. It is an error only if no file has a question.
    if not any(subsets.values()):
        raise DataError(f"root={str(root)!r}: no image with a box; {'; '.join(passed_over[:3]) or dict(skipped)}")
    readers = tuple(RecordReader("coco", name, own, folder) for folder in folders)
    convert_entries = partial(convert, readers, tuple(subsets))
    return Scan(subsets, convert_entries, root, schema.report(), dict(skipped), own.frame)


def convert(
    readers: Sequence[RecordReader], subsets: Sequence[str], entries: Sequence[ImageEntry]
) -> Iterator[LoadedSample | SampleError]:
    """A sample or an error for each category of each image."""
    for entry in map(ImageEntry._make, entries):
        reader = readers[entry.file]
        sample_id = f"{reader.name}/{subsets[entry.file]}:{entry.id}"
        # 1. Problems that belong to no image; the last entry of each file has them.
        for rule, detail in entry.faults:
            yield SampleError(sample_id, rule, detail)
        if not entry.boxes:
            continue
        # 2. One draft for each category of the image.
        drafts = tuple(_drafts(entry, reader.own, sample_id))
        made = DraftRecord("coco", (entry.name,), drafts, reader.own.box_format or "pixels_xywh")
        try:
            # 3. Read the image only if a draft is usable. The annotated size must equal the file's size, because the
            # boxes of a resized copy would be wrong.
            images = None
            if any(isinstance(draft, Draft) for draft in drafts):
                images = reader.folder.read(made.images, sample_id)
                if entry.size not in (None, images.sizes[0]):
                    detail = f"{entry.name} is {list(images.sizes[0])}, the annotation says {list(entry.size)}"
                    raise SampleError(sample_id, "image_size", detail)
        except SampleError as error:
            yield error
            continue
        yield from reader.finish(made, images, {"id": entry.id}, sample_id)


def _drafts(entry: ImageEntry, own: OwnData, sample_id: str) -> Iterator[Draft | SampleError]:
    """The drafts of an image's categories.

    If an annotation is unusable, the question of its category is rejected, because its answer would be incomplete.
    """
    faults: dict[str, tuple[str, Fault]] = {}  # key of the question -> category, fault
    for category, value in entry.boxes:
        # An entry is four numbers or a Fault. A Fault begins with a text, its rule.
        if isinstance(value, tuple) and isinstance(value[0], str):
            faults.setdefault(question_key(category), (category, value))
    for category, (rule, detail) in faults.values():
        yield SampleError(sample_id, rule, f"{category!r:.80}: {detail}")
    sound = [(category, values) for category, values in entry.boxes if question_key(category) not in faults]
    yield from detection_drafts(sound, own, sample_id)


def _read(path: Path, schema: Schema) -> DetectionFile:
    """Read the three arrays of a file, and count every field.

    Raises:
        DataError: the JSON is incomplete, or two images or two categories have the same id, so that annotations are
            ambiguous.
    """
    content = DetectionFile()
    try:
        for item in stream_json(path):
            if item.key not in KNOWN:
                schema.count("top-level fields, not used", item.key or "(a list)")
                continue
            position = content.found[item.key]
            content.found[item.key] += 1
            where = f"{path.name}: {item.key}[{position}]"
            if not isinstance(item.value, dict):
                content.faults.append(("field_type", f"{where} is no object but {item.value!r:.80}"))
                continue
            schema.tally(item.key, item.value, KNOWN[item.key])
            if item.key == "annotations":
                content.annotations.append(_annotation(item.value, where))
            else:
                _keep(content, item.key, item.value, where)
    except ValueError as error:
        raise DataError(str(error)) from error
    return content


def _keep(content: DetectionFile, kind: str, value: Mapping[str, Any], where: str) -> None:
    """Add an image or a category."""
    kept = content.images if kind == "images" else content.categories
    number, name = value.get("id"), value.get("file_name" if kind == "images" else "name")
    # bool is a subclass of int in Python, but `true` is not an id.
    if isinstance(number, bool) or not isinstance(number, int | str) or not isinstance(name, str):
        content.faults.append(("field_type", f"{where}: an id and a name are needed, found {dict(value)!r:.120}"))
        return
    if number in kept:
        raise ValueError(f"{where}: field 'id' is {number!r:.80}, as of an earlier record: which one is meant?")
    if kind == "categories":
        kept[number] = name
        return
    # Label Studio writes null for a size that it could not read: the size is then read from the image file.
    size = value.get("width"), value.get("height")
    kept[number] = name, size if all(type(side) is int and side >= 1 for side in size) else None


def _annotation(value: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Returns (image id, category id, four numbers or the problem)."""
    # In CVAT's export, the box of a rotated rectangle is the one before its rotation.
    attributes = value.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, Mapping) else None
    box: Any
    if value.get("iscrowd") or value.get("ignore"):
        box = "crowd", f"{where} is a crowd, or to be ignored"
    elif not value.get("bbox"):
        box = "no_bbox", f"{where} has no bbox"
    elif isinstance(rotation, int | float) and rotation % 360:
        box = "rotated_box", f"{where} is rotated by {rotation} degrees, its bbox is not"
    else:
        try:
            box = read_numbers(value["bbox"], where)
        except SampleError as error:
            box = error.rule, f"{where}: {error.detail}"
    return value.get("image_id"), value.get("category_id"), box


def _entries(file: int, content: DetectionFile, skipped: Counter[str], schema: Schema) -> Iterator[ImageEntry]:
    """The images with annotations, in the order of the file; then one entry for problems that belong to no image."""
    boxes: defaultdict[Any, list[tuple[str, Any]]] = defaultdict(list)
    faults = list(content.faults)
    # 1. Annotations by image. An annotation of an unlisted image becomes a problem of the file.
    for number, (image, category, box) in enumerate(content.annotations):
        has_image = _is_key(image, content.images)
        if not has_image or not _is_key(category, content.categories):
            rule = "unknown_category" if has_image else "unknown_image"
            detail = (
                f"annotations[{number}] has image_id={image!r:.60}, category_id={category!r:.60}, which is not listed"
            )
            faults.append((rule, detail))
            # Its category is unknown, so the answer of any question about this image may be incomplete.
            continue
        # Joined exports of several annotators contain the same box twice.
        entry = content.categories[category], box
        if entry in boxes[image]:
            schema.count("annotations given twice", "counted once")
        else:
            boxes[image].append(entry)
    # 2. Images in the order of the file, so that a rerun gives the same samples.
    entries = Counter(posixpath.normpath(name) for image, (name, _) in content.images.items() if boxes[image])
    for image, (name, size) in content.images.items():
        if size is None:
            schema.count("images without width and height", "the file's own are taken")
        if not boxes[image]:
            skipped["no_box"] += 1
        elif entries[posixpath.normpath(name)] > 1:
            # Each entry may have a part of the boxes, as in joined exports of several annotators.
            faults.append(("repeated_image", f"{name!r:.80} has several ids, one of them is {image!r:.60}"))
        else:
            yield ImageEntry(file, image, name, size, tuple(boxes[image]))
    # 3. One entry without an image passes the problems on, so that they are counted as rejected samples.
    if faults:
        yield ImageEntry(file, "", "", None, (), tuple(faults))


def _is_key(value: Any, known: Mapping[Any, Any]) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and value in known


def _check_boxes(path: Path, entries: Sequence[ImageEntry], folder: ImageFolder, own: OwnData, schema: Schema) -> None:
    """Raise DataError if the boxes of the file contradict pixels, or the box format that the user gives instead."""
    # COCO defines pixels and xywh, so that is the default.
    coordinates = own.box_format or "pixels_xywh"
    # A random part of the boxes, because a file may have millions, and sizes may have to be read from the images.
    drawn: Reservoir[Kept] = Reservoir()
    for entry in entries:
        for _, values in entry.boxes:
            if not isinstance(values[0], str):
                drawn.add(Kept(coordinates, (DraftBox(values, 0),), entry, f"image {entry.id}"))

    def sizes_of(kept: Kept) -> list[Size]:
        return [kept.key.size] if kept.key.size else folder.sizes((kept.key.name,), path.name)

    compare_boxes(path.name, drawn.kept, sizes_of, own, schema)


def _subset(root: Path, path: Path) -> str:
    """ "train" of train/_annotations.coco.json, else the file's own name."""
    if root.is_file():
        return path.stem
    relative = path.relative_to(root)
    if path.stem.startswith("_annotations") and len(relative.parts) > 1:
        return relative.parent.as_posix()
    return relative.with_suffix("").as_posix()
