"""A part of an import: the source, the folder of its files, and the chosen subsets."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from datamodules.importers.own_data.forms import field_problems
from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.reading.source import DataError, Scan
from datamodules.importers.registry import OWN_DATA, SOURCES
from datamodules.persistence.files import file_sha256, fingerprint
from datamodules.persistence.problems import Problems

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One part of a mixture.

    Args:
        name: name of its folder in `out`
        source: mgrounding, refcoco, odinw, v3det, or the user's own data: jsonl, hf, coco
        root: folder of the source, below the root of the mixture
        subsets: patterns for subsets of the source, or "!pattern" to exclude some; by default the subsets for training
        count: number of samples, drawn at random; by default all
        own: the user's statements about their own data (jsonl, hf, coco)
    """

    name: str
    source: str
    root: str = ""
    subsets: list[str] = field(default_factory=list)
    count: int | None = None
    own: OwnData = field(default_factory=OwnData)

    @property
    def is_own(self) -> bool:
        """Whether its source is a format for the user's own data."""
        return self.source in OWN_DATA

    @property
    def origin(self) -> tuple[str, str, str]:
        """Key of its scan: source, root, and a hash of the user's statements. Parts with equal keys share one scan."""
        return self.source, self.root, fingerprint(asdict(self.own))

    def place(self, root: str) -> Path:
        """The folder of its files. A name on the Hub is kept as it is, without the root of the mixture."""
        below = Path(root, self.root)
        return Path(self.root) if self.source == "hf" and self.root and not below.exists() else below

    def describe(self) -> dict[str, Any]:
        """The fields for the key of a finished import.

        Published sources have no user's statements, so their keys have no such field, and older keys stay valid.
        """
        return {name: value for name, value in asdict(self).items() if name != "own" or self.is_own}

    def problems(self, root: str) -> list[str]:
        """Messages for all invalid settings, each with its field and value."""
        problems = Problems()
        if self.source not in SOURCES:
            return [f"source={self.source!r} is none of {', '.join(SOURCES)}"]
        problems.require(self.count is None or self.count >= 1, "must be at least 1", count=self.count)
        # Own data checks its root itself: the root may be a file, or a name on the Hub.
        if self.is_own:
            problems += self.own.problems() + field_problems(self.own.fields)
            return problems + SOURCES[self.source].root_problems(str(self.place(root)), self.own)
        if self.own != OwnData():
            problems.append(f"own.* is for {', '.join(OWN_DATA)}: source={self.source!r} says all of it itself")
        return problems + ([] if root and Path(root).is_dir() else [f"root={root!r} is no folder"])

    def digests(self, root: str) -> dict[str, str]:
        """{path below the source's folder: sha256} of the annotation files.

        Raises:
            DataError: there is no annotation file.
        """
        place = self.place(root)
        files = self._ask(SOURCES[self.source].annotation_files, place)
        for file in files:
            try:
                str(file).encode("utf-8")
            except UnicodeEncodeError as error:  # the folder of the subset and the sample ids would contain this name
                raise DataError(f"{str(file)!a}: the name of this file is not UTF-8; rename it") from error
        return {_name(file, place): file_sha256(file) for file in files}

    def scan(self, root: str, allow: Sequence[str]) -> Scan:
        """Read and check its annotation files.

        Raises:
            DataError: the files contain something that cannot be imported.
        """
        return self._ask(SOURCES[self.source].scan, self.place(root), allow)

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of the source's module, with the statements if the data are the user's own."""
        try:
            return function(*arguments, *((self.own,) if self.is_own else ()))
        except ValueError as error:  # published sources raise it for every unexpected content
            raise DataError(str(error)) from error

    def chosen(self, scan: Scan) -> list[str]:
        """The subsets that match a pattern of the part and none of its "!patterns".

        Raises:
            DataError: a pattern matches no subset, or no subset is left.
        """
        # 1. The patterns: wanted ones and excluded ones; the source's defaults if none is wanted.
        without = [pattern[1:] for pattern in self.subsets if pattern.startswith("!")]
        patterns_given = [pattern for pattern in self.subsets if not pattern.startswith("!")]
        patterns = patterns_given or SOURCES[self.source].DEFAULT_SUBSETS

        def matching(some: Sequence[str]) -> list[str]:
            return [name for name in scan.subsets if any(fnmatch.fnmatchcase(name, pattern) for pattern in some)]

        named = matching(patterns)
        if not patterns_given and self.is_own:
            named = named or list(scan.subsets)  # no subset has the name of a training split, so all are taken
        # 2. Apply the exclusions.
        names = [name for name in named if name not in matching(without)]
        # 3. A pattern without a match is probably a typing error, so it is refused.
        idle = [pattern for pattern in patterns_given if not fnmatch.filter(scan.subsets, pattern)]
        if idle or not names:
            raise DataError(f"{self.name}: subsets={idle or list(patterns)} match none of {', '.join(scan.subsets)}")
        return names


def _name(file: Path, place: Path) -> str:
    """The path of a file below `place`, or its whole path if it is elsewhere, for example in a cache."""
    return str(file.relative_to(place)) if file.is_relative_to(place) and file != place else str(file)
