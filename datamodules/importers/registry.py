"""The sources that can be imported, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from datamodules.importers import mgrounding, odinw, refcoco, v3det
from datamodules.importers.scan import Scan

VERSION = 1  # raise it when the same files give other samples: finished imports are then made anew


@dataclass(frozen=True)
class Source:
    """`annotation_files` finds what `scan` reads, `default_subsets` are patterns of the subsets meant for training."""

    annotation_files: Callable[[Path], list[Path]]
    scan: Callable[[Path, Sequence[str]], Scan]
    default_subsets: tuple[str, ...]


def _source(module: ModuleType) -> Source:
    return Source(module.annotation_files, module.scan, module.DEFAULT_SUBSETS)


SOURCES = {
    "mgrounding": _source(mgrounding),
    "refcoco": _source(refcoco),
    "odinw": _source(odinw),
    "v3det": _source(v3det),
}
