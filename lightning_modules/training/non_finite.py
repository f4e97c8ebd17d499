"""A loss or gradient that is not finite ends the run. The ids of the samples of that update are written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.persistence.files import write_json

NON_FINITE_FILE = "nonfinite.json"


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite. The error has the number of the update and the ids of its samples."""

    def __init__(self, what: str, step: int, sample_ids: Sequence[str]) -> None:
        super().__init__(f"{what} is not finite at update {step}; samples: {', '.join(sample_ids)}")
        self.what, self.step, self.sample_ids = what, step, list(sample_ids)


def require_finite(value: Tensor, what: str, folder: str | Path, step: int, rank: int, sample_ids: list[str]) -> None:
    """Check a loss or the norm of a gradient.

    Args:
        value: a scalar tensor.
        what: the name of the value, for the message.
        folder: where NON_FINITE_FILE is written if the value is not finite.
        step: number of the update.
        rank: this process.
        sample_ids: the samples of this update on this rank.

    Raises:
        NonFiniteLoss: the value is NaN or infinite.
    """
    if torch.isfinite(value):
        return
    # The file stays when the traceback is lost, and names the samples to look at.
    record = {"what": what, "update": step, "rank": rank, "sample_ids": sample_ids}
    write_json(Path(folder) / NON_FINITE_FILE, record)
    raise NonFiniteLoss(what, step, sample_ids)
