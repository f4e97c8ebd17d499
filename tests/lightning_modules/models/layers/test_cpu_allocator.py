from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of making and freeing 16 MB ten times over: before, and after the allocator was told to keep them.
FAULTS = """
import resource, torch
from lightning_modules.models.layers.cpu_allocator import keep_freed_memory

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
kept = keep_freed_memory()
faults()
print(kept, before, faults())
"""


def test_freed_memory_is_not_fetched_anew() -> None:
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, before, after = printed.split()
    if kept == "False":
        pytest.skip("the C library's allocator has no such setting")
    assert int(after) < int(before) / 10
