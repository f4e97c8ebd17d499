"""The time that a part of a training step takes on its device, summed over a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PartClock:
    """Sums the seconds of a part of a step. On a GPU they are measured there, by events, and nothing waits for them
    before `take`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measure the work on `device` inside the context."""
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(torch.cuda.current_stream(device))
            yield
            last.record(torch.cuda.current_stream(device))
            self._events.append((first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """The seconds since the last call. On a GPU, waits until the measured work is done."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
