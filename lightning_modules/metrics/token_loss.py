"""Loss and accuracy of target tokens by task, for held-out samples in a supervised phase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean of -log p over target tokens, and the share of targets that are the most likely token; T tasks.

    Every state is a sum, so ranks may have different numbers of samples, also none.

        loss_sum [T] float64    sum of -log p over the targets of each task
        correct [T] int64       targets that are the most likely token
        count [T] int64         targets
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, tasks: Sequence[str]) -> None:
        """Args:
        tasks: all tasks that samples may have; equal on all ranks.
        """
        super().__init__()
        self.tasks = tuple(tasks)
        self.add_state("loss_sum", torch.zeros(len(self.tasks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(len(self.tasks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.tasks), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, hits: Tensor, tasks: Tensor) -> None:
        """Add N target tokens.

        Args:
            log_probs: float [N], log p of each target.
            hits: bool [N], whether the target is the most likely token.
            tasks: long [N], the number of each target's task in `self.tasks`.
        """
        self.loss_sum.index_add_(0, tasks, -log_probs.double())
        self.correct.index_add_(0, tasks, hits.long())
        self.count.index_add_(0, tasks, torch.ones_like(tasks))

    def compute(self) -> dict[str, float]:
        """{"loss", "token_accuracy", "loss/<task>"}: over all targets, and over the targets of each task.

        As in training, a long answer has more weight in "loss" than a short one. Tasks without targets are skipped; {}
        without any target.
        """
        sums, counts = self.loss_sum.tolist(), self.count.tolist()
        if not (num_tokens := sum(counts)):
            return {}
        values = {"loss": sum(sums) / num_tokens, "token_accuracy": int(self.correct.sum()) / num_tokens}
        rows = zip(self.tasks, sums, counts, strict=True)
        return values | {f"loss/{task}": total / count for task, total, count in rows if count}
