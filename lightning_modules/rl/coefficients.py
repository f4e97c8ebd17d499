"""Coefficients of the loss that change during training: β by a schedule, the entropy coefficient by a controller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.rl.loss_settings import EntropySettings, ScheduleSettings
from lightning_modules.rl.losses import LossTerms


def scheduled(start: float, schedule: ScheduleSettings, update: int, num_updates: int) -> float:
    """The coefficient at update `update` (from 0). It depends only on the arguments, so a resumed run needs no state.

    Args:
        start: value at update 0.
        schedule: shape, final value and length of the schedule.
        update: number of earlier optimizer updates.
        num_updates: number of updates of the whole run, for a schedule without its own length.
    """
    if schedule.kind == "constant":
        return start
    share = min(update / max(schedule.updates or num_updates, 1), 1.0)
    if schedule.kind == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return start + (schedule.final - start) * share


class EntropyController:
    """The coefficient of the entropy bonus: constant, or controlled by the last entropy (`EntropySettings`)."""

    def __init__(self, settings: EntropySettings) -> None:
        self.settings = settings
        self._value = settings.coefficient
        self._last = math.inf  # mean entropy of the last update; before the first update, there is no bonus
        self._sums = (0.0, 0)  # (Σ entropy, number of tokens) since then, on this rank

    @property
    def coefficient(self) -> float:
        """The coefficient for the next loss."""
        target = self.settings.target
        return self._value if target is None or self._last <= target else 0.0

    def add(self, terms: LossTerms) -> None:
        """Add the entropies of one packed row."""
        if terms.entropy_sum is not None:
            self._sums = (self._sums[0] + terms.entropy_sum, self._sums[1] + terms.num_tokens)

    def take_sums(self) -> Sequence[float]:
        """Σ entropy and number of tokens since the last update, on this rank. The sums are then reset to 0."""
        sums, self._sums = self._sums, (0.0, 0)
        return sums

    def end_update(self, entropy_sum: float, num_tokens: float) -> None:
        """Change the coefficient by one step, from the sums of all ranks. Without tokens, nothing changes."""
        settings = self.settings
        if settings.target is None or num_tokens == 0:
            return
        self._last = entropy_sum / num_tokens
        step = settings.step if self._last <= settings.target else -settings.step
        self._value = min(max(self._value + step, settings.lowest), settings.highest)

    def state_dict(self) -> dict[str, float]:
        return {"value": self._value, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state at the end of an update. Sums of an open window are dropped, because it is repeated."""
        self._value, self._last, self._sums = state["value"], state["last"], (0.0, 0)
