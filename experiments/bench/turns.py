"""Stepping a training loop in another process: one command a line on its standard input, one answer a line back.

A contender trains with its own trainer. At the end of every optimizer step the trainer waits at the gate until the
driver asks for the next step. So the steps of two contenders take turns on the same machine and never overlap.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers

MAX_STEPS = 1_000_000  # the driver ends the run, not the trainer
_RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 starts the process's peak of resident memory anew


class Channel:
    """The pipe to the driver. Whatever else a library prints goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read(self) -> dict[str, Any]:
        """The next command; {"do": "quit"} when the driver is gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "quit"}

    def send(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")


class PhaseClock:
    """Wall-clock seconds by phase. A phase inside another is not counted in the outer one.

    `exact` waits for the GPU at every border; otherwise a border is where the CPU passes it. Without a GPU nothing
    differs.
    """

    def __init__(self) -> None:
        self.exact = False
        self.start()

    def start(self) -> None:
        self.totals: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = time.perf_counter()

    def stop(self) -> dict[str, float]:
        self._charge()
        return dict(self.totals)

    def _charge(self) -> None:
        if self.exact:
            synchronize()
        now = time.perf_counter()
        self.totals[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: object, method: str, phase: str | Callable[..., str]) -> None:
        """Count calls of `owner.method` as `phase`, which may depend on the call's arguments."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase if isinstance(phase, str) else phase(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET_PEAK.exists():
        _RESET_PEAK.write_text("5")


def peak_bytes() -> int:
    """Since `reset_peak`: of allocated GPU memory, or of this process's resident memory (where that cannot be reset, of
    the whole process's life)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kibibyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibyte


def release_memory() -> None:
    """Give cached GPU memory back, so that the other contender has room for its turn."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Gate:
    """What a trainer's callback calls: `open` when training starts, `step_done` at the end of every step.

    Both return whether to go on. `answers` maps further commands to functions that make their answers.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.clock = PhaseClock()
        self.answers: dict[str, Callable[[], dict[str, Any]]] = {}
        self.facts: dict[str, Any] = {}  # of the current step, filled in by the contender: tokens, prompts, loss
        self.quit = False
        self._began = self._cpu_began = 0.0

    def open(self) -> bool:
        self.channel.send(ready=True)
        return self._wait()

    def step_done(self) -> bool:
        synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "phases": self.clock.stop()}
        self.channel.send(**times, peak_bytes=peak_bytes(), **self.facts)
        return self._wait()

    def _wait(self) -> bool:
        while True:
            command = self.channel.read()
            if command["do"] == "step":
                self._begin(command["exact"])
                return True
            if command["do"] in ("stop", "quit"):
                self.quit = command["do"] == "quit"
                return False
            if command["do"] == "release":
                release_memory()
                self.channel.send()
            else:
                self.channel.send(**self.answers[command["do"]]())

    def _begin(self, exact: bool) -> None:
        self.facts = {}
        synchronize()
        reset_peak()
        self.clock.exact = exact
        self.clock.start()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()


def serve(train: Callable[[dict[str, Any], Gate], None], **versions: str) -> None:
    """Answer the driver until it leaves. `train` takes {"model", "workload"} and runs a training loop with the gate."""
    channel = Channel()
    channel.send(versions={"torch": torch.__version__, "transformers": transformers.__version__, **versions})
    while True:
        command = channel.read()
        if command["do"] == "quit":
            return
        gate = Gate(channel)
        train(command, gate)
        if gate.quit:
            return
        del gate  # its answers hold the model
        release_memory()
        channel.send(stopped=True)
