"""Values made ahead of their use, by a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()


def _compute_alone() -> None:
    """Let PyTorch's operations in this thread use no further one.

    Each thread has helpers of its own. Once there are more in all than cores, OpenMP lets idle ones sleep instead of
    wait, also those of the training thread, which then has to wake them for every operation.
    """
    torch.get_num_threads()  # reads the common number, which would otherwise be done at the first operation
    torch.set_num_threads(1)


def prefetch(values: Iterable[T], num_ahead: int) -> Iterator[T]:
    """The same values in the same order, of which a thread makes up to `num_ahead` before they are asked for.

    The thread starts with the first value that is asked for. It ends with the last one, with an error of `values`
    (raised here, with its traceback), and when this iterator is closed or collected, which waits for a value half made.
    """
    source = iter(values)
    num_threads = torch.get_num_threads()
    # The thread never waits for room: it is given a task for each place that is free. So it cannot hold up an exit.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=_compute_alone)
    thread = pool.submit(threading.current_thread).result()
    torch.set_num_threads(num_threads)  # for threads to come; of those that there are, each has its own number
    try:
        waiting = deque(pool.submit(next, source, _END) for _ in range(num_ahead))
        while (value := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, source, _END))
            yield value
    finally:
        # The garbage collector may run in the thread itself, which cannot wait for its own end.
        pool.shutdown(wait=threading.current_thread() is not thread, cancel_futures=True)
