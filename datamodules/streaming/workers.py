"""Samples from a DataLoader's worker processes: free shared memory is checked, and every wait has a time limit.

A worker passes the pixel values of a sample through shared memory (/dev/shm; Docker's default is 64 MB). PyTorch alone
copies them there in a background thread. If that fails, the sample is lost and the training process waits forever.
Here, the worker copies them before it sends the sample, so an error is sent like a sample. A worker that is stopped or
takes too long is killed. If a worker ends, WorkersFailed names the worker, the reason and the fix.
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
LOST_VALUE = 75  # exit code of a worker that could not send a sample
END_SECONDS = 2.0  # time for a worker to end by itself
_END = object()


class WorkersFailed(UserError, RuntimeError):
    """Worker processes cannot make samples. The message states the reason and the fix."""


class NoRoom(NamedTuple):
    """Replaces a sample whose pixel values did not fit into shared memory."""

    num_bytes: int
    reason: str


def in_shared_memory(value: Any) -> Any:
    """`value` with its `pixel_values`, if it has any, moved to shared memory; NoRoom if they do not fit."""
    pixels = getattr(value, "pixel_values", None)
    if isinstance(pixels, Tensor):
        try:
            pixels.share_memory_()
        except RuntimeError as error:
            return NoRoom(pixels.nbytes, str(error).splitlines()[0])
    return value


def no_room(number: int, lost: NoRoom) -> WorkersFailed:
    """The error for a sample that worker `number` could not send."""
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
    """Size in bytes of the float32 pixel values of the largest sample that the encoder's `max_prompt_tokens` allows.

    A prompt token stands for merge_size^2 patches. A patch has temporal_patch_size frames of patch_size^2 pixels in 3
    channels.
    """
    images = encoder.processor.image_processor
    patch_dim = 3 * images.temporal_patch_size * images.patch_size**2
    return encoder.max_prompt_tokens * images.merge_size**2 * patch_dim * torch.float32.itemsize


def check_room(
    num_samples: int, largest: int, measure: Callable[[], int], ranks: int, folder: Path = SHARED_MEMORY
) -> str | None:
    """Check, before workers start, that the samples which they prepare fit into shared memory.

    Args:
        num_samples: number of samples in shared memory at the same time, per rank.
        largest: size in bytes of the largest sample that the settings allow.
        measure: returns the mean size of a few samples; called only if `num_samples` of the largest samples do not fit.
        ranks: ranks on this machine.
        folder: the folder of shared memory.

    Returns a warning if samples of mean size fit but the largest do not; None if all fit. Raises WorkersFailed if
    samples of mean size do not fit.
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
    """The values of a dataset in order, computed by worker processes. Worker k % num_workers computes value k.

    Only one iteration runs at a time.

    Args:
        values: the dataset.
        num_workers: number of processes.
        num_ahead: number of values that are computed in advance; at least two for each worker.
        seconds: time limit for one value.
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
            # A separate generator. Otherwise each iterator would take a seed from torch's global generator, and a
            # resumed run would sample differently.
            generator=torch.Generator(),
        )
        self._processes: list[Any] = []
        self._watch = _Watch([], seconds)
        self._expected = 0  # number of the value that is waited for

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the values. Raises WorkersFailed. Errors of the encoding itself are passed on."""
        try:
            iterator = iter(self._loader)
        except OSError as error:  # semaphores need shared memory too
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
            if str(error).startswith("Caught "):  # an error of the encoding, from a worker that is still running
                raise
            raise self._broken(error) from error
        finally:
            self._watch.expect(None)

    def _broken(self, error: Exception) -> WorkersFailed:
        """Whether an error while receiving a value comes from a killed worker whose end has not been noticed yet."""
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
        """Kill a worker that is stopped or hangs; otherwise this process would wait for it at exit."""
        for process in self._processes:
            process.join(END_SECONDS)
            process.kill()
            process.join()


class _Watch(ChildWatch):
    """Kills workers that are stopped, and a worker whose value takes longer than `longest`."""

    def __init__(self, pids: list[int], longest: float) -> None:
        super().__init__(lambda: pids)
        self.longest = longest
        # process id, and the number of the check since which it is expected
        self._expected: tuple[int, int] | None = None
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
    """Number of values that each worker computes in advance.

    At least two, because with one it would be idle while that value is received.
    """
    return max(2, num_ahead // num_workers)


def _end_where_a_value_is_lost(number: int) -> None:
    """Ends a worker if PyTorch's sending thread cannot send a value, because PyTorch would silently drop it."""

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
