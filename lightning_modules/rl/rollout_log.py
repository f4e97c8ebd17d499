"""The rollouts of a GRPO run on disk: a JSONL line for each group, written by every rank and read as one.

    {"update": 3, "batch": 12, "id": "pool/17", "task": "diff", "answer": {"image": 1, "box": [...], "label": "ring"},
     "sizes": [[width, height, resized width, resized height], ...], "texts": [G texts], "rewards": [G records],
     "advantages": [G numbers], "equal": false}

    {"resumed_at": 12}

The second kind is written where a run goes on from a checkpoint, maybe with other ranks: of the lines above it those of
batch 12 and later do not count any more. A kill may cut the last line short: a reader drops it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.persistence.files import append_text

log = logging.getLogger(__name__)


class RolloutLog:
    """Appends the groups of one rank's batches; the file is made with the first.

    It is to be looked at, and nothing is computed from it: what cannot be written (the disk is full, the filesystem is
    gone) is left out and counted in a warning, and training goes on.
    """

    def __init__(self, path: str | Path, rank: int = 0, world_size: int = 1) -> None:
        path = Path(path)
        files = [path.with_stem(f"{path.stem}-rank{k}") for k in range(world_size)] if world_size > 1 else [path]
        self.path = files[rank]
        self._left_over = set(_all_files(path)) - set(files) if rank == 0 else set()  # of ranks that are no more
        self._begun = False
        self._num_missing = 0

    def append(self, groups: Iterable[dict[str, Any]]) -> None:
        """Write the groups, at least one, in one piece."""
        groups = list(groups)
        try:
            if not self._begun:
                self._begin(groups[0]["batch"])
            append_text(self.path, "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups))
        except OSError as error:
            if self._num_missing == 0:
                log.warning("the rollouts are not logged: %s", error)
            self._num_missing += len(groups)
        else:
            if self._num_missing > 0:
                log.warning("the rollouts are logged again: %d groups are missing in %s", self._num_missing, self.path)
            self._num_missing = 0

    def _begin(self, batch: int) -> None:
        """Say in the files that are there that their lines count up to `batch` only."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.path, *self._left_over):
            if file.is_file() and file.stat().st_size > 0:
                # A line that was cut short becomes one of its own.
                append_text(file, "\n" * _is_cut_short(file) + json.dumps({"resumed_at": batch}) + "\n")
        self._begun = True


@dataclass(frozen=True)
class LoggedGroup:
    """Where the line of one group lies, and what groups are chosen by."""

    file: Path
    offset: int  # in bytes
    update: int
    batch: int
    id: str
    task: str
    equal: bool
    mean_reward: float
    mean_accuracy: float

    def read(self) -> dict[str, Any]:
        """The whole line."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return json.loads(file.readline())


def read_index(path: str | Path) -> list[LoggedGroup]:
    """Every group of a log, of all its ranks, once, by batch, rank and line. [] where there is no log."""
    groups: list[tuple[int, int, LoggedGroup]] = []
    for rank, file in enumerate(_all_files(Path(path))):
        groups += [(group.batch, rank, group) for group in _read_file(file)]
    return [group for _, _, group in sorted(groups, key=lambda entry: entry[:2])]


def _read_file(file: Path) -> list[LoggedGroup]:
    """The groups of one rank, in the order of their lines."""
    found: dict[tuple[int, str], LoggedGroup] = {}
    for offset, group in _sound_lines(file):
        if "resumed_at" in group:
            found = {key: earlier for key, earlier in found.items() if key[0] < group["resumed_at"]}
        else:
            key = (group["batch"], group["id"])
            found.pop(key, None)  # of logs from before there was "resumed_at"; the last line also has the last place
            totals = [reward["total"] for reward in group["rewards"]]
            accuracies = [reward["accuracy"] for reward in group["rewards"]]
            found[key] = LoggedGroup(
                file=file,
                offset=offset,
                update=group["update"],
                batch=group["batch"],
                id=group["id"],
                task=group.get("task", ""),
                equal=group["equal"],
                mean_reward=sum(totals) / len(totals),
                mean_accuracy=sum(accuracies) / len(accuracies),
            )
    return list(found.values())


def _all_files(path: Path) -> list[Path]:
    """Of a run with one rank, then of all ranks there ever were."""
    files = path.parent.glob(f"{path.stem}-rank*{path.suffix}")
    return [path, *sorted(files, key=lambda file: int(file.stem.rpartition("-rank")[2]))]


def _sound_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.is_file():
        return
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                group = json.loads(line)
            except ValueError:  # cut short by a kill; its batch was rolled out again
                group = None
            if group is not None:
                yield offset, group
            offset += len(line)


def _is_cut_short(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
