"""Run a training loop in another process step by step: commands on its standard input, answers on its output.

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

MAX_STEPS = 1_000_000  # practically endless: the driver ends the run, not the trainer
_RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of the process's resident memory


class Channel:
    """The pipe to the driver. Everything that libraries print goes to standard error."""

    def __init__(self) -> None:
        # Keep the real standard output for answers, and let file descriptor 1 point to standard error.
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read(self) -> dict[str, Any]:
        """The next command; {"do": "quit"} if the driver is gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "quit"}

    def send(self, **answer: Any) -> None:
        """Send an answer to the driver."""
        self._out.write(json.dumps(answer) + "\n")


class PhaseClock:
    """Measures wall-clock seconds by phase. The time of a phase inside another one counts only for the inner one.

    With `exact`, the clock waits for the GPU at every border between phases. Without it, a border is the moment at
    which the CPU has launched the kernels. Without a GPU, there is no difference.
    """

    def __init__(self) -> None:
        self.exact = False
        self.start()

    def start(self) -> None:
        """Begin a step: all phases at 0."""
        self.totals: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]  # stack of phases; time outside all phases is "other"
        self._since = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """End a step: the seconds by phase."""
        self._charge()
        return dict(self.totals)

    def _charge(self) -> None:
        """Add the time since the last border to the innermost open phase."""
        if self.exact:
            synchronize()
        now = time.perf_counter()
        self.totals[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The code inside this context belongs to the phase `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: object, method: str, phase: str | Callable[..., str]) -> None:
        """Replace `owner.method` by a version that counts as a phase.

        Args:
            owner: an object.
            method: the name of its method.
            phase: name of the phase, or a function that gives the name for the arguments of a call.
        """
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase if isinstance(phase, str) else phase(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def synchronize() -> None:
    """Wait until the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begin a new measurement of peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET_PEAK.exists():
        _RESET_PEAK.write_text("5")


def peak_bytes() -> int:
    """The peak of memory since `reset_peak`: allocated GPU memory, or resident memory of this process without a GPU.

    If resident memory cannot be reset, it is the peak since the process began.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kibibyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibyte


def release_memory() -> None:
    """Return cached GPU memory to the system, so that the other contender has room for its turn."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Gate:
    """Stops a training loop between two steps, until the driver asks for the next one.

    A callback of the trainer calls `open` when training starts and `step_done` at the end of every step. Both return
    whether training goes on.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.clock = PhaseClock()
        self.answers: dict[str, Callable[[], dict[str, Any]]] = {}  # further commands -> functions that answer them
        self.facts: dict[str, Any] = {}  # facts of the current step, set by the contender: tokens, prompts, loss
        self.quit = False  # the driver has left
        self._began = self._cpu_began = 0.0

    def open(self) -> bool:
        """Training starts: report it, and wait for the first command."""
        self.channel.send(ready=True)
        return self._wait()

    def step_done(self) -> bool:
        """A step has ended: send its times, memory and facts, and wait for the next command."""
        synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "phases": self.clock.stop()}
        self.channel.send(**times, peak_bytes=peak_bytes(), **self.facts)
        return self._wait()

    def _wait(self) -> bool:
        """Answer commands until one begins a step (True) or ends training (False)."""
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
        """Begin a step. The clock starts after everything else here."""
        self.facts = {}
        synchronize()
        reset_peak()
        self.clock.exact = exact
        self.clock.start()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()


def serve(train: Callable[[dict[str, Any], Gate], None], **versions: str) -> None:
    """Answer the driver until it leaves.

    Args:
        train: runs a training loop with the gate; its first argument is the command with "model" and "workload".
        versions: versions of further libraries.
    """
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
        del gate  # its answers refer to the model, whose memory must be freed
        release_memory()
        channel.send(stopped=True)
