"""Sources that can be imported, by name."""

from __future__ import annotations

from types import ModuleType

from datamodules.importers import mgrounding, odinw, refcoco, v3det
from datamodules.importers.own_data import coco, hf, jsonl

VERSION = 4  # increase it if the same files now give other samples; finished imports are then repeated


# Published data sets. Each module has annotation_files(root) -> list[Path], which finds what
# scan(root, allow) -> Scan reads, and DEFAULT_SUBSETS, patterns of the subsets meant for training.
PUBLISHED: dict[str, ModuleType] = {"mgrounding": mgrounding, "refcoco": refcoco, "odinw": odinw, "v3det": v3det}
# Formats of the user's own data. The same functions get the user's statements, an OwnData, as a further argument.
# root_problems(root, own) -> list[str] returns the problems of ROOT. If no subset has a name of DEFAULT_SUBSETS, all
# are taken.
OWN_DATA: dict[str, ModuleType] = {"jsonl": jsonl, "hf": hf, "coco": coco}
SOURCES = PUBLISHED | OWN_DATA
