"""Memory allocation on a CPU: keep freed memory in the allocator.

By default glibc returns a large block to the system as soon as it is freed. For the next tensor, the system must
provide and zero every page again. A training step frees and allocates the same sizes again and again, so on a small
model this costs a tenth of the step.
"""

from __future__ import annotations

import ctypes
import functools

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
KEPT = 1 << 30  # number of free bytes that may stay at the top of the heap
LARGEST = 32 << 20  # bytes, the largest value that glibc accepts; larger blocks still go back to the system at once


@functools.cache  # once for each process
def keep_freed_memory() -> bool:
    """Set up the allocator of this process. Returns False if its C library is not glibc; then nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(MMAP_THRESHOLD, LARGEST) == 1 and mallopt(TRIM_THRESHOLD, KEPT) == 1
