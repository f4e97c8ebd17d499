"""Samples from a DataLoader's worker processes: room in shared memory is checked, and every wait has an end.

A worker hands a sample's pixel values over in shared memory (/dev/shm; Docker gives 64 MB). By itself PyTorch puts them
there in a thread whose failure loses the sample, and the training process then waits for it for ever. Here the worker
puts them there before it gives the sample away, so a failure is handed over like a sample. A worker that is stopped, or
takes too long, is killed. If a worker ends, WorkersFailed names it, the reason and the cure.
"""

from __future__ import annotations

import math
import multiprocessing.queues
import os
import re
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules.persistence.processes import POLL_SECONDS, ChildWatch
from datamodules.persistence.user_error import UserError

SHARED_MEMORY = Path("/dev/shm")
GO_ON = "The same command goes on from the last checkpoint."
LOST_VALUE = 75  # exit code of a worker that could not hand a sample over
END_SECONDS = 2.0  # that a worker has to end by itself
_END = object()


class WorkersFailed(UserError, RuntimeError):
    """Worker processes cannot make samples, or no longer; the message states the reason and the cure."""


class NoRoom(NamedTuple):
    """In place of a sample: its pixel values could not be put into shared memory."""

    num_bytes: int
    reason: str


def in_shared_memory(value: Any) -> Any:
    """`value` with its `pixel_values`, if it has any, moved to shared memory; NoRoom where they have no place."""
    pixels = getattr(value, "pixel_values", None)
    if isinstance(pixels, Tensor):
        try:
            pixels.share_memory_()
        except RuntimeError as error:
            return NoRoom(pixels.nbytes, str(error).splitlines()[0])
    return value


def no_room(number: int, lost: NoRoom) -> WorkersFailed:
    """The error for a sample that worker `number` could not hand over."""
    return WorkersFailed(
        f"worker {number} could not put a sample of {_megabytes(lost.num_bytes)} into shared memory: {lost.reason}.\n"
        f"{SHARED_MEMORY} has {_megabytes(free_bytes() or 0)} free; more files than `ulimit -n` allows have the same"
        f" effect.\n{_cure(2**33)} {GO_ON}"
    )


def free_bytes(folder: Path = SHARED_MEMORY) -> int | None:
    """Free bytes of the folder's filesystem; None if there is no such folder, as on systems other than Linux."""
    if not folder.is_dir():
        return None
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def largest_pixels(encoder: Any) -> int:
    """Bytes of float32 pixel values of the largest sample that `max_prompt_tokens` of a `encoder.Encoder` admits.

    A prompt token stands for merge_size^2 patches, a patch for patch_size^2 pixels in 3 channels of as many frames as
    are joined in time.
    """
    images = encoder.processor.image_processor
    patch_dim = 3 * images.temporal_patch_size * images.patch_size**2
    return encoder.max_prompt_tokens * images.merge_size**2 * patch_dim * torch.float32.itemsize


def check_room(
    num_samples: int, largest: int, measure: Callable[[], int], ranks: int, folder: Path = SHARED_MEMORY
) -> str | None:
    """Whether the samples that workers hold ready fit into shared memory, before any worker is started.

    Args:
        num_samples: samples that are held at once, for each rank.
        largest: bytes of the largest sample that the settings admit.
        measure: gives the mean bytes of a few samples; called only if `num_samples` of the largest do not fit.
        ranks: ranks on this machine.
        folder: where shared memory lies.

    Returns a warning if samples of mean size fit and the largest do not; None if all fit. Raises WorkersFailed if not
    even samples of mean size fit.
    """
    free, most = free_bytes(folder), ranks * num_samples * largest
    if free is None or most <= free:
        return None
    typical = measure()
    needed = ranks * num_samples * typical
    found = f"{folder} has {_megabytes(free)} free"
    held = f"{num_samples} samples" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    if needed > free:
        raise WorkersFailed(
            f"{found}, but the workers (data.num_workers) hold up to {held} in it: about {_megabytes(needed)} of"
            f" {_megabytes(typical)} each.\n{_cure(most)}"
        )
    return (
        f"{found}. The workers hold up to {held} in it: about {_megabytes(needed)} by the first samples, but"
        f" {_megabytes(most)} if all were as long as max_prompt_tokens admits; the run would end there. {_cure(most)}"
    )


class Workers:
    """The values of a dataset in their order, made by worker processes, value k by worker k % num_workers.

    Only one iteration runs at a time.

    Args:
        values: the dataset.
        num_workers: number of processes.
        num_ahead: number of values that are made before they are asked for; at least two for each worker.
        seconds: the longest time that one value may take.
        describe: names value k in messages.
    """

    def __init__(
        self,
        values: IterableDataset,
        num_workers: int,
        num_ahead: int,
        seconds: float,
        describe: Callable[[int], str],
    ) -> None:
        self.num_workers, self.seconds, self.describe = num_workers, seconds, describe
        self._loader = DataLoader(
            values,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_unchanged,
            prefetch_factor=num_ahead_of_each(num_workers, num_ahead),
            worker_init_fn=_end_where_a_value_is_lost,
            # A generator of its own: otherwise each iterator draws a seed from torch's, and a resumed run samples anew.
            generator=torch.Generator(),
        )
        self._processes: list[Any] = []
        self._watch = _Watch([], seconds)
        self._expected = 0  # the value that is waited for

    def __iter__(self) -> Iterator[Any]:
        """Raises WorkersFailed. What encoding itself raises passes through."""
        try:
            iterator = iter(self._loader)
        except OSError as error:  # semaphores lie in shared memory too
            raise WorkersFailed(f"{self.num_workers} workers cannot be started: {error}.\n{_cure(2**33)}") from error
        self._processes, self._expected = list(iterator._workers), 0
        self._watch = _Watch([process.pid for process in self._processes], self.seconds)
        try:
            with self._watch:
                while (value := self._next(iterator)) is not _END:
                    yield value
                    self._expected += 1
        finally:
            iterator._shutdown_workers()  # asks them to end, and waits a little
            self._end()

    def failure(self, error: BaseException, waiting: bool = False) -> WorkersFailed | None:
        """The message for a worker that has ended, if `error` reports one; None for any other error.

        A signal tells the main thread that a worker has ended, so the error may be raised anywhere in training.
        """
        dead = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(error))
        if dead is None:
            return None
        pid = int(dead[1])
        number, code = next(((n, p.exitcode) for n, p in enumerate(self._processes) if p.pid == pid), ("?", None))
        how = self._watch.fate(pid, code)
        if code == LOST_VALUE:
            how = "could not hand a sample over, for the reason that it has printed above"
        lines = [f"worker {number} of {self.num_workers} (process {pid}), which encodes samples, {how}."]
        if waiting:
            lines.append(f"Waited for was {self.describe(self._expected)}, of worker {self._turn()}.")
        cure = "Fewer data.num_workers need less memory; data.num_workers=0 encodes in the training process."
        return WorkersFailed("\n".join([*lines, cure, GO_ON]))

    def _turn(self) -> int:
        return self._expected % self.num_workers

    def _next(self, iterator: Iterator[Any]) -> Any:
        self._watch.expect(self._processes[self._turn()].pid)
        try:
            return next(iterator, _END)
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # by a worker that lives: encoding's own
                raise
            raise self._broken(error) from error
        finally:
            self._watch.expect(None)

    def _broken(self, error: Exception) -> WorkersFailed:
        """For an error of handing over: a worker killed meanwhile causes one before its end is seen."""
        if failed := self.failure(error, waiting=True):
            return failed
        wait([process.sentinel for process in self._processes], timeout=END_SECONDS)
        for process in self._processes:
            if process.exitcode not in (None, 0):
                return self.failure(RuntimeError(f"DataLoader worker (pid {process.pid})"), waiting=True)
        what = self.describe(self._expected)
        return WorkersFailed(
            f"{what} could not be taken from worker {self._turn()}: {error}\n{_cure(2**33)} {GO_ON}",
        )

    def _end(self) -> None:
        """A worker that is stopped or hangs must not outlive its use: this process would wait for it at its own end."""
        for process in self._processes:
            process.join(END_SECONDS)
            process.kill()
            process.join()


class _Watch(ChildWatch):
    """Gives up workers that are stopped, and the one from which a value is expected for longer than `longest`."""

    def __init__(self, pids: list[int], longest: float) -> None:
        super().__init__(lambda: pids)
        self.longest = longest
        self._expected: tuple[int, int] | None = None  # process id, and the number of the look since when
        self._looks = 0

    def expect(self, pid: int | None) -> None:
        self._expected = None if pid is None else (pid, self._looks)

    def look(self) -> None:
        super().look()
        self._looks += 1
        expected = self._expected  # the other thread sets it
        if expected and (self._looks - expected[1]) * POLL_SECONDS > self.longest:
            self.give_up(expected[0], f"gave no sample within data.worker_timeout={self.longest:g} s")


def num_ahead_of_each(num_workers: int, num_ahead: int) -> int:
    """Values that each worker makes ahead, at least two: with one it would idle while that value is taken."""
    return max(2, num_ahead // num_workers)


def _end_where_a_value_is_lost(number: int) -> None:
    """In a worker: end it where PyTorch's sending thread would drop a value that it cannot send."""

    def end(error: Exception, value: Any) -> None:
        print(f"\nworker {number} cannot hand a sample over: {error!r}", file=sys.stderr, flush=True)
        os._exit(LOST_VALUE)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


def _cure(num_bytes: int) -> str:
    size = 2 ** math.ceil(math.log2(max(1.0, num_bytes / 2**30)))
    return (
        f"Give a container more shared memory (docker run --shm-size={size}g, or --ipc=host), or set"
        " data.num_workers=0, which needs none."
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _unchanged(value: Any) -> Any:
    return value
