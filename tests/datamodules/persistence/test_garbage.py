"""The garbage collector is off inside the context, and as before behind it; a process ends without collections."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.persistence.garbage import without_collection

ROOT = Path(__file__).resolve().parents[3]


def test_the_collector_is_off_inside_and_as_before_behind() -> None:
    with pytest.raises(ValueError), without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled(), "it was off before the inner context"
        raise ValueError
    assert gc.isenabled()


def test_a_process_that_ends_quickly_leaves_nothing_to_the_last_collection() -> None:
    code = (
        "import atexit, gc\nfrom datamodules.persistence.garbage import end_quickly\n"
        "atexit.register(lambda: print(len(gc.get_objects())))\nend_quickly()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 100
