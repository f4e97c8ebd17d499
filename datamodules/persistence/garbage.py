"""Python's garbage collector, switched off where it only costs time."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside this context.

    For imports of large packages: they make a million objects that all stay. The collector would visit them again and
    again, which took a quarter of the time of importing torch and Lightning.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def end_quickly() -> None:
    """Let this process end without the last collections, whose memory the system takes back in any case.

    After an import of torch they took more than half a second, while the user waits for a message.
    """
    atexit.register(gc.freeze)
