"""A lock on a folder: one process at a time works in it."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder; yields whether it is held. The system releases it at any exit.

    Ends the program if the lock file cannot be written.

    Args:
        folder: it need not exist; the lock file is beside it.
        say: prints the message that another process holds the lock.
        wait: whether to wait for the other process.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_file(folder).open("w")
    except OSError as error:
        sys.exit(f"{folder} cannot be written: {error}")
    with lock as file:
        held = waited = False
        while not held:
            try:
                # flock belongs to the open file, so the kernel releases it even after a kill; the file itself stays.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if not wait:
                    break
                if not waited:
                    say(f"waiting: another process is working in {folder}")
                waited = True
                time.sleep(1.0)
        yield held


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock. No file is written."""
    file = _lock_file(folder)
    if not file.is_file():
        return False
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"
