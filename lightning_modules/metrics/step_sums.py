"""Named sums over a training step: added up on each rank, and over all ranks in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class StepSums(Metric):
    """The sums of one step over all ranks.

    All sums are in one vector, so one all-reduce is enough. Ranks may have counted different numbers of samples. The
    state is not persistent: it is not saved in checkpoints, and a resumed run starts the step again.

        sums [S] float64    one for each name
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(dist_sync_fn=_all_reduce)
        self.names = tuple(names)
        # float64: counts are exact, and the order of additions changes only the last digits of a sum.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **parts: float) -> None:
        """Add to the sums of these names.

        Raises:
            ValueError: there is no sum with this name.
        """
        if unknown := sorted(parts.keys() - set(self.names)):
            raise ValueError(f"{type(self).__name__} has no sums {unknown}")
        values = [parts.get(name, 0.0) for name in self.names]
        self.sums = self.sums + torch.tensor(values, dtype=torch.float64, device=self.sums.device)

    def compute(self) -> dict[str, float]:
        """All sums by name, over all ranks. All ranks must call this together."""
        return dict(zip(self.names, self.sums.tolist(), strict=True))


def _all_reduce(state: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `state` over ranks, as a list with one entry, because `Metric` adds up a list.

    Metric's default would gather the states of all ranks with three collective operations: a barrier, the shapes, and
    the states.
    """
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]
