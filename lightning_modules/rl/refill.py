"""Refilled dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups that teach nothing are replaced by the groups
of further prompts, until an update has as many informative groups as its window has prompts.

1. The prompts of an accumulation window are sampled together, as always. This is the first round.
2. If informative groups are missing, a further round follows: the window stays open and takes further batches. Their
   number follows from the share of informative groups so far. A round has at most `accumulate` batches, so sampling
   needs no more memory than without refilling.
3. The window closes when it has its number, when the budget is spent, or when the run has no further batch. One policy
   samples all rounds, because weights change only after the last one.

All counts are over all ranks, so that all ranks decide alike. They are computed again when a run resumes, because a
checkpoint goes back to the beginning of an open window: refilling needs no state in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_modules.rl.rollout_batch import PromptGroup


class RefilledWindow:
    """The groups of the open accumulation window. Without a budget it has one round, and keeps all its groups.

    Args:
        accumulate: number of batches of each rank in a window without refilling.
        windows: the budget: the largest number of further batches, as a multiple of `accumulate`; 0 is no refilling.
        rank, world_size: of this process.
        sum_over_ranks: elementwise sum of the same list on every rank.
    """

    def __init__(
        self,
        accumulate: int,
        windows: int,
        rank: int,
        world_size: int,
        sum_over_ranks: Callable[[Sequence[float]], list[float]],
    ) -> None:
        self.accumulate, self.budget = accumulate, accumulate * windows
        self.rank, self.world_size, self.sum_over_ranks = rank, world_size, sum_over_ranks
        self.clear()

    def clear(self) -> None:
        """Begin a window."""
        self.further = 0  # number of further batches that were asked for
        self._groups: list[list[PromptGroup]] = []  # of this rank, for each sampled batch
        self._counts: list[list[int]] = []  # for each sampled batch, the number of groups of each rank
        self._own_prompts = 0  # of the first round
        self._wanted = 0  # the same over all ranks

    @property
    def is_new(self) -> bool:
        """Whether nothing has been sampled yet."""
        return not self._groups

    @property
    def num_batches(self) -> int:
        """The number of batches after which the present round is sampled."""
        return self.accumulate + self.further

    def add(self, by_batch: list[list[PromptGroup]], num_prompts: int) -> None:
        """Add a round. All ranks call this together.

        Args:
            by_batch: for each batch of the round, the groups of this rank.
            num_prompts: number of this rank's prompts in the round.
        """
        if self.budget == 0:
            self._groups += by_batch
            return
        if self.is_new:
            self._own_prompts = num_prompts
            self._wanted = int(self.sum_over_ranks([num_prompts])[0])
        # The other groups are dropped with their image features.
        informative = [[group for group in groups if group.is_informative] for groups in by_batch]
        own = [0] * self.world_size * len(informative)  # zero for all other ranks
        own[self.rank :: self.world_size] = map(len, informative)
        counts = list(map(int, self.sum_over_ranks(own)))
        self._groups += informative
        self._counts += [counts[start : start + self.world_size] for start in range(0, len(counts), self.world_size)]

    def ask_for_more(self, is_last_batch: bool) -> bool:
        """Whether further batches are needed; the next round then begins.

        Args:
            is_last_batch: the run has no further batch.
        """
        missing, left = self._missing(), self.budget - self.further
        if missing == 0 or left == 0 or is_last_batch:
            return False
        found = self._wanted - missing
        expected = math.ceil(missing * len(self._counts) / found) if found else self.accumulate
        self.further += min(expected, self.accumulate, left)
        return True

    def _missing(self) -> int:
        return max(0, self._wanted - sum(map(sum, self._counts)))

    def groups(self) -> list[list[PromptGroup]]:
        """For each batch, the groups of this rank that are trained on.

        All ranks together take the wanted number, in the order of batch and rank. The last round may have found more;
        they are dropped, because after the update another policy would train on them.
        """
        if self.budget == 0:
            return self._groups
        left, taken = self._wanted, []
        for groups, counts in zip(self._groups, self._counts, strict=True):
            taken.append(groups[: max(0, left - sum(counts[: self.rank]))])
            left = max(0, left - sum(counts))
        return taken

    def sums(self) -> dict[str, float]:
        """What this rank adds to the sums of `GRPOMetrics`."""
        if self.budget == 0:
            return {}
        exhausted = self._missing() > 0 and self.further == self.budget
        return {"wanted": self._own_prompts, "refill_exhausted": exhausted, "refillable": 1}
