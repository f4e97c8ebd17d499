"""The sources that can be imported, by name."""

from __future__ import annotations

from types import ModuleType

from datamodules.importers import mgrounding, odinw, refcoco, v3det

VERSION = 2  # raise it when the same files give other samples: finished imports are then made anew


# Each module has annotation_files(root) -> list[Path], which finds what scan(root, allow) -> Scan reads, and
# DEFAULT_SUBSETS, patterns of the subsets meant for training.
SOURCES: dict[str, ModuleType] = {"mgrounding": mgrounding, "refcoco": refcoco, "odinw": odinw, "v3det": v3det}
