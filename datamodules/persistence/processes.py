"""Processes that depend on each other: a child ends with its parent, and nobody waits for a child that is stopped."""

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

POLL_SECONDS = 1.0
STOPPED_SECONDS = 30.0  # a process that was stopped (SIGSTOP) for longer is given up
STOPPED = "T"
ENDED = ("Z", "X")  # a killed child stays as a zombie until its parent looks


class ProcessLost(RuntimeError):
    """Another process that this process depends on has died or was given up; the message names it and the reason."""


def end_with_parent(parent: int | None = None, delay: float = 0.0) -> None:
    """From here on this process ends, with status 1, when its parent is gone, also by kill -9; `delay` seconds later.

    parent: its process id, as the parent has given it; multiprocessing's workers know it. Where this process has to ask
    for it itself, a parent that is gone by now is not noticed.
    """
    if parent is None:
        known = multiprocessing.parent_process()
        parent = os.getppid() if known is None else known.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        time.sleep(delay)
        print(f"\nprocess {parent}, which started this one, is gone: it ends too", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def process_state(pid: int) -> tuple[str, int]:
    """Linux' letter for the state of a process ("T": stopped), and the id of its parent; ("X", 0) where it is gone.

    Other systems tell no state: ("?", 0) for every process that is there.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "X", 0
        return "?", 0
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return state, int(parent)


def how_it_ended(exit_code: int | None) -> str:
    """How a multiprocessing process ended, in words; negative exit codes are signals."""
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    usual = {signal.SIGKILL: " (the system does so when memory is full)", signal.SIGBUS: " (as when /dev/shm is full)"}
    return f"was killed by signal {-exit_code}{usual.get(-exit_code, '')}"


class StopClock:
    """How long processes have been stopped, counted in looks, one each POLL_SECONDS.

    A pause of the looking process itself, as by Ctrl-Z, does not count.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = STOPPED_SECONDS if seconds is None else seconds
        self._looks: dict[int, int] = {}

    def fault(self, pid: int, state: str) -> str | None:
        """In words, once the process has been stopped for longer than `seconds`. Call it once a POLL_SECONDS."""
        self._looks[pid] = self._looks.get(pid, 0) + 1 if state == STOPPED else 0
        stopped = self._looks[pid] * POLL_SECONDS
        return f"was stopped (SIGSTOP) for {stopped:.0f} s" if stopped > self.seconds else None


class ChildWatch:
    """`with ChildWatch(pids)`: a thread that kills each child process that is stopped for longer than `seconds`.

    Whoever waits for the child then learns of its end as of any other, instead of waiting for ever. `pids` tells which
    children to look at, each time anew. `faults` holds why a child was killed, by its id.
    """

    def __init__(self, pids: Callable[[], Iterable[int | None]], seconds: float | None = None) -> None:
        self.pids, self.clock = pids, StopClock(seconds)
        self.faults: dict[int, str] = {}
        self._stop = threading.Event()

    def __enter__(self) -> ChildWatch:
        self._thread = threading.Thread(target=self._watch, name="child_watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def fate(self, pid: int | None, exit_code: int | None) -> str:
        """How a child ended, in words: why this watch killed it, else by its exit code."""
        return self.faults.get(pid) or how_it_ended(exit_code)

    def give_up(self, pid: int, fault: str) -> None:
        """Kill a child, and note why."""
        self.faults.setdefault(pid, fault)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def look(self) -> None:
        """Look at every child once, and kill those that have been stopped for too long."""
        for pid in [pid for pid in self.pids() if pid is not None]:
            state, parent = process_state(pid)
            fault = self.clock.fault(pid, state)
            if fault and parent == os.getpid():  # the id may have become another process's
                self.give_up(pid, fault)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()


@contextmanager
def process_pool(processes: int, **settings: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that raises ProcessLost if a worker is stopped or dies.

    settings: arguments of ProcessPoolExecutor.
    """
    pool = ProcessPoolExecutor(processes, **settings)
    with ChildWatch(lambda: tuple(pool._processes or ())) as watch:
        try:
            with pool:
                yield pool
        except BrokenProcessPool as error:
            why = [f"process {pid} {fault}" for pid, fault in watch.faults.items()] or ["one was killed, or is gone"]
            raise ProcessLost(f"{processes} worker processes have ended: {'; '.join(why)}") from error
