"""Show the progress of long work: a bar in a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

from tqdm import tqdm

from datamodules.persistence.durations import in_words, left_text, stage_prefix

EVERY_SECONDS = 20.0  # between two lines


def has_terminal() -> bool:
    """Whether a bar can be shown. Bars are written to stderr."""
    return sys.stderr.isatty()


def needs_lines() -> bool:
    """Whether nobody sees a bar, or stdout goes to a file (`make pipeline > log`), which then needs lines."""
    return not (sys.stderr.isatty() and sys.stdout.isatty())


class ProgressLines:
    """Prints a line every few seconds until `close`, from a thread of its own.

    A thread, because one batch, the loading of weights, or one answer of a large model may take minutes.

    Args:
        text: makes the line. It is called in the thread.
        every_seconds: seconds between two lines.
    """

    # If several objects are open, only the newest prints: validation inside training, for example.
    _open: ClassVar[list[ProgressLines]] = []
    _last: ClassVar[float] = 0.0  # time of the last line of any object

    def __init__(self, text: Callable[[], str], every_seconds: float = EVERY_SECONDS) -> None:
        self.text, self.every_seconds = text, every_seconds
        self._closed = threading.Event()
        if not self._open:
            ProgressLines._last = time.monotonic()
        self._open.append(self)
        threading.Thread(target=self._work, name="progress lines", daemon=True).start()

    def close(self) -> None:
        """Print no more."""
        self._closed.set()
        if self in self._open:
            self._open.remove(self)

    def say(self) -> None:
        """Print the line now."""
        ProgressLines._last = time.monotonic()
        print(self.text(), flush=True)

    def _work(self) -> None:
        while not self._closed.wait(max(self._last + self.every_seconds - time.monotonic(), 0.05)):
            is_due = time.monotonic() - self._last >= self.every_seconds
            if is_due and self._open[-1:] == [self]:
                self.say()


@contextmanager
def lines_in_stage(is_shown: bool) -> Iterator[None]:
    """In a stage of a pipeline, print lines while nothing else does: at imports, while weights are loaded or saved.

    Args:
        is_shown: False prints nothing, as on all ranks but one.
    """
    if not is_shown or not stage_prefix() or not needs_lines():
        yield
        return
    began = time.monotonic()
    lines = ProgressLines(lambda: f"{stage_prefix()}starting or ending, {in_words(time.monotonic() - began)} so far")
    try:
        yield
    finally:
        lines.close()


class Counted:
    """The progress of work that is counted, such as questions: a bar, or lines. A context manager.

    Args:
        total: number of units.
        title: name of the work.
        unit: name of one unit; its plural ends with "s".
        initial: number of units that were done before.
        note: makes further words for the bar or the line.
        is_stage: whether the stage of a pipeline ends with this work; else it is the part `title` of the stage
            (`Outlook.seconds_left`).
        is_shown: False shows nothing, as on all ranks but one.
    """

    def __init__(
        self,
        total: int,
        title: str,
        unit: str,
        initial: int = 0,
        note: Callable[[], str] = str,
        is_stage: bool = False,
        is_shown: bool = True,
    ) -> None:
        self.total, self.title, self.unit, self.note, self.is_stage = total, title, unit, note, is_stage
        self.count = self._initial = initial
        self._began = time.monotonic()
        self._updates: list[tuple[float, int]] = []  # (time, count) after the first, the last but one, the last update
        self._bar = self._lines = None
        if is_shown and has_terminal():
            self._bar = tqdm(total=total, initial=initial, desc=title, unit=unit, smoothing=0.1, dynamic_ncols=True)
        if is_shown and needs_lines():
            self._lines = ProgressLines(self.line)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            self._lines.close()
            self._lines.say()

    def update(self, count: int = 1) -> None:
        """Add finished units."""
        self.count += count
        self._updates = [*self._updates[:1], *self._updates[1:][-1:], (time.monotonic(), self.count)]
        if self._bar is not None:
            self._bar.set_description(self.title, refresh=False)
            self._bar.set_postfix_str(self.note(), refresh=False)
            self._bar.update(count)

    def make_room(self) -> None:
        """Take the bar away before something else is printed; it comes back with the next update."""
        if self._bar is not None:
            self._bar.clear()

    def line(self) -> str:
        """The line of this moment."""
        spent, done = time.monotonic() - self._began, self.count - self._initial
        parts = [f"{stage_prefix()}{self.title}: {self.count:,} of {self.total:,} {self.unit}s", self.note()]
        if self.count >= self.total:
            parts.append(f"in {in_words(spent)}")
        elif done:
            parts.append(left_text(self._seconds_left(), None if self.is_stage else self.title))
        else:
            parts.append(f"{in_words(spent)} so far")
        return ", ".join(part for part in parts if part)

    def _seconds_left(self) -> float:
        """The seconds that the remaining units take, at the pace of the finished ones.

        Units may be finished by many at once, such as 512 questions, and some of the next ones are in work already. So
        the pace is that between two updates. The first update also holds what was done before, and the warming up.
        """
        (first, before), (last, count), now = self._updates[0], self._updates[-1], time.monotonic()
        rest = self.total - count
        if count == before:
            return (now - self._began) * rest / (count - self._initial)
        pace, newest = (last - first) / (count - before), count - self._updates[-2][1]
        return max(pace * rest - (now - last), pace * (rest - newest))
