"""Named sums over a training step: added up on each rank, and over all ranks in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class StepSums(Metric):
    """The sums of one step, of all ranks.

    All of them are one vector, so ranks exchange them in one all-reduce, and each rank may have counted another number
    of samples. The state is not persistent: it is in no checkpoint, and a resumed run starts its step anew.

        sums [S] float64    one for each name
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(dist_sync_fn=_all_reduce)
        self.names = tuple(names)
        # float64: counts stay exact, and a sum depends on the order of its parts in the last digits only.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **parts: float) -> None:
        """Add to the sums of these names.

        Raises:
            ValueError: a name that is no sum.
        """
        if unknown := sorted(parts.keys() - set(self.names)):
            raise ValueError(f"{type(self).__name__} has no sums {unknown}")
        values = [parts.get(name, 0.0) for name in self.names]
        self.sums = self.sums + torch.tensor(values, dtype=torch.float64, device=self.sums.device)

    def compute(self) -> dict[str, float]:
        """Every sum by its name, over all ranks, which call this together."""
        return dict(zip(self.names, self.sums.tolist(), strict=True))


def _all_reduce(state: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `state` over ranks, as the one entry of the list that `Metric` adds up. Its own way is to gather the
    states of all ranks: a barrier, their shapes, then the states."""
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]
