"""The rollouts of a GRPO run on disk: a JSONL line for each group, written by every rank and read as one.

    {"update": 3, "batch": 12, "id": "pool/17", "task": "diff", "answer": {"image": 1, "box": [...], "label": "ring"},
     "sizes": [[width, height, processed width, processed height], ...], "texts": [G texts], "rewards": [G records],
     "advantages": [G numbers], "equal": false}

A kill may cut the last line short, and a resumed run rolls the batches after its checkpoint out once more: a reader
drops the former and takes the last line of a group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.artefacts import append_text


class RolloutLog:
    """Appends the groups of one rank's batches; the file is made with the first."""

    def __init__(self, path: str | Path, rank: int = 0, world_size: int = 1) -> None:
        path = Path(path)
        self.path = path.with_stem(f"{path.stem}-rank{rank}") if world_size > 1 else path
        self._mended = False

    def append(self, groups: Iterable[dict[str, Any]]) -> None:
        """Write the groups in one piece."""
        text = "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._mended and _is_cut_short(self.path):
            text = "\n" + text  # a half line of its own: the group behind it stays whole
        self._mended = True
        append_text(self.path, text)


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
    path = Path(path)
    found: dict[tuple[int, int, str], LoggedGroup] = {}
    for rank, file in enumerate([path, *_by_rank(path)]):
        for offset, group in _sound_lines(file):
            key = (group["batch"], rank, group["id"])
            found.pop(key, None)  # the last line also has the last place
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
    return [found[key] for key in sorted(found, key=lambda key: key[:2])]


def _by_rank(path: Path) -> list[Path]:
    files = path.parent.glob(f"{path.stem}-rank*{path.suffix}")
    return sorted(files, key=lambda file: int(file.stem.rpartition("-rank")[2]))


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
