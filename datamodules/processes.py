"""A process that does not outlive the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time

POLL_SECONDS = 1.0


def end_with_parent(parent: int | None = None, delay: float = 0.0) -> None:
    """From here on this process ends, with status 1, when its parent is gone, also by kill -9; `delay` seconds later.

    parent: its process id, as the parent has given it; multiprocessing's workers know it. Where this process has to ask
    for it itself, a parent that is gone by now is not noticed.
    """
    if parent is None:
        known = multiprocessing.parent_process()
        parent = os.getppid() if known is None else known.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        time.sleep(delay)
        print(f"\nprocess {parent}, which started this one, is gone: it ends too", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
