"""Checks of settings: each problem is one sentence, and all of them are raised together, before weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


class Problems(list[str]):
    """Collects one sentence for each invalid setting; a sentence names the setting, its value and the rule.

    `prefix` is put before each name: "lora." for the settings of one part of a module.

    >>> problems = Problems()
    >>> problems.positive(accumulate=0, max_tokens_per_row=4096)
    >>> problems.require(0 <= 1.5 < 1, "must be in [0, 1)", warmup_fraction=1.5)
    >>> problems.raise_all("CoTSFT")
    ValueError: CoTSFT: accumulate=0 must be greater than 0; warmup_fraction=1.5 must be in [0, 1)
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def require(self, valid: bool, rule: str, **settings: Any) -> None:
        """Add the sentence "name=value, name=value rule" for these `settings`, unless they are `valid`."""
        if not valid:
            shown = ", ".join(f"{self.prefix}{name}={value!r}" for name, value in settings.items())
            self.append(f"{shown}{'' if rule.startswith(':') else ' '}{rule}")

    def positive(self, **settings: float) -> None:
        for name, value in settings.items():
            self.require(value > 0, "must be greater than 0", **{name: value})

    def positive_or_null(self, **settings: float | None) -> None:
        for name, value in settings.items():
            self.require(value is None or value > 0, "must be greater than 0, or null", **{name: value})

    def at_least(self, least: float, **settings: float) -> None:
        for name, value in settings.items():
            self.require(value >= least, f"must be at least {least}", **{name: value})

    def whole(self, least: int, **settings: int) -> None:
        """For settings that no parser has read by their types, such as those in `init_args` of a reward."""
        for name, value in settings.items():
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)  # bool is an int
            self.require(is_whole and value >= least, f"must be a whole number of at least {least}", **{name: value})

    def positive_number(self, **settings: float) -> None:
        """Like `whole`, for finite numbers above 0."""
        for name, value in settings.items():
            valid = is_number(value) and 0 < value < math.inf
            self.require(valid, "must be a finite number greater than 0", **{name: value})

    def one_of(self, known: Collection[Any], **settings: Any) -> None:
        for name, value in settings.items():
            self.require(value in known, f"must be one of {', '.join(map(repr, known))}", **{name: value})

    def raise_all(self, owner: str) -> None:
        """Raise ValueError with every sentence, if there are any. `owner` names whose settings they are.

        Inside `collect_problems` they are added to its list instead, and nothing is raised.
        """
        collected = _collected.get()
        if collected is not None:
            collected += self
        elif self:
            raise ValueError(f"{owner}: {'; '.join(self)}")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number and no bool, which Python counts as an int."""
    return isinstance(value, Real) and not isinstance(value, bool)


@contextmanager
def collect_problems() -> Iterator[list[str]]:
    """Inside this context, `Problems.raise_all` adds its sentences to the yielded list.

    A configuration has several settings objects. Without this, the first object with a problem would stop the program,
    and the user would find only one problem in each run. Objects that are built inside may be invalid, so they must not
    be used if the list is not empty.
    """
    problems: list[str] = []
    token = _collected.set(problems)
    try:
        yield problems
    finally:
        _collected.reset(token)
