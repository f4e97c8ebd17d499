"""Real processes: one starts another and is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import time; from datamodules.processes import end_with_parent; end_with_parent({}); print('up', flush=True)\n"
CHILD += "time.sleep(300)"


def test_it_ends_when_its_parent_is_killed() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD.format('')!r}])"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == "up\n"
        process.kill()
        assert f"process {process.pid}, which started this one, is gone" in process.stderr.read(), "until it has ended"


def test_a_parent_that_was_gone_before_is_noticed_where_its_id_is_given() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    child = CHILD.format(int(gone.stdout))
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run([sys.executable, "-c", child], cwd=ROOT, timeout=120, **streams).returncode == 1


def test_it_lives_as_long_as_its_parent() -> None:
    child = CHILD.format(os.getpid()).replace("300", "2.5")
    assert subprocess.run([sys.executable, "-c", child], cwd=ROOT, timeout=120).returncode == 0
