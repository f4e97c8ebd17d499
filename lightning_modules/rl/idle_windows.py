"""GRPO that learns nothing: windows in a row without an informative group, and why, from the rewards that were counted.

A group is informative if it teaches a preference: its rewards differ, and a completion that is trained on has an
advantage that is not 0. All counts are over all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_modules.rl.metrics import StepSums
from lightning_modules.training.endings import IdleTooLong

COUNTED = ("groups", "completions", "zero_iou", "right", "format", "truncated")  # fields of StepSums


class IdleWindows:
    """Counts of the finished windows since the last one with an informative group. A window that is open counts once it
    is finished: a checkpoint resumes at its start."""

    def __init__(self) -> None:
        self.number = 0
        self._counts: Counter[str] = Counter()
        self._open: Counter[str] = Counter()
        self._open_is_informative = False

    def add(self, sums: StepSums, ends_window: bool) -> None:
        """Count one batch, summed over all ranks; `ends_window` says that it was its window's last."""
        self._open.update({name: int(getattr(sums, name)) for name in COUNTED})
        self._open_is_informative |= sums.informative_groups > 0
        if not ends_window:
            return
        if self._open_is_informative:
            self.number, self._counts = 0, Counter()
        else:
            self.number += 1
            self._counts.update(self._open)
        self._open, self._open_is_informative = Counter(), False

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self._counts = state["number"], Counter(state["counts"])

    def require_fewer_than(self, limit: int | None, max_new_tokens: int, temperature: float) -> None:
        """Raises IdleTooLong after `limit` windows or more; None: no limit."""
        if limit is not None and self.number >= limit:
            raise IdleTooLong(
                f"stopped: GRPO learns nothing; {self.explain(max_new_tokens, temperature)}\n"
                f"The same command goes on from the saved checkpoint; model.max_idle_windows={limit} may be raised"
            )

    def explain(self, max_new_tokens: int, temperature: float) -> str:
        """Why no group of these windows was informative, the cure, and the counts; three lines."""
        counts = self._counts
        return (
            f"no group of the last {self.number} windows was informative: in each of {counts['groups']} groups all "
            "completions that are trained on earned the same\n"
            f"{_cause(counts, max_new_tokens, temperature)}\n"
            f"counted: {counts['completions']} completions; IoU 0 {counts['zero_iou']}, IoU above 0.5 "
            f"{counts['right']}, right format {counts['format']}, cut at the length limit {counts['truncated']}"
        )


def _cause(counts: Mapping[str, int], max_new_tokens: int, temperature: float) -> str:
    """Why the groups are equal, and the cure."""
    total = counts["completions"]
    if counts["truncated"] == total:
        return f"every completion was cut at max_new_tokens={max_new_tokens}: raise it, or take a briefer model"
    if counts["zero_iou"] == total and counts["format"] == 0:
        return (
            "every completion has IoU 0 and none has the format: start from a model that writes it (CoT-SFT), and see "
            "that model, data.style and data.box_format belong together"
        )
    if counts["zero_iou"] == total:
        return (
            "every completion has IoU 0: the prompts are too hard for this model (rejection sampling leaves such "
            "prompts out), or data.box_format is not the model's"
        )
    if counts["right"] == total:
        return "every completion is right (IoU above 0.5): take harder prompts; rejection sampling leaves such ones out"
    if counts["format"] == 0:
        return "no completion has the format: start from a model that writes it (CoT-SFT)"
    return f"the completions of a group are alike: raise temperature={temperature} or group_size, or take other prompts"
