"""Real processes: one starts another, and one of them is killed or stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.persistence import processes
from datamodules.persistence.processes import ENDED, ChildWatch, ProcessLost, how_it_ended, process_pool, process_state

ROOT = Path(__file__).resolve().parents[3]
CHILD = "import time; from datamodules.persistence.processes import end_with_parent; end_with_parent({})\n"
CHILD += "print('up', flush=True)\n"
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


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)
    while process_state(process.pid)[0] != "T":
        time.sleep(0.01)


def test_a_child_that_is_stopped_for_too_long_is_killed_and_no_other(sleeper: subprocess.Popen) -> None:
    watch = ChildWatch(lambda: [sleeper.pid, None, os.getpid()], seconds=3.0)
    for _ in range(9):
        watch.look()
    assert watch.faults == {} and sleeper.poll() is None
    stop(sleeper)
    for _ in range(3):
        watch.look()
    assert sleeper.poll() is None, "up to three seconds are a pause"
    watch.look()
    assert sleeper.wait() == -signal.SIGKILL
    assert watch.faults == {sleeper.pid: "was stopped (SIGSTOP) for 4 s"}


def test_a_stopped_process_that_is_no_child_is_left_alone() -> None:
    """The id of a child that has ended may be another's."""
    start = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    start += "print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        watch = ChildWatch(lambda: [pid], seconds=0.0)
        for _ in range(3):
            watch.look()
        assert watch.faults == {} and process_state(pid)[0] not in ENDED
        os.kill(pid, signal.SIGKILL)


def stop_oneself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_oneself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("act", "why"), [(stop_oneself, r"was stopped \(SIGSTOP\)"), (kill_oneself, "one was killed")])
def test_a_pool_whose_worker_gives_nothing_any_more_ends_in_words(monkeypatch, act, why: str) -> None:
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 2.0)
    with pytest.raises(ProcessLost, match=f"2 worker processes have ended: .*{why}"), process_pool(2) as pool:
        list(pool.map(act, range(2)))


def test_the_end_of_a_process_is_told_with_its_usual_cause() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert "signal 9" in how_it_ended(-9) and "memory is full" in how_it_ended(-9)
    assert "/dev/shm" in how_it_ended(-7) and how_it_ended(-15) == "was killed by signal 15"


def test_a_stopped_worker_of_a_fork_server_is_given_up_too(monkeypatch) -> None:
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 2.0)
    context = multiprocessing.get_context("forkserver")
    with (
        pytest.raises(ProcessLost, match=r"was stopped \(SIGSTOP\)"),
        process_pool(2, mp_context=context) as pool,
    ):
        list(pool.map(stop_oneself, range(2)))
