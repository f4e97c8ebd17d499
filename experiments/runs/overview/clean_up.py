"""Deleting runs that were moved aside, and old checkpoints of finished runs; only after an answer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.persistence import folder_lock
from experiments.runs import run_identity

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Candidate:
    """A folder or a file that may be deleted, why, and its bytes on the disk."""

    path: Path
    reason: str
    size: int


def find_candidates(folders: Sequence[Path]) -> list[Candidate]:
    """What may be deleted of the runs in these folders."""
    found = []
    for folder in folders:
        if run_identity.is_aside(folder):
            found.append(Candidate(folder, "moved aside", disk_bytes(folder)))
        else:
            found += [Candidate(file, "old checkpoint of a finished run", disk_bytes(file)) for file in _old(folder)]
    # A link may lead to files that another run needs.
    return [candidate for candidate in found if not candidate.path.is_symlink()]


def clean_up(folders: Sequence[Path], is_agreed: bool) -> None:
    """List what may be deleted with the sum of the sizes, ask, and delete it.

    Args:
        folders: those of the runs.
        is_agreed: the user has agreed on the command line; there is no question.

    Ends the program if there is nobody to ask.
    """
    candidates = find_candidates(folders)
    if not candidates:
        print("nothing to delete: no run was moved aside, and no finished run has old checkpoints")
        return
    print("\nthese may be deleted:")
    for candidate in candidates:
        print(f"  {in_gigabytes(candidate.size):>9}  {candidate.path}  ({candidate.reason})")
    total = in_gigabytes(sum(candidate.size for candidate in candidates))
    if not is_agreed and not sys.stdin.isatty():
        sys.exit(f"nothing was deleted ({total} could be): there is no terminal to ask. Add --yes to delete them")
    if not is_agreed and input(f"Delete these {len(candidates)}, {total} in all? [y/N] ").strip().lower() not in (
        "y",
        "yes",
    ):
        print("nothing was deleted")
        return
    freed = sum(_delete(candidate) for candidate in candidates)
    print(f"deleted: {in_gigabytes(freed)}")


def disk_bytes(path: Path) -> int:
    """The bytes that a file, or all files below a folder, take on the disk. Links are not followed."""
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for file in files:
        try:
            total += 0 if file.is_dir() else file.lstat().st_blocks * 512
        except FileNotFoundError:  # a running process has just removed it
            continue
    return total


def in_gigabytes(size: int) -> str:
    """ "17.1 GB", or "3 MB" below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _old(folder: Path) -> list[Path]:
    """The checkpoints of a finished run but for the newest; [] where the user keeps some on purpose.

    The model is merged then. The newest one stays, so that training can still be continued from it.
    """
    if not run_identity.read_marker(folder) or not (folder / "merged").is_dir() or folder_lock.is_locked(folder):
        return []
    if _keeps_some(folder):
        return []
    sound = sorted((folder / CHECKPOINTS).glob("step-*.ckpt"))
    return [*sound[:-1], *sorted((folder / CHECKPOINTS).glob("*.ckpt.damaged*"))]


def _keeps_some(folder: Path) -> bool:
    """Whether the run's configuration asks for checkpoints that are never deleted, or for the best ones."""
    callbacks = run_identity.callback_entries(run_identity.read_settings(folder))
    settings = [callback.get("init_args") or {} for callback in callbacks]
    return any(each.get("keep_every") or each.get("monitor") for each in settings)


def _delete(candidate: Candidate) -> int:
    """Delete it; the freed bytes. A run that has begun since the list was made keeps its files."""
    phase = candidate.path if candidate.path.is_dir() else candidate.path.parents[1]
    with folder_lock.locked(phase, wait=False) as is_held:
        if not is_held:
            print(f"{candidate.path} is kept: a process is working there")
            return 0
        if candidate.path.is_dir():
            shutil.rmtree(candidate.path)
        else:
            candidate.path.unlink()
    return candidate.size
