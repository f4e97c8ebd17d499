"""V3Det: 13,204 classes in a tree, COCO annotations, image names that begin with `images/`.

    <root>/annotations/v3det_2023_v1_{train,val}.json, v3det_2023_v1_category_tree.json
    <root>/images/<node>/<name>.jpg                                  (or <root>/V3Det/images/…)

V3Det has no questions. Here, each class with exactly one box in an image becomes a question, unless the image also has
a box of a class above or below it in the tree. For example, "fruit" is not asked if the image also has an apple.

For photographs that EXIF rotates, the frame of the boxes is not documented, so these photographs are rejected.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.importers.reading.coco_annotations import convert, read_coco, single_box_entries
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.json_stream import stream_json
from datamodules.importers.reading.source import Scan

PREFIX = "v3det_2023_v1"
SPLITS = ("train", "val")
TREE = f"{PREFIX}_category_tree.json"
DEFAULT_SUBSETS = ("train",)
# Texts about a class; no question uses them.
_CATEGORY = dict.fromkeys(("name_zh", "cat_info", "cat_info_gpt", "cat_info_gpt4", "cat_info_gpt4v"), object)
_MORE = {"categories": _CATEGORY | dict.fromkeys(("novel", "exemplar_image"), object)}


def annotation_files(root: Path) -> list[Path]:
    """The files of the tree and of the existing splits; ValueError without the tree or without any split."""
    folder = root / "annotations"
    splits = [path for path in (folder / f"{PREFIX}_{split}.json" for split in SPLITS) if path.is_file()]
    if not splits or not (folder / TREE).is_file():
        raise ValueError(f"root={str(root)!r}: annotations/{TREE} and {PREFIX}_<{'|'.join(SPLITS)}>.json are needed")
    return [folder / TREE, *splits]


def scan(root: Path, allow: Sequence[str] = ()) -> Scan:
    """Read all files. Subsets are "train" and "val". Raises ValueError for unexpected content."""
    schema, skipped = Schema(allow), Counter({"several_boxes": 0, "related_class": 0, "crowd": 0})
    tree, *splits = annotation_files(root)
    related = read_tree(tree)
    subsets = {}
    for path in splits:
        split = path.stem.removeprefix(f"{PREFIX}_")
        coco = read_coco(path, schema, _MORE)
        # For a class outside the tree, related classes are unknown, so its question could have two right answers.
        if missing := [number for number in coco.categories if number not in related]:
            raise ValueError(f"{tree}: field 'categoryid2treeid' lacks the class ids {missing[:5]} of {path.name}")
        subsets[split] = single_box_entries(coco, "v3det", split, skipped, related=related)
        schema.counts["questions"][split] = len(subsets[split])
    # Some copies have a folder V3Det above images/.
    image_root = root / "V3Det" if (root / "V3Det" / "images").is_dir() else root
    return Scan(subsets, partial(convert, "v3det"), image_root, schema.report(), dict(skipped))


def read_tree(path: Path) -> Mapping[int, frozenset[int]]:
    """Class id -> the ids of all classes above and below it.

    From `categoryid2treeid` ({class id: node}) and `ancestor2descendant` ({node: [nodes]}). Raises ValueError that
    names the field if one of them is missing or has another format.
    """
    names = ("categoryid2treeid", "ancestor2descendant")
    fields = {item.key: item.value for item in stream_json(path) if item.key in names}
    # 1. The classes of each node.
    nodes, below = (_field(path, fields, name) for name in names)
    classes: defaultdict[str, set[int]] = defaultdict(set)
    for number, node in nodes.items():
        if not number.isdecimal() or not isinstance(node, str | int):
            raise ValueError(f"{path}: field 'categoryid2treeid' has {number!r}: {node!r:.100}, no class id and node")
        classes[str(node)].add(int(number))
    # 2. Relations in both directions. A class is not related to itself.
    related: defaultdict[int, set[int]] = defaultdict(set)
    for node, descendants in below.items():
        if not isinstance(descendants, list) or not all(isinstance(name, str | int) for name in descendants):
            raise ValueError(
                f"{path}: field 'ancestor2descendant' has {node!r}: {descendants!r:.100}, no list of nodes"
            )
        for above in classes.get(node, ()):
            for lower in set().union(*(classes.get(str(name), ()) for name in descendants)) - {above}:
                related[above].add(lower)
                related[lower].add(above)
    # 3. Every class gets an entry, so that a class without related classes differs from an unknown class.
    return {number: frozenset(related[number]) for group in classes.values() for number in group}


def _field(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(fields.get(name), dict) or not fields[name]:
        raise ValueError(f"{path}: field {name!r} should be an object with entries, found {fields.get(name)!r:.100}")
    return fields[name]
