"""Coefficients of the loss that change while a run goes on: β by a schedule, the entropy's by a controller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.rl.loss_settings import EntropySettings, ScheduleSettings
from lightning_modules.rl.losses import LossTerms


def scheduled(start: float, schedule: ScheduleSettings, update: int, num_updates: int) -> float:
    """The coefficient at update `update` (from 0). It depends on nothing else, so a resumed run needs no state.

    Args:
        start: value at update 0.
        schedule: where it goes, and how.
        update: optimizer updates made before.
        num_updates: of the whole run, for a schedule that names no number itself.
    """
    if schedule.kind == "constant":
        return start
    share = min(update / max(schedule.updates or num_updates, 1), 1.0)
    if schedule.kind == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return start + (schedule.final - start) * share


class EntropyController:
    """The coefficient of the entropy bonus: as set, or held by the entropy of the last update (`EntropySettings`)."""

    def __init__(self, settings: EntropySettings) -> None:
        self.settings = settings
        self._value = settings.coefficient
        self._last = math.inf  # mean entropy of the last update; before the first one no bonus is paid
        self._sums = (0.0, 0)  # Σ entropy and tokens since then, on this rank

    @property
    def coefficient(self) -> float:
        """What the next loss is computed with."""
        target = self.settings.target
        return self._value if target is None or self._last <= target else 0.0

    def add(self, terms: LossTerms) -> None:
        """Count the tokens of one packed row."""
        if terms.entropy_sum is not None:
            self._sums = (self._sums[0] + terms.entropy_sum, self._sums[1] + terms.num_tokens)

    def take_sums(self) -> Sequence[float]:
        """Σ entropy and number of tokens since the last update, on this rank; the next ones start at 0."""
        sums, self._sums = self._sums, (0.0, 0)
        return sums

    def end_update(self, entropy_sum: float, num_tokens: float) -> None:
        """Move the coefficient by one step, by the sums of all ranks. Without a token nothing changes."""
        settings = self.settings
        if settings.target is None or num_tokens == 0:
            return
        self._last = entropy_sum / num_tokens
        step = settings.step if self._last <= settings.target else -settings.step
        self._value = min(max(self._value + step, settings.lowest), settings.highest)

    def state_dict(self) -> dict[str, float]:
        return {"value": self._value, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the end of an update; sums of an open window are dropped, because it is trained on again."""
        self._value, self._last, self._sums = state["value"], state["last"], (0.0, 0)
