"""Detect that GRPO learns nothing: count accumulation windows in a row without an informative group, and find the
reason.

A group is informative if its rewards differ and at least one trained completion has an advantage other than 0. All
counts are over all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_modules.rollouts.base import SamplingSettings
from lightning_modules.training.endings import IdleTooLong

# Name in messages and checkpoints -> name of the sum in `GRPOMetrics`.
COUNTED = {name: name for name in ("groups", "completions", "zero_iou", "right", "truncated", "failed", "left_out")} | {
    "format": "well_formed"
}


class IdleWindows:
    """Counts of the windows since the last window with an informative group."""

    def __init__(self) -> None:
        self.number = 0
        self._counts: Counter[str] = Counter()

    def add(self, sums: Mapping[str, float]) -> None:
        """Count one window. `sums` are `GRPOMetrics.compute` of it, over all ranks."""
        if sums["informative"] > 0:
            self.number, self._counts = 0, Counter()
        else:
            self.number += 1
            self._counts.update({name: int(sums[source]) for name, source in COUNTED.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self._counts = state["number"], Counter(state["counts"])

    def require_fewer_than(self, limit: int | None, sampling: SamplingSettings) -> None:
        """Raises IdleTooLong after `limit` windows or more; None means no limit."""
        if limit is not None and self.number >= limit:
            raise IdleTooLong(
                f"stopped: GRPO learns nothing; {self.explain(sampling)}\n"
                "The same command goes on from the saved checkpoint; "
                f"model.update.max_idle_windows={limit} may be raised"
            )

    def explain(self, sampling: SamplingSettings) -> str:
        """Three lines: why no group of these windows was informative, the fix, and the counts."""
        counts = self._counts
        return (
            f"no group of the last {self.number} windows was informative: in each of {counts['groups']} groups all "
            "completions that are trained on earned the same\n"
            f"{_cause(counts, sampling)}\n"
            f"counted: {counts['completions']} completions; IoU 0 {counts['zero_iou']}, IoU above 0.5 "
            f"{counts['right']}, right format {counts['format']}, cut at the length limit {counts['truncated']}"
        )


def _cause(counts: Mapping[str, int], sampling: SamplingSettings) -> str:
    """Why the rewards in groups are equal, and the fix."""
    total = counts["completions"]
    if counts.get("failed", 0) == total:
        return (
            "no completion could be judged: see the warnings of the reward that fails, such as a judge without a server"
        )
    if counts.get("left_out", 0) == total:
        return (
            "every group has a completion that could not be judged, and is left out: see the warnings of the reward "
            "that fails; a judge with on_failure=zero leaves no group out"
        )
    if counts["truncated"] == total:
        limit = sampling.max_new_tokens
        return f"every completion was cut at rollout.max_new_tokens={limit}: raise it, or take a briefer model"
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
    return (
        f"the completions of a group are alike: raise rollout.temperature={sampling.temperature} or "
        f"rollout.group_size={sampling.group_size}, or take other prompts"
    )
