from __future__ import annotations

import time

import pytest
import torch

from lightning_modules.training.part_clock import PartClock


def test_parts_add_up_until_they_are_taken() -> None:
    clock, now = PartClock(), iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(now))
        for _ in range(3):
            with clock.running(torch.device("cpu")):
                pass
    assert clock.take() == 3.0 and clock.take() == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_work_on_a_gpu_is_measured_there() -> None:
    clock, device = PartClock(), torch.device("cuda")
    with clock.running(device):
        torch.cuda._sleep(10_000_000)  # queued, and not done, when the context ends
    assert clock.take() > 0.0 and clock.take() == 0.0
