from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch

from lightning_modules.rollouts.native import cuda_graphs
from lightning_modules.rollouts.native.cuda_graphs import GraphedSteps


def test_a_step_is_captured_on_the_decoders_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere its kernels would run beside the capture, and the graph would be empty."""
    entered: list[torch.device] = []

    @contextmanager
    def device(wanted: torch.device):
        entered.append(wanted)
        yield
        entered.pop()

    monkeypatch.setattr(cuda_graphs.torch, "cuda", MagicMock(device=device))
    second, seen = torch.device("cuda", 1), []
    decoder = MagicMock()
    decoder.rows.device = second
    decoder.step_all = lambda width: seen.append(list(entered))
    GraphedSteps(decoder)(64)
    assert seen and all(found == [second] for found in seen)
