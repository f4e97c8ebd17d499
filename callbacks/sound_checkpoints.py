"""The checkpoint that a run goes on from: the newest that is whole. Damaged checkpoints are set aside, never deleted.

A kill leaves no damaged checkpoint under its name (see `checkpoints`); disks, copies and full file servers do.
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
    """Why a file that `torch.save` wrote is not whole, in words; None where it is.

    It is a zip archive with a checksum (CRC-32) of each member: all of it is read once, in half the time that loading
    takes. Whether its pickle may be loaded is not asked here: what `torch.load` refuses to run stays refused.
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
        if error.errno not in (None, errno.EIO, errno.EINVAL):  # as of a missing right: the file may be whole
            raise
        return f"it cannot be read: {error}"
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError) as error:
        size = file.stat().st_size
        return f"it has {size:,} bytes and is cut short or changed: {error}" if size else "it is empty"


def _reader_fault(file: Path) -> str | None:
    """What torch's reader of archives finds, which looks at fields that Python's does not. Reads no tensor."""
    try:
        torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # any fault that is not the archive's is raised again when the run loads it
        return str(error).splitlines()[0][:200] if "PytorchStreamReader" in str(error) else None
    return None


def newest_whole(folder: str | Path, without: Collection[str] = (), keep_aside: bool = True) -> Path | None:
    """The whole checkpoint with the most updates; None where the folder has no checkpoint.

    Damaged checkpoints are passed over with a warning. Every rank looks for itself; only the rank with `keep_aside`
    renames them to <name>.damaged. `without` has names of checkpoints that do not count.

    Raises RunStopped where there are checkpoints but none is whole: a run that took many hours is not started again
    unasked. Nothing is renamed then.
    """
    found: dict[Path, str | None] = {}  # the damage of those that were looked at
    # Checkpoints of an interruption come first: only their content tells their updates, and damage would hide it.
    for file in sorted(Path(folder).glob("*.ckpt")):
        if file.name not in without and not file.name.startswith(STEP):
            found[file] = damage(file)
    while True:
        damaged = [file for file, fault in found.items() if fault is not None]
        best = newest(folder, {*without, *(file.name for file in damaged)})
        if best is None or best in found:
            break
        found[best] = damage(best)
    if damaged and best is None:
        raise RunStopped(_none_whole(Path(folder), {file.name: found[file] for file in damaged}))
    for file in damaged if keep_aside else ():
        log.warning("%s is damaged: %s. It is kept as %s", file, found[file], _set_aside(file))
    return best


def _none_whole(folder: Path, faults: dict[str, str]) -> str:
    """The message that there are only damaged checkpoints."""
    told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return (
        f"no checkpoint in {folder} is whole ({told}).\n"
        "Put a whole copy of one there under its name, or remove them all: the same command then goes on from the copy,"
        " or trains from the beginning."
    )


def _set_aside(file: Path) -> Path:
    """Rename a damaged checkpoint; its new place, or the old one where it cannot be renamed."""
    aside = file.with_name(file.name + DAMAGED)
    while aside.exists():
        aside = aside.with_name(aside.name + "+")
    try:
        return file.rename(aside)
    except OSError as error:
        log.warning("%s cannot be renamed: %s", file, error)
        return file
