"""A refreshed reference is the policy as it was then, in every form that a reference has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL

LORA = LoraSettings(rank=4, alpha=8)
# An adapter in float32 (read by the CPU's own model) and in bfloat16 (by transformers' layers); copies of the model.
FORMS = {
    "adapter": {"lora": LORA},
    "adapter, bfloat16": {"lora": LORA, "dtype": "bfloat16"},
    "whole": {"lora": None},
    "adapter and tower": {"lora": LORA, "freeze_vision": False},
}


def make(folder: Path, form: str) -> QwenVL:
    return QwenVL(str(folder), with_reference=True, **FORMS[form])


def move(policy: QwenVL, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def answers(policy: QwenVL, items, reference: bool = False) -> torch.Tensor:
    (row,) = pack_rows(items, [[torch.arange(20, 29)] for _ in items], 100_000)
    return policy.token_log_probs(row, policy.encode_images(items, reference=reference), reference=reference)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_policy_of_that_moment_and_stays_so(tiny_model_dir, make_items, form: str) -> None:
    policy, items = make(tiny_model_dir, form), make_items([1, 2])
    start = answers(policy, items, reference=True)
    tolerance = {"atol": 0.02, "rtol": 0.02} if "bfloat16" in form else {"atol": 1e-4, "rtol": 1e-4}
    for seed in (1, 2):  # again: what is kept of the last reference must not answer for the next
        move(policy, seed)
        policy.reference.refresh(policy)
        moment = answers(policy, items).detach()
        move(policy, seed + 10)
        reference = answers(policy, items, reference=True)
        torch.testing.assert_close(reference, moment, **tolerance)
        assert (reference - answers(policy, items)).abs().max() > 0.03
    assert not reference.requires_grad and (reference - start).abs().max() > 0.03


@pytest.mark.parametrize("form", FORMS)
def test_another_process_takes_it_over_exactly(tiny_model_dir, make_items, form: str) -> None:
    policy, items = make(tiny_model_dir, form), make_items([1])
    move(policy, 1)
    policy.reference.refresh(policy)
    moment = {name: tensor.clone() for name, tensor in policy.trained_tensors()}
    move(policy, 2)
    other = make(tiny_model_dir, form)
    other.reference.load_state_dict(other, policy.reference.state_dict(policy))
    other.model.load_state_dict(dict(policy.trained_tensors()), strict=False)
    assert torch.equal(answers(other, items, reference=True), answers(policy, items, reference=True))
    if policy.reference_model is None:  # nothing but the adapter is saved
        saved = policy.reference.state_dict(policy)
        assert saved.keys() == moment.keys() and all(torch.equal(saved[name], moment[name]) for name in saved)


@pytest.mark.parametrize("form", ["adapter", "adapter, bfloat16"])
def test_an_answer_between_forward_and_backward_leaves_the_gradient(tiny_model_dir, make_items, form: str) -> None:
    """The adapter's tensors are exchanged while the reference answers, and a graph waits that has saved them."""
    policy, items = make(tiny_model_dir, form), make_items([1])
    policy.reference.refresh(policy)
    move(policy, 1)
    expected = torch.autograd.grad(answers(policy, items).sum(), policy.trainable_parameters())
    log_probs = answers(policy, items)
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters()]
    answers(policy, items, reference=True)
    gradients = torch.autograd.grad(log_probs.sum(), policy.trainable_parameters())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


def test_a_refreshed_reference_has_no_dropout(tiny_model_dir, make_items) -> None:
    """The adapter's dropout is of training; a reference that drew from it would answer otherwise each time."""
    lora = LoraSettings(rank=4, alpha=8, dropout=0.5)
    policy = QwenVL(str(tiny_model_dir), lora=lora, dtype="bfloat16", with_reference=True).train()
    items = make_items([1])
    move(policy, 1)
    policy.reference.refresh(policy)
    first, second = (answers(policy, items, reference=True) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(answers(policy, items), answers(policy, items))


def test_entropies_are_those_of_the_distribution_without_banned_tokens(tiny_model_dir, make_items) -> None:
    policy, items = QwenVL(str(tiny_model_dir), lora=LORA), make_items([1])
    (row,) = pack_rows(items, [[torch.arange(20, 24)]], 100_000)
    features = policy.encode_images(items)
    log_probs, entropies = policy.token_log_probs(row, features, 0.7, with_entropy=True)
    assert torch.equal(log_probs, policy.token_log_probs(row, features, 0.7))
    expected = []
    allowed = [token for token in range(policy.base.lm_head.out_features) if token not in policy.banned_token_ids]
    for position in range(4):  # log p of every token at this place, as targets of rows of their own
        prefix = torch.arange(20, 20 + position)
        rows = pack_rows(items, [[torch.cat([prefix, torch.tensor([token])]) for token in allowed]], 100_000)
        found = torch.cat([policy.token_log_probs(each, features, 0.7).detach() for each in rows])
        found = found.view(len(allowed), position + 1)[:, -1]
        assert found.exp().sum() == pytest.approx(1.0, abs=1e-4)
        expected.append(-(found.exp() * found).sum())
    torch.testing.assert_close(entropies.detach(), torch.stack(expected), atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(entropies.sum(), policy.trainable_parameters()[1])
    assert torch.isfinite(gradient).all() and gradient.any()
