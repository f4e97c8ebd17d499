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


def prefetch(values: Iterable[T], num_ahead: int) -> Iterator[T]:
    """The same values in the same order, of which a thread makes up to `num_ahead` before they are asked for.

    The thread starts with the first value that is asked for. It ends with the last one, with an error of `values`
    (raised here, with its traceback), and when this iterator is closed or collected, which waits for a value half made.
    """
    source = iter(values)
    # The thread never waits for room: it is given a task for each place that is free. So it cannot hold up an exit.
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
    """Let PyTorch's operations in this thread, a new one, take no further thread.

    With OpenMP each thread has helpers of its own. Once there are more in all than cores, idle ones sleep instead of
    waiting awake, also those of the training thread, which then has to wake them for every operation.
    """
    if torch.backends.openmp.is_available():
        common = torch.get_num_threads()  # which every new thread takes over
        torch.set_num_threads(1)  # this thread's number, and the common one
        other = threading.Thread(target=torch.set_num_threads, args=(common,))
        other.start()
        other.join()
