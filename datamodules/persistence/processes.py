"""Processes that depend on each other: a child ends with its parent, and nobody waits forever for a stopped child."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datamodules.persistence.user_error import UserError

POLL_SECONDS = 1.0
STOPPED_SECONDS = 30.0  # a process that is stopped (SIGSTOP) for longer is killed
# Letters for process states in /proc/<pid>/stat.
STOPPED = "T"
ENDED = ("Z", "X")  # a killed child stays a zombie ("Z") until its parent waits for it


class ProcessLost(UserError, RuntimeError):
    """A process that this process depends on has died or was killed; the message names the process and the reason."""


def end_with_parent(parent: int | None = None, delay: float = 0.0) -> None:
    """End this process, with status 1, as soon as its parent is gone. This also works if the parent dies by kill -9.

    Args:
        parent: process id of the parent. Workers of multiprocessing know it. Otherwise the parent should pass its id:
            if this process asks the system, it does not notice a parent that has died already.
        delay: seconds between the end of the parent and the end of this process.
    """
    known = multiprocessing.parent_process() if parent is None else None
    if parent is None:
        parent = os.getppid() if known is None else known.pid
    # A fork server stands between a worker and its parent, and lives as long as any worker does.
    by_server = known is not None and os.getppid() != parent

    def watch() -> None:
        # The system gives an orphan another parent, so a changed parent id means that the parent is gone.
        while known.is_alive() if by_server else os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        time.sleep(delay)
        print(f"\nprocess {parent}, which started this one, is gone: it ends too", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def process_state(pid: int) -> tuple[str, int]:
    """(state, parent id) of a process: Linux' letter, such as "T" for stopped; ("X", 0) if the process is gone.

    On systems without /proc, ("?", 0) for every process that exists.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "X", 0
        return "?", 0
    try:
        # The name of the process stands in parentheses and may itself hold some, so fields are read after the last one.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return state, int(parent)


def how_it_ended(exit_code: int | None) -> str:
    """The end of a multiprocessing process in words; a negative exit code is the number of a signal."""
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    usual = {signal.SIGKILL: " (the system does so when memory is full)", signal.SIGBUS: " (as when /dev/shm is full)"}
    return f"was killed by signal {-exit_code}{usual.get(-exit_code, '')}"


class StopClock:
    """Measures how long processes have been stopped.

    It counts checks, one every POLL_SECONDS, and not time: a pause of the checking process itself (Ctrl-Z) must not
    count.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = STOPPED_SECONDS if seconds is None else seconds
        self._looks: dict[int, int] = {}  # process id -> number of checks in a row that found it stopped

    def fault(self, pid: int, state: str) -> str | None:
        """The reason in words if the process has been stopped for too long, else None. Call it every POLL_SECONDS."""
        self._looks[pid] = self._looks.get(pid, 0) + 1 if state == STOPPED else 0
        stopped = self._looks[pid] * POLL_SECONDS
        return f"was stopped (SIGSTOP) for {stopped:.0f} s" if stopped > self.seconds else None


class ChildWatch:
    """Inside `with ChildWatch(pids)`, a thread kills each child process that is stopped for longer than `seconds`.

    Code that waits for the child then gets the usual error of a dead child, instead of waiting forever.

    Args:
        pids: returns the ids of the children; it is called before every check.
        seconds: how long a child may be stopped; None means STOPPED_SECONDS.
    """

    def __init__(self, pids: Callable[[], Iterable[int | None]], seconds: float | None = None) -> None:
        self.pids, self.clock = pids, StopClock(seconds)
        self.faults: dict[int, str] = {}  # process id -> why this watch killed the child
        self._stop = threading.Event()

    def __enter__(self) -> ChildWatch:
        self._thread = threading.Thread(target=self._watch, name="child_watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def fate(self, pid: int | None, exit_code: int | None) -> str:
        """The end of a child in words: the reason why this watch killed it, or the meaning of its exit code."""
        return self.faults.get(pid) or how_it_ended(exit_code)

    def give_up(self, pid: int, fault: str) -> None:
        """Kill a child and remember the reason."""
        self.faults.setdefault(pid, fault)  # before the kill: the waiting thread may ask for the reason at once
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def look(self) -> None:
        """Check every child once, and kill those that have been stopped for too long."""
        for pid in [pid for pid in self.pids() if pid is not None]:
            state, parent = process_state(pid)
            fault = self.clock.fault(pid, state)
            if fault and self.is_child(pid, parent):
                self.give_up(pid, fault)

    def is_child(self, pid: int, parent: int) -> bool:
        """Whether `pid`, a process whose parent is `parent`, is still a child: the system may have reused the id."""
        return parent == os.getpid()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()


class _PoolWatch(ChildWatch):
    """Watches a pool's workers. The parent of a worker may be a fork server's process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        super().__init__(lambda: tuple(pool._processes or ()))  # the pool starts workers as it needs them
        self.pool = pool

    def is_child(self, pid: int, parent: int) -> bool:
        worker = (self.pool._processes or {}).get(pid)
        return super().is_child(pid, parent) or (worker is not None and worker.is_alive())


@contextmanager
def process_pool(processes: int, **settings: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; `settings` are arguments of ProcessPoolExecutor.

    Raises:
        ProcessLost: a worker has died, or was stopped for too long.
    """
    pool = ProcessPoolExecutor(processes, **settings)
    with _PoolWatch(pool) as watch:
        try:
            with pool:
                yield pool
        except BrokenProcessPool as error:
            why = [f"process {pid} {fault}" for pid, fault in watch.faults.items()] or ["one was killed, or is gone"]
            raise ProcessLost(f"{processes} worker processes have ended: {'; '.join(why)}") from error
