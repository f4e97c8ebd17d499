"""ODinW: one folder for each data set, with COCO annotations beside the images of each split.

    <root>/<set>[/<variant>]/<split>/annotations_without_background.json
    <root>/<set>/export/<split>_annotations_without_background.json     (pistols, dice, boggleBoards, selfdrivingCar)

ODinW has no questions. Here, each category with exactly one box in an image becomes a question. GLIP, by the authors of
ODinW, reads images as they are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datamodules.importers.reading.coco_annotations import Entry, convert, read_coco, single_box_entries
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.source import Scan

FILE = "annotations_without_background.json"
SPLITS = ("train", "valid", "test", "mini_val")
EXPORTED = {"train": "train", "val": "valid", "test": "test"}  # names of the splits in those four sets
DEFAULT_SUBSETS = ("*/train",)


def annotation_files(root: Path) -> list[Path]:
    """The annotation file of every split below `root`; ValueError if there is none."""
    files = [path for path in sorted(root.rglob(f"*{FILE}")) if _subset(root, path)]
    if not files:
        raise ValueError(f"root={str(root)!r}: no <set>/<{'|'.join(SPLITS)}>/{FILE} in it")
    return files


def scan(root: Path, allow: Sequence[str] = ()) -> Scan:
    """Read all files. Subsets are "<set>[/<variant>]/<split>". Raises ValueError for an unexpected field."""
    schema, skipped = Schema(allow), Counter({"several_boxes": 0, "crowd": 0})
    subsets: dict[str, list[Entry]] = {}
    for path in annotation_files(root):
        subset = _subset(root, path)
        coco = read_coco(path, schema)
        schema.count("categories", f"{subset} {len(coco.categories)}")
        # Image names in the file are relative to the file's folder; in samples they are relative to `root`.
        entries = single_box_entries(coco, "odinw", subset, skipped, f"{path.parent.relative_to(root).as_posix()}/")
        schema.counts["questions"][subset] = len(entries)
        if entries:
            subsets[subset] = entries
    return Scan(subsets, partial(convert, "odinw"), root, schema.report(), dict(skipped), frame="stored")


def _subset(root: Path, path: Path) -> str | None:
    """The subset of a file; None for few-shot files and renamed copies in the same folder."""
    parts = path.relative_to(root).parts
    # The usual layout: the folder has the name of the split.
    if path.name == FILE and len(parts) > 2 and parts[-2] in SPLITS:
        return "/".join(parts[:-1])
    # The layout of the four exported sets: the split is in the file's name.
    split = EXPORTED.get(path.name.removesuffix(f"_{FILE}"))
    if split and len(parts) > 2 and parts[-2] == "export":
        return "/".join((*parts[:-2], split))
    return None
