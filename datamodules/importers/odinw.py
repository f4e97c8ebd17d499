"""ODinW: a folder for each data set, COCO annotations beside the images of each split.

    <root>/<set>[/<variant>]/<split>/annotations_without_background.json
    <root>/<set>/export/<split>_annotations_without_background.json     (pistols, dice, boggleBoards, selfdrivingCar)

No question comes with it. Here an image is asked for each category of which it holds exactly one box. GLIP, by ODinW's
authors, reads images as they are stored.
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
EXPORTED = {"train": "train", "val": "valid", "test": "test"}  # as those four sets name their splits
DEFAULT_SUBSETS = ("*/train",)


def annotation_files(root: Path) -> list[Path]:
    """Every split's file below `root`; ValueError where there is none."""
    files = [path for path in sorted(root.rglob(f"*{FILE}")) if _subset(root, path)]
    if not files:
        raise ValueError(f"root={str(root)!r}: no <set>/<{'|'.join(SPLITS)}>/{FILE} in it")
    return files


def scan(root: Path, allow: Sequence[str] = ()) -> Scan:
    """Subsets are "<set>[/<variant>]/<split>". Raises ValueError for any surprise."""
    schema, skipped = Schema(allow), Counter({"several_boxes": 0, "crowd": 0})
    subsets: dict[str, list[Entry]] = {}
    for path in annotation_files(root):
        subset = _subset(root, path)
        coco = read_coco(path, schema)
        schema.count("categories", f"{subset} {len(coco.categories)}")
        # Image names in the file are relative to its own folder, those of samples to `root`.
        entries = single_box_entries(coco, "odinw", subset, skipped, f"{path.parent.relative_to(root).as_posix()}/")
        schema.counts["questions"][subset] = len(entries)
        if entries:
            subsets[subset] = entries
    return Scan(subsets, partial(convert, "odinw"), root, schema.report(), dict(skipped), frame="stored")


def _subset(root: Path, path: Path) -> str | None:
    """The file's subset; None for the few-shot and renamed lists that lie beside it."""
    parts = path.relative_to(root).parts
    # The usual layout: the split is the folder's name.
    if path.name == FILE and len(parts) > 2 and parts[-2] in SPLITS:
        return "/".join(parts[:-1])
    # The layout of the four exported sets: the split is in the file's name.
    split = EXPORTED.get(path.name.removesuffix(f"_{FILE}"))
    if split and len(parts) > 2 and parts[-2] == "export":
        return "/".join((*parts[:-2], split))
    return None
