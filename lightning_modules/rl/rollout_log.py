"""The rollout log of a GRPO run: one JSON line per group.

Every rank writes its own file; all files are read as one log.

    {"update": 3, "policy": 3, "batch": 12, "id": "pool/17", "task": "diff",
     "answer": {"image": 1, "box": [...], "label": "ring"},
     "sizes": [[width, height, resized width, resized height], ...], "texts": [G texts], "rewards": [G records],
     "ious": [G numbers], "advantages": [G numbers], "zero_advantage": false}

    {"resumed_at": 12}

"policy" is the number of updates of the policy that has sampled.

The second kind is written when a run resumes from a checkpoint, maybe with another number of ranks. Earlier lines of
batch 12 or later batches are then invalid. A kill may leave an incomplete last line; readers ignore it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.persistence.files import append_text
from datamodules.samples.boxes import image_sizes_to_json

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.encoding.encoder import Batch
    from lightning_modules.rl.rewards.reward_list import Reward
    from lightning_modules.rollouts.base import Rollout

log = logging.getLogger(__name__)

TAIL = 4 * 2**20  # bytes at the end of a file in which the newest groups are looked for


def rollout_records(
    update: int,
    policy: int,
    first_batch: int,
    batches: Sequence[Batch],
    rollouts: Sequence[Sequence[Rollout]],
    rewards: Sequence[Sequence[Reward]],
    advantages: Tensor,
    equal_rewards: Tensor,
) -> list[dict[str, Any]]:
    """One JSON-like record for each of P groups.

    Args:
        update: number of the next optimizer update.
        policy: number of updates of the policy that has sampled.
        first_batch: number of the first of the batches.
        batches: with P prompts together.
        rollouts: P lists of G rollouts.
        rewards: P lists of G rewards.
        advantages: [P, G].
        equal_rewards: bool [P], whether all rewards of a group are equal.
    """
    numbered = [(number, item) for number, batch in enumerate(batches, first_batch) for item in batch.items]
    return [
        {
            "update": update,
            "policy": policy,
            "batch": number,
            "id": item.sample.id,
            "task": item.sample.task,
            "answer": item.sample.to_json()["answer"],
            "sizes": image_sizes_to_json(item.image_sizes),
            "texts": [rollout.text for rollout in rollouts[index]],
            "rewards": [reward.to_json() for reward in rewards[index]],
            "ious": [reward.iou for reward in rewards[index]],
            "advantages": advantages[index].tolist(),
            "zero_advantage": bool(equal_rewards[index]),
        }
        for index, (number, item) in enumerate(numbered)
    ]


class RolloutLog:
    """Appends the groups of one rank's batches; the file is created with the first group.

    The log is only for people; nothing is computed from it. So if a group cannot be written (the disk is full, the
    filesystem is gone), a warning counts it, and training continues.

    Args:
        path: path of the log; with several ranks, each rank writes `<stem>-rank<k>` in the same folder.
        rank: rank of this process.
        world_size: number of ranks.
    """

    def __init__(self, path: str | Path, rank: int = 0, world_size: int = 1) -> None:
        path = Path(path)
        files = [path.with_stem(f"{path.stem}-rank{k}") for k in range(world_size)] if world_size > 1 else [path]
        self.path = files[rank]
        self._left_over = (
            set(_all_files(path)) - set(files) if rank == 0 else set()
        )  # files of ranks that no longer exist
        self._begun = False
        self._num_missing = 0

    def append(self, groups: Iterable[dict[str, Any]]) -> None:
        """Write the groups (at least one) in one write."""
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
        """Record in existing files that only their lines before `batch` are valid."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.path, *self._left_over):
            if file.is_file() and file.stat().st_size > 0:
                # An incomplete last line gets a line end, so that the next line is complete.
                append_text(file, "\n" * _is_cut_short(file) + json.dumps({"resumed_at": batch}) + "\n")
        self._begun = True


@dataclass(frozen=True)
class LoggedGroup:
    """The position of a group's line in a file, and the fields for filtering groups."""

    file: Path
    offset: int  # in bytes
    update: int
    batch: int
    id: str
    task: str
    zero_advantage: bool  # all rewards are equal
    mean_reward: float
    mean_iou: float

    def read(self) -> dict[str, Any]:
        """The whole line."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return json.loads(file.readline())


def read_index(path: str | Path) -> list[LoggedGroup]:
    """Every group of a log once, over all ranks, in the order of batch, rank and line. [] without a log."""
    groups: list[tuple[int, int, LoggedGroup]] = []
    for rank, file in enumerate(_all_files(Path(path))):
        groups += [(group.batch, rank, group) for group in _read_file(file)]
    return [group for _, _, group in sorted(groups, key=lambda entry: entry[:2])]


def read_newest(path: str | Path, count: int, tail: int = TAIL) -> list[LoggedGroup]:
    """The newest groups of a log, the newest first, from the last `tail` bytes of each rank's file.

    So a log of any size is read quickly. Fewer than `count` are returned if these bytes hold fewer.
    """
    found = [group for file in _all_files(Path(path)) for group in _read_file(file, tail)]
    return sorted(found, key=lambda group: group.batch, reverse=True)[:count]


def _read_file(file: Path, tail: int | None = None) -> list[LoggedGroup]:
    """The groups of one rank, in the order of their lines; with `tail`, those in the last bytes of the file."""
    found: dict[tuple[int, str], LoggedGroup] = {}
    for offset, group in _sound_lines(file, tail):
        if "resumed_at" in group:
            # A resumed run repeats the batches since its checkpoint, so their earlier lines are invalid.
            found = {key: earlier for key, earlier in found.items() if key[0] < group["resumed_at"]}
        else:
            key = (group["batch"], group["id"])
            # Logs of earlier versions have no "resumed_at": the last of two lines counts, at the position of the last
            # one.
            found.pop(key, None)
            totals = [reward["total"] for reward in group["rewards"]]
            # Logs of earlier versions have the IoU only as the reward "accuracy".
            ious = group["ious"] if "ious" in group else [reward["accuracy"] for reward in group["rewards"]]
            found[key] = LoggedGroup(
                file=file,
                offset=offset,
                update=group["update"],
                batch=group["batch"],
                id=group["id"],
                task=group.get("task", ""),
                zero_advantage=group.get("zero_advantage", group.get("equal")),  # its name in logs of earlier versions
                mean_reward=sum(totals) / len(totals),
                mean_iou=sum(ious) / len(ious),
            )
    return list(found.values())


def _all_files(path: Path) -> list[Path]:
    """The file of a run with one rank, then the files of all ranks."""
    start = f"{path.stem}-rank"
    found = ((file.stem.removeprefix(start), file) for file in path.parent.glob(f"{start}*{path.suffix}"))
    return [path, *(file for _, file in sorted((int(rank), file) for rank, file in found if rank.isdecimal()))]


def _sound_lines(file: Path, tail: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, record) of the whole lines; with `tail`, of those that begin in the last bytes of the file."""
    if not file.is_file():
        return
    offset = 0 if tail is None else max(0, file.stat().st_size - tail)
    with file.open("rb") as lines:
        if offset:
            # The line that contains the byte before is read to its end; it may be whole, or the rest of a line.
            lines.seek(offset - 1)
            offset += len(lines.readline()) - 1
        for line in lines:
            try:
                group = json.loads(line)
            except ValueError:  # cut by a kill; its batch was sampled again
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
