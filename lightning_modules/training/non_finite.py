"""A loss or gradient that is not finite ends the run, and leaves the ids of the samples that led to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.persistence.files import write_json

NON_FINITE_FILE = "nonfinite.json"


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite, with the update's number and the sample ids that led to it."""

    def __init__(self, what: str, step: int, sample_ids: Sequence[str]) -> None:
        super().__init__(f"{what} is not finite at update {step}; samples: {', '.join(sample_ids)}")
        self.what, self.step, self.sample_ids = what, step, list(sample_ids)


def require_finite(value: Tensor, what: str, folder: str | Path, step: int, rank: int, sample_ids: list[str]) -> None:
    """Raises NonFiniteLoss, with NON_FINITE_FILE in `folder`, if the scalar `value` is NaN or infinite."""
    if torch.isfinite(value):
        return
    record = {"what": what, "update": step, "rank": rank, "sample_ids": sample_ids}
    write_json(Path(folder) / NON_FINITE_FILE, record)
    raise NonFiniteLoss(what, step, sample_ids)
