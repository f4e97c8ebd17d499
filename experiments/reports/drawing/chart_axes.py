"""Axes with round ticks: which values an axis covers, where it has ticks, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # a step between ticks is one of these, times a power of ten
INTERVALS = 4  # number of steps between ticks, about


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, with ticks at multiples of `step`."""

    low: float
    high: float
    step: float

    def share(self, value: float) -> float:
        """The position of a value: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, text) of each tick, from low to high."""
        # The counts are whole numbers, so that 0.3 is not 0.30000000000000004 and the last tick is not lost.
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [(count * self.step, self._text(count * self.step)) for count in range(first, last + 1)]

    def decimals(self) -> int:
        """The decimals that a tick needs."""
        return next(d for d in range(400) if math.isclose(round(self.step, d), self.step, rel_tol=1e-6))

    def _text(self, value: float) -> str:
        largest = max(abs(self.low), abs(self.high))
        if value and (largest >= 1e6 or largest < 1e-3):
            # As many digits as the value has more than the step, and one for a step of 2.5.
            digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(self.step) + 1e-9) + 1
            mantissa, exponent = f"{value:.{max(digits, 1)}e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:,.{self.decimals()}f}" if value else "0"


def value_axis(values: Sequence[float]) -> Axis:
    """An axis that ends at ticks and covers the values (at least one, all finite).

    It goes below zero only if a value does.
    """
    low, high = min(values), max(values)
    # One value alone has no range, and neither have values that differ by rounding: begin at zero.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    step = round_step((high - low) / INTERVALS)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step)


def step_axis(steps: Sequence[float]) -> Axis:
    """An axis of training steps: it ends at the first and the last step, and its ticks are whole numbers."""
    low, high = min(steps), max(steps)
    if low == high:
        low, high = max(low - 1, 0.0), low + 1
    return Axis(low, high, max(1.0, round_step((high - low) / INTERVALS, high - low < 10 * INTERVALS)))


def round_step(least: float, whole: bool = False) -> float:
    """The smallest round number that is not below `least`; with `whole`, one without decimals."""
    power = 10.0 ** math.floor(math.log10(least))
    steps = (step for step in STEPS if not (whole and step == 2.5))
    return next(step * power for step in steps if step * power >= least * (1 - 1e-9))
