"""Find the checkpoint to resume from: the newest one that is intact. Damaged checkpoints are renamed, never deleted.

A kill never leaves a damaged checkpoint under its final name (see `checkpoints.py`). Broken disks, interrupted copies
and full file servers do.
"""

from __future__ import annotations

import errno
import logging
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch

from callbacks.checkpoints import STEP, RunStopped, newest

log = logging.getLogger(__name__)

DAMAGED = ".damaged"


def damage(file: Path) -> str | None:
    """In words, why a file of `torch.save` is damaged; None if it is intact.

    The file is a zip archive with a checksum (CRC-32) for each member. Checking reads all of it once, in half the time
    that loading takes. Nothing is unpickled here: `torch.load` decides later which content it accepts.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "it is not what torch.save writes"
            if bad := archive.testzip():
                return f"the checksum of {bad} is wrong"
        return _reader_fault(file)
    except FileNotFoundError:
        return "another rank has set it aside"
    except OSError as error:
        if error.errno not in (None, errno.EIO, errno.EINVAL):  # such as a missing permission: the file may be intact
            raise
        return f"it cannot be read: {error}"
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError) as error:
        size = file.stat().st_size
        return f"it has {size:,} bytes and is cut short or changed: {error}" if size else "it is empty"


def _reader_fault(file: Path) -> str | None:
    """The problem that PyTorch's archive reader finds, or None. It checks fields that Python's zipfile ignores."""
    try:
        torch.load(file, mmap=True, weights_only=True)  # mmap: no tensor is read
    except Exception as error:  # an error that is not about the archive comes again when the run loads the file
        return str(error).splitlines()[0][:200] if "PytorchStreamReader" in str(error) else None
    return None


def newest_whole(folder: str | Path, without: Collection[str] = (), keep_aside: bool = True) -> Path | None:
    """The intact checkpoint with the most updates; None if the folder has no checkpoint.

    Damaged checkpoints are skipped with a warning. Every rank calls this.

    Args:
        folder: the folder of the checkpoints.
        without: names of checkpoints that are ignored.
        keep_aside: rename damaged checkpoints to <name>.damaged. Only one rank may do so.

    Raises:
        RunStopped: there are checkpoints, but none is intact. A run that took many hours must not start from the
            beginning without being asked. In this case nothing is renamed.
    """
    found: dict[Path, str | None] = {}  # checked files -> their damage
    # 1. Checkpoints of an interruption: the number of updates stands only in their content, so they must be intact
    # before `newest` may compare them.
    for file in sorted(Path(folder).glob("*.ckpt")):
        if file.name not in without and not file.name.startswith(STEP):
            found[file] = damage(file)
    # 2. From the newest to older ones, until one is intact. Older ones are not read.
    while True:
        damaged = [file for file, fault in found.items() if fault is not None]
        best = newest(folder, {*without, *(file.name for file in damaged)})
        if best is None or best in found:
            break
        found[best] = damage(best)
    # 3. Report the damaged ones.
    if damaged and best is None:
        raise RunStopped(_none_whole(Path(folder), {file.name: found[file] for file in damaged}))
    for file in damaged if keep_aside else ():
        log.warning("%s is damaged: %s. It is kept as %s", file, found[file], _set_aside(file))
    return best


def _none_whole(folder: Path, faults: dict[str, str]) -> str:
    """The message for a folder in which all checkpoints are damaged."""
    reasons = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return (
        f"no checkpoint in {folder} is whole ({reasons}).\n"
        "Put a whole copy of one there under its name, or remove them all: the same command then goes on from the copy,"
        " or trains from the beginning."
    )


def _set_aside(file: Path) -> Path:
    """Rename a damaged checkpoint; returns its new path, or the old one if it cannot be renamed."""
    aside = file.with_name(file.name + DAMAGED)
    while aside.exists():
        aside = aside.with_name(aside.name + "+")
    try:
        return file.rename(aside)
    except OSError as error:
        log.warning("%s cannot be renamed: %s", file, error)
        return file
