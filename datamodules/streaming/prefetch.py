"""Compute values in a thread before they are used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()


def prefetch(values: Iterable[T], num_ahead: int) -> Iterator[T]:
    """Yields the same values in the same order. A thread computes up to `num_ahead` of them in advance.

    The thread starts at the first `next`. It ends after the last value, after an error in `values` (which is raised
    here with its traceback), and when this iterator is closed or garbage-collected. Closing waits until the current
    value is finished.
    """
    source = iter(values)
    # The thread gets one task for each free place in the queue. So it never blocks on a full queue, and cannot delay
    # the exit.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=_compute_alone)
    thread = pool.submit(threading.current_thread).result()
    try:
        waiting = deque(pool.submit(next, source, _END) for _ in range(num_ahead))
        while (value := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, source, _END))
            yield value
    finally:
        # The garbage collector may run in the thread itself, which cannot wait for its own end.
        pool.shutdown(wait=threading.current_thread() is not thread, cancel_futures=True)


def _compute_alone() -> None:
    """Let PyTorch's operations in this new thread use no further threads.

    OpenMP creates a pool of worker threads for each thread. If all pools together have more threads than there are
    cores, idle workers sleep instead of spinning. Then the training thread would have to wake its workers for every
    operation.
    """
    if torch.backends.openmp.is_available():
        common = torch.get_num_threads()  # every new thread inherits this number
        torch.set_num_threads(1)  # this sets the number of this thread, and also the common number
        other = threading.Thread(target=torch.set_num_threads, args=(common,))
        other.start()
        other.join()
