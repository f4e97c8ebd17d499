from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention import prefix_attention
from lightning_modules.models.attention.layout import GroupSpan, group_length
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.qwen_vl import LoraSettings, QwenVL

MakeItems = Callable[..., list[EncodedSample]]


def ragged(groups: list[list[int]], seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, 256, (length,), generator=generator) for length in lengths] for lengths in groups]


def plain_log_probs(policy: QwenVL, item: EncodedSample, completion: Tensor, temperature: float) -> Tensor:
    """The slow reference: one row [prompt, completion] through the whole model, pixels and all, with transformers'
    own positions; log-probabilities of the tempered softmax without banned tokens."""
    ids = torch.cat([item.input_ids, completion])[None]
    logits = policy.base(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=item.pixel_values,
        image_grid_thw=item.grid_thw,
        mm_token_type_ids=(ids == policy.image_token_id).int(),
    ).logits[0]
    logits = logits[len(item.input_ids) - 1 : -1] / temperature
    keep = torch.ones(logits.shape[-1], dtype=torch.bool)
    keep[list(policy.banned_token_ids)] = False
    log_probs = logits.masked_fill(~keep, float("-inf")).log_softmax(-1)
    return log_probs[torch.arange(len(completion)), completion]


@pytest.fixture
def policy(tiny_model_dir: Path) -> QwenVL:
    torch.manual_seed(0)
    policy = QwenVL(str(tiny_model_dir), lora=LoraSettings(rank=4, alpha=8), with_reference=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the adapter
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


@pytest.mark.parametrize("max_tokens", [1, 600, 100_000])
def test_packed_log_probs_and_lora_gradients_equal_plain_ones(
    policy: QwenVL, make_items: MakeItems, max_tokens: int
) -> None:
    items = make_items([1, 2, 3, 6])
    completions = ragged([[5, 1, 9], [3], [7, 2], [1, 4]])
    temperature = 0.7
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(sum(len(c) for group in completions for c in group), generator=generator)

    plain = torch.cat(
        [plain_log_probs(policy, i, c, temperature) for i, group in zip(items, completions, strict=True) for c in group]
    )
    (plain * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()

    features = policy.encode_images(items)
    rows = pack_rows(items, completions, max_tokens)
    packed = [policy.token_log_probs(row, features, temperature) for row in rows]
    (torch.cat(packed) * weights).sum().backward()

    torch.testing.assert_close(torch.cat(packed), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([row.targets for row in rows]), torch.cat([c for g in completions for c in g]))
    assert len(expected) == 2 * 2 * 7
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            scale = expected[name].abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_chunked_logits_give_the_same_values_and_gradients(
    policy: QwenVL, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = make_items([2])
    (row,) = pack_rows(items, ragged([[6, 7]]), 10_000)
    features = policy.encode_images(items)
    results = []
    for limit in (1 << 26, 3 * policy.base.config.text_config.vocab_size):
        monkeypatch.setattr("lightning_modules.models.token_log_probs.MAX_LOGITS", limit)
        policy.zero_grad()
        log_probs = policy.token_log_probs(row, features)
        log_probs.sum().backward()
        results.append([log_probs.detach(), *(p.grad.clone() for p in policy.trainable_parameters())])
    torch.testing.assert_close(*results)


def test_gradient_checkpointing_changes_nothing(tiny_model_dir: Path, make_items: MakeItems) -> None:
    items = make_items([2])
    (row,) = pack_rows(items, ragged([[6, 7]]), 10_000)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = QwenVL(str(tiny_model_dir), lora=LoraSettings(rank=4), gradient_checkpointing=checkpointing).train()
        log_probs = policy.token_log_probs(row, policy.encode_images(items))
        log_probs.sum().backward()
        results.append([log_probs.detach(), *(p.grad for p in policy.trainable_parameters())])
    torch.testing.assert_close(*results)


def written_mask(spans: tuple[GroupSpan, ...]) -> Tensor:
    """bool [L, L], True where token i may look at token j: the rule of `SharedPrefixAttention`, word by word."""
    places = [
        (group, completion)
        for group, span in enumerate(spans)
        for completion, length in enumerate((span.prefix, *span.completions))
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [j <= i and group == other and completion in (0, own) for j, (other, completion) in enumerate(places)]
            for i, (group, own) in enumerate(places)
        ]
    )


@pytest.mark.parametrize("query_block", [2, 1000])
def test_attention_by_structure_equals_attention_under_the_mask(
    make_items: MakeItems, monkeypatch: pytest.MonkeyPatch, query_block: int
) -> None:
    monkeypatch.setattr(prefix_attention, "QUERY_BLOCK", query_block)
    (row,) = pack_rows(make_items([1, 2, 1]), ragged([[3, 9, 1], [4], [1]]), 10_000)
    generator = torch.Generator().manual_seed(0)
    length, shapes = row.input_ids.shape[1], ((4, 16), (2, 16), (2, 16))
    tensors = [torch.randn(1, h, length, d, generator=generator, requires_grad=True) for h, d in shapes]
    weights = torch.randn(1, length, 4, 16, generator=generator)
    q, k, v = tensors
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~written_mask(row.spans), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    actual = row.attention(*tensors, scaling=0.3)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_keep_to_the_budget_and_never_split_a_group(make_items: MakeItems) -> None:
    items = make_items([1, 1, 4, 1])
    completions = ragged([[3, 2], [4, 4], [5, 5], [2, 2]])
    lengths = [group_length(*pair) for pair in zip(items, completions, strict=True)]
    budget = lengths[0] + lengths[1]
    assert lengths[2] > budget  # longer than a row may be
    rows = pack_rows(items, completions, budget)
    assert [row.items for row in rows] == [(0, 1), (2,), (3,)]
    assert [row.input_ids.shape[1] for row in rows] == [budget, lengths[2], lengths[3]]
    assert torch.cat([row.completion_index for row in rows]).tolist() == [
        number for number, length in enumerate([3, 2, 4, 4, 5, 5, 2, 2]) for _ in range(length)
    ]


def test_an_empty_completion_takes_no_place(make_items: MakeItems) -> None:
    (row,) = pack_rows(make_items([1]), ragged([[0, 2]]), 10_000)
    assert row.completion_index.tolist() == [1, 1]


def test_a_placeholder_in_a_completion_is_an_ordinary_token(policy: QwenVL, make_items: MakeItems) -> None:
    items = make_items([1])
    completion = torch.tensor([40, policy.image_token_id, 41])
    (row,) = pack_rows(items, [[completion]], 10_000)
    assert len(row.image_token_index(policy.image_token_id)) == len(policy.encode_images(items)[0])
    assert policy.token_log_probs(row, policy.encode_images(items))[[0, 2]].isfinite().all()


def test_unequal_numbers_of_items_and_groups_are_refused(make_items: MakeItems) -> None:
    with pytest.raises(ValueError, match="1 items but completions for 2"):
        pack_rows(make_items([1]), ragged([[1], [1]]), 100)
