"""Which layers are checkpointed: chosen with a counter in the place of the GPU's allocator, applied to real layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.activation_checkpointing import GIB, ActivationBudget
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL


def budget_of(num_layers: int, layers_of_room: float) -> ActivationBudget:
    """Room for so many layers at 100 tokens of 1,000 bytes each."""
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(num_layers))
    in_use = iter((5_000, 105_000))
    budget = ActivationBudget(layers, layers_of_room * 100_000 / GIB, lambda: next(in_use))
    with budget.row(100):
        for layer in layers:
            layer(torch.zeros(1))
    return budget


def again(budget: ActivationBudget, num_tokens: int) -> list[bool]:
    with budget.row(num_tokens):
        return [layer.gradient_checkpointing for layer in budget.layers]


def test_the_first_row_measures_and_later_ones_fit_the_budget() -> None:
    budget = budget_of(4, layers_of_room=3.5)
    assert [layer.gradient_checkpointing for layer in budget.layers] == [True, True, True, False]
    assert budget.bytes_per_token == 1000
    assert again(budget, 100) == [True, True, False, False]  # two kept, and the room of one that computes again
    assert again(budget, 87) == [False] * 4
    assert again(budget, 1000) == [True] * 4
    assert not budget.layers[-1]._forward_hooks and not budget.layers[-1]._forward_pre_hooks


def test_values_and_gradients_stay_whatever_is_checkpointed(
    tiny_model_dir: Path, make_items: Callable[..., list[EncodedSample]]
) -> None:
    torch.manual_seed(0)
    policy = QwenVL(str(tiny_model_dir), LoraSettings(rank=4), gradient_checkpointing=True, activation_gib=1.0).train()
    items = make_items([2])
    (row,) = pack_rows(items, [[torch.arange(20, 26), torch.arange(30, 33)]], 10_000)
    features = policy.encode_images(items)
    results = []
    for kept in (0, 1, 2):
        policy.zero_grad()
        policy.activations.num_kept = lambda _, kept=kept: kept
        policy.activations.bytes_per_token = 1.0
        with policy.activations.row(1):
            log_probs = policy.token_log_probs(row, features)
        log_probs.sum().backward()
        results.append([log_probs.detach(), *(p.grad.clone() for p in policy.trainable_parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("settings", [{"activation_gib": 4.0}, {"activation_gib": 0, "gradient_checkpointing": True}])
def test_a_budget_without_checkpointing_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="activation_gib"):
        CoTSFT("unread", **settings)
