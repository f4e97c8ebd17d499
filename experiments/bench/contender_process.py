"""One contender as a process: start it, send commands, and wait for answers, at most until a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

OURS = "experiments.bench.our_contender"
MODULES = {"trl": "experiments.bench.trl_contender"}  # contenders that are not this project


class ContenderFailed(RuntimeError):
    """The contender's process ended; the message has the end of its log."""


class OutOfTime(RuntimeError):
    """No answer before the deadline."""


class Contender:
    """A process that trains step by step. It starts at once; `await_greeting` waits until it is ready for commands.

    Args:
        name: "trl"; any other contender is this project.
        python: the interpreter of the environment to use.
        threads: number of threads on the CPU.
        log: file for the output of the process.
        deadline: in seconds of time.monotonic().
    """

    def __init__(self, name: str, python: str, threads: int, log: Path, deadline: float) -> None:
        self.name, self.log, self.deadline = name, log, deadline
        log.parent.mkdir(parents=True, exist_ok=True)
        # No network, and the same number of threads for both contenders.
        own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", MODULES.get(name, OURS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | own,
            )
        self._received = b""  # the beginning of the next answer
        self.versions: dict[str, str] = {}  # library -> version

    def await_greeting(self) -> None:
        """Wait for the first answer of the contender, its versions."""
        self.versions = self.versions or self.read()["versions"]

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.tell(**command)
        return self.read()

    def tell(self, **command: Any) -> None:
        """Send a command; `read` gets its answer later."""
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(self._last_words()) from None

    def read(self) -> dict[str, Any]:
        """The next answer. Raises OutOfTime or ContenderFailed."""
        while not (line := self._next_line()).startswith(b"{"):
            pass  # a line that a library has printed
        return json.loads(line)

    def _next_line(self) -> bytes:
        """The next line of the process's output."""
        # A pipe has no timeout. So `select` waits for data until the deadline, and lines are assembled here.
        while b"\n" not in self._received:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise OutOfTime(f"{self.name} did not answer in time")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise ContenderFailed(self._last_words())
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        """The message for a process that has ended."""
        lines = self.log.read_text(errors="replace").splitlines()
        return f"{self.name} ended; the end of {self.log}:\n" + "\n".join(lines[-20:])

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # closing flushes a command that the process has not read
                pipe.close()
