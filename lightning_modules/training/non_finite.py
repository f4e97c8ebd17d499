"""A loss or gradient that is not finite ends the run. The ids of the samples of that update are written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datamodules.persistence.files import write_json

NON_FINITE_FILE = "nonfinite.json"  # in the phase's folder


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite. The error has the number of the update and the ids of its samples."""

    def __init__(self, what: str, step: int, sample_ids: Sequence[str]) -> None:
        super().__init__(f"{what} is not finite at update {step}; samples: {', '.join(sample_ids)}")
        self.what, self.step, self.sample_ids = what, step, list(sample_ids)

    def write(self, folder: Path, rank: int) -> None:
        """Write NON_FINITE_FILE. It stays when the traceback is lost, and names the samples to look at."""
        record = {"what": self.what, "update": self.step, "rank": rank, "sample_ids": self.sample_ids}
        write_json(folder / NON_FINITE_FILE, record)
