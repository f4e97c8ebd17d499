"""RefCOCO, RefCOCO+ and RefCOCOg in their original files (lichengunc/refer): one question per expression.

    <root>/{refcoco,refcoco+,refcocog}/refs(<splitBy>).p, instances.json
    <root>/images/mscoco/images/train2014/COCO_train2014_000000581857.jpg

A reference: {"ref_id", "ann_id", "category_id", "image_id", "file_name", "split", "sent_ids", "sentences": [{"sent_id",
"raw", "sent", "tokens"}]}. Its `file_name` is not the name of the image; the image is found by `image_id`. COCO's boxes
are in stored pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import refuse_repeated
from datamodules.importers.plain_pickle import load_plain_pickle
from datamodules.importers.reading.coco_annotations import Annotation, CocoFile, Entry, convert, read_coco
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.source import Scan

DATASETS = ("refcoco", "refcoco+", "refcocog")
SPLITS = ("train", "val", "test", "testA", "testB")
# One split for each data set. UMD's split of RefCOCOg separates the images of training and test; Google's does not.
DEFAULT_SUBSETS = ("refcoco_unc/train", "refcoco+_unc/train", "refcocog_umd/train")
IMAGES = "images/mscoco/images/train2014"
_REFS = re.compile(r"refs\((.*)\)\.p")
_REF = {
    "ref_id": int,
    "ann_id": int,
    "category_id": int,
    "image_id": int,
    "file_name": str,
    "split": str,
    "sent_ids": list,
    "sentences": list,
}
_SENTENCE = {"sent_id": int, "raw": str, "sent": str, "tokens": list}


def annotation_files(root: Path) -> list[Path]:
    """instances.json and every refs(*).p of each data set that exists; ValueError if there is none."""
    files = []
    for name in DATASETS:
        if refs := sorted((root / name).glob("refs(*).p")):
            files += [root / name / "instances.json", *refs]
    if not files:
        raise ValueError(f"root={str(root)!r}: no {{{','.join(DATASETS)}}}/refs(<splitBy>).p in it")
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ValueError(f"missing beside its refs(*).p: {', '.join(missing)}")
    return files


def scan(root: Path, allow: Sequence[str] = ()) -> Scan:
    """Read all files. Subsets are "<data set>_<splitBy>/<split>". Raises ValueError for unexpected content."""
    schema = Schema(allow)
    subsets: dict[str, list[Entry]] = {}
    # `annotation_files` lists each instances.json before the references that need it.
    coco, boxes = CocoFile(), {}
    for path in annotation_files(root):
        if path.name == "instances.json":
            coco = read_coco(path, schema)
            boxes = {annotation.id: annotation for annotation in coco.annotations}
            continue
        # "refs(unc).p" in refcoco/ gives the name "refcoco_unc".
        name = f"{path.parent.name}_{_REFS.fullmatch(path.name)[1]}"
        refs = load_plain_pickle(path)
        if not isinstance(refs, list) or not refs:
            raise ValueError(f"{path}: a list of references is expected, found {type(refs).__name__} without any")
        known: set[int] = set()
        for number, ref in enumerate(refs):
            _check(schema, ref, f"{path}[{number}]")
            refuse_repeated(ref["ref_id"], known, f"{path}[{number}]", "ref_id")
            known.add(ref["ref_id"])
            subset = f"{name}/{ref['split']}"
            schema.count("references", subset)
            subsets.setdefault(subset, []).extend(_entries(ref, name, coco, boxes, f"{path}[{number}]"))
    return Scan(subsets, partial(convert, "refcoco"), root / IMAGES, schema.report(), frame="stored")


def _entries(
    ref: Mapping[str, Any], name: str, coco: CocoFile, boxes: Mapping[Any, Annotation], where: str
) -> Iterator[Entry]:
    """Make a question for each sentence of a reference."""
    # A reference and its annotation must have the same image; otherwise the two files have different versions.
    box = boxes.get(ref["ann_id"])
    if box is None:
        raise ValueError(f"{where}: field 'ann_id' is {ref['ann_id']}, which instances.json does not list")
    if box.image != ref["image_id"]:
        raise ValueError(f"{where}: field 'image_id' is {ref['image_id']}, but its annotation's is {box.image}")
    image, size = coco.images[box.image]
    for sentence in ref["sentences"]:
        yield Entry(f"{name}/{ref['ref_id']}/{sentence['sent_id']}", "rec", image, size, box.box, sentence["sent"])


def _check(schema: Schema, ref: Any, where: str) -> None:
    schema.check("reference", ref, where, _REF)
    if ref["split"] not in SPLITS:
        raise ValueError(f"{where}: field 'split' is {ref['split']!r}, not one of {', '.join(SPLITS)}")
    for position, sentence in enumerate(ref["sentences"]):
        schema.check("sentence", sentence, f"{where}.sentences[{position}]", _SENTENCE)
