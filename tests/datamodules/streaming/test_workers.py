"""Worker processes that cannot allocate, stop, die, hang or lose a sample: each ends in words, none in a wait."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.persistence import processes
from datamodules.samples.rejections import Rejections
from datamodules.streaming import workers
from datamodules.streaming.resumable_loader import BatchLoader, num_samples_held
from datamodules.streaming.stream import ShardStream
from datamodules.streaming.workers import WorkersFailed, check_room
from tests.datamodules.streaming.test_stream import NumberReader

ROOT = Path(__file__).resolve().parents[3]
MEBIBYTE = 2**20
# What the training process prints of it, in a /dev/shm of its own: the substitute for Docker's.
IN_SMALL_SHARED_MEMORY = """
from tests.datamodules.streaming.test_workers import Pixels, make_loader
from datamodules.streaming.workers import WorkersFailed, free_bytes
print(free_bytes(), flush=True)
try:
    print([len(batch) for batch in make_loader(Pixels(num_bytes=2**20))])
except WorkersFailed as error:
    print(error)
"""


@dataclass
class Pixels:
    """Encodes each sample as so many bytes; in a worker no file, nor shared memory, may be larger than `most`."""

    num_bytes: int
    most: int | None = None

    def __call__(self, loaded: Any) -> Any:
        if self.most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.most))
        return SimpleNamespace(sample=loaded.sample, pixel_values=torch.ones(self.num_bytes // 4))


def make_loader(encode: Callable[[Any], Any], num_workers: int = 2, seconds: float = 600.0) -> BatchLoader:
    """12 samples in batches of 2, in their order."""
    stream = ShardStream(NumberReader([12]), encode, seed=0, shuffle_buffer=1)
    stream._order = 0, list(range(12))
    return BatchLoader(stream, 2, num_workers, Rejections(), seconds)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 2.0)


def pids(loader: BatchLoader) -> list[int]:
    return [process.pid for process in loader.workers._processes]


def is_gone(pid: int) -> bool:
    return processes.process_state(pid)[0] in processes.ENDED


def test_a_sample_that_finds_no_shared_memory_ends_the_run_in_words() -> None:
    with pytest.raises(WorkersFailed) as failed:
        list(make_loader(Pixels(2 * MEBIBYTE, most=MEBIBYTE)))
    message = str(failed.value)
    assert "worker 0 could not put a sample of 2 MiB into shared memory" in message and "File too large" in message
    assert "--shm-size=8g" in message and "num_workers=0" in message and len(message.splitlines()) <= 5


def test_pixels_that_find_room_arrive_unchanged() -> None:
    batches = list(make_loader(Pixels(MEBIBYTE)))
    assert len(batches) == 6
    assert all(item.pixel_values.sum() == MEBIBYTE // 4 for batch in batches for item in batch.items)


def may_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no right to mount a small /dev/shm (unshare -m, as root)")
@pytest.mark.parametrize("size", ["512k", "2m", "64k"])
def test_in_a_real_shared_memory_that_is_too_small_it_ends_in_words(size: str) -> None:
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", IN_SMALL_SHARED_MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    free, *message = done.stdout.splitlines()
    assert 0 < int(free) <= 2 * MEBIBYTE
    assert "could not put a sample of 1 MiB into shared memory" in message[0] and "No space left" in message[0]


def test_room_is_compared_with_what_the_workers_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = SimpleNamespace(f_bavail=64, f_frsize=MEBIBYTE)  # Docker's 64 MB
    monkeypatch.setattr(os, "statvfs", lambda folder: stat)

    def check(largest: int, typical: int, ranks: int = 1) -> str | None:
        return check_room(16, largest * MEBIBYTE, lambda: typical * MEBIBYTE, ranks, tmp_path)

    assert check(4, typical=999) is None, "all of the largest fit: none is measured"
    warning = check(400, typical=4)
    assert "has 64 MiB free" in warning and "6,400 MiB if all were as long as" in warning and "--shm-size=8g" in warning
    with pytest.raises(WorkersFailed, match=r"(?s)64 MiB free.*hold up to 16 samples.*80 MiB of 5 MiB each.*shm-size"):
        check(400, typical=5)
    with pytest.raises(WorkersFailed, match="16 samples on each of 4 ranks in it: about 128 MiB"):
        check(400, typical=2, ranks=4)
    monkeypatch.undo()
    assert check_room(16, 2**60, lambda: 2**60, 1, tmp_path / "none") is None, "a system that shares memory otherwise"


def test_samples_held_at_once_are_those_ahead_and_of_two_batches() -> None:
    assert num_samples_held(batch_size=8, num_workers=8) == 16 + 16
    assert num_samples_held(batch_size=2, num_workers=8) == 16 + 4, "each worker holds two"
    assert num_samples_held(batch_size=8, num_workers=3) == 15 + 16


def act(loaded: Any, number: int, action: Callable[[], Any]) -> Any:
    if loaded.sample.id == number:
        action()
    return loaded


def stop_at_five(loaded: Any) -> Any:
    return act(loaded, 5, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def die_at_five(loaded: Any) -> Any:
    return act(loaded, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def leave_at_five(loaded: Any) -> Any:
    return act(loaded, 5, lambda: os._exit(3))


def hang_at_five(loaded: Any) -> Any:
    return act(loaded, 5, lambda: time.sleep(600))


def cannot_be_sent(loaded: Any) -> Any:
    return loaded if loaded.sample.id != 5 else SimpleNamespace(sample=loaded.sample, what=lambda: None)


@pytest.mark.parametrize(
    ("encode", "how"),
    [
        (stop_at_five, "was stopped \\(SIGSTOP\\) for 3 s"),
        (die_at_five, "was killed by signal 9 .*memory is full"),
        (leave_at_five, "ended with exit code 3"),
        (hang_at_five, "gave no sample within data.worker_timeout=3 s"),
        (cannot_be_sent, "could not hand a sample over"),
    ],
)
def test_a_worker_that_gives_nothing_any_more_is_named_with_its_sample(impatient, encode, how: str) -> None:
    loader = make_loader(encode, seconds=3.0)
    seen = []
    with pytest.raises(WorkersFailed, match=how) as failed:
        for batch in loader:
            seen += batch.sample_ids
    message = str(failed.value)
    assert "worker 1 of 2 (process" in message
    # A worker that dies, dies with what it has not yet sent: up to two samples before.
    assert any(f"sample {number} of shard-0.tar" in message for number in (1, 3, 5)), message
    assert seen == list(range(len(seen))) and len(seen) <= 5
    assert "The same command goes on from the last checkpoint." in message and len(message.splitlines()) <= 5
    assert all(map(is_gone, pids(loader)))


def test_what_encoding_itself_raises_is_not_taken_for_a_workers_end() -> None:
    def fail_at_five(loaded: Any) -> Any:
        if loaded.sample.id == 5:
            raise RuntimeError("decoder")
        return loaded

    with pytest.raises(RuntimeError, match=r"(?s)Caught RuntimeError.*decoder") as failed:
        list(make_loader(fail_at_five))
    assert not isinstance(failed.value, WorkersFailed)


def test_a_slow_worker_is_waited_for() -> None:
    def slow(loaded: Any) -> Any:
        return act(loaded, 5, lambda: time.sleep(3))

    assert sum(len(batch) for batch in make_loader(slow, seconds=20.0)) == 12


def test_a_worker_killed_while_training_computes_is_told_in_words() -> None:
    """The system tells the main thread at once, wherever it is."""
    loader = make_loader(lambda loaded: act(loaded, 11, lambda: time.sleep(60)))
    batches = iter(loader)
    next(batches)
    os.kill(pids(loader)[1], signal.SIGKILL)
    with pytest.raises(RuntimeError) as told:
        for _ in range(100):
            time.sleep(0.1)
    failure = loader.workers.failure(told.value)
    assert "worker 1 of 2" in str(failure) and "was killed by signal 9" in str(failure)
    assert loader.workers.failure(ValueError("batch_size=0")) is None
    with pytest.raises(WorkersFailed):
        list(batches)


def test_a_stopped_worker_does_not_hold_up_the_end_of_an_epoch() -> None:
    """This process would wait for it when it ends."""
    loader = make_loader(lambda loaded: act(loaded, 11, lambda: time.sleep(60)))
    batches = iter(loader)
    next(batches)
    os.kill(pids(loader)[1], signal.SIGSTOP)
    batches.close()
    assert all(map(is_gone, pids(loader)))


def test_semaphores_that_cannot_be_made_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workers.DataLoader, "__iter__", refuse)
    with pytest.raises(WorkersFailed, match=r"(?s)2 workers cannot be started: .*Permission denied.*num_workers=0"):
        next(iter(make_loader(Pixels(4))))
