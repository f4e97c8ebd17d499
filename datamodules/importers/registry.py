"""The sources that can be imported, by name."""

from __future__ import annotations

from types import ModuleType

from datamodules.importers import mgrounding, odinw, refcoco, v3det
from datamodules.importers.own_data import coco, hf, jsonl

VERSION = 2  # raise it when the same files give other samples: finished imports are then made anew


# Published data sets. Each module has annotation_files(root) -> list[Path], which finds what
# scan(root, allow) -> Scan reads, and DEFAULT_SUBSETS, patterns of the subsets meant for training.
PUBLISHED: dict[str, ModuleType] = {"mgrounding": mgrounding, "refcoco": refcoco, "odinw": odinw, "v3det": v3det}
# Forms of a user's own data. The same functions take what the user says of it, an OwnData, as a further argument, and
# root_problems(root, own) -> list[str] says what is wrong with ROOT. Where no subset has a name of DEFAULT_SUBSETS, all
# are taken.
OWN_DATA: dict[str, ModuleType] = {"jsonl": jsonl, "hf": hf, "coco": coco}
SOURCES = PUBLISHED | OWN_DATA
