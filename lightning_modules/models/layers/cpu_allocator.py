"""Memory of a process on a CPU: freed tensors stay with the allocator.

glibc gives large blocks back to the system as soon as they are freed, and every page of the next tensor is then handed
out, and zeroed, anew. A training step frees and asks for the same sizes again and again, so that this costs a tenth of
it on a small model.
"""

from __future__ import annotations

import ctypes
import functools

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt, in malloc.h
KEPT = 1 << 30  # bytes that may lie free at the top of the heap
LARGEST = 32 << 20  # the most that glibc accepts; larger blocks go back to the system at once, as before


@functools.cache  # once for each process
def keep_freed_memory() -> bool:
    """Tell this process's allocator. Whether it could be told: only glibc's can, others do as they did."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(MMAP_THRESHOLD, LARGEST) == 1 and mallopt(TRIM_THRESHOLD, KEPT) == 1
