"""The GPU's attention, run on a CPU. There FlexAttention has no gradient: values are its own, eager and compiled, and
gradients those of a dense attention under the very blocks that it is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention import flex_attention as flex_module
from lightning_modules.models.attention.flex_attention import (
    BLOCK,
    attend_packed,
    compiled_flex,
    padded_length,
    row_block_mask,
)
from lightning_modules.models.attention.layout import GroupSpan
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from tests.lightning_modules.ranks import run_ranks

MakeItems = Callable[..., list[EncodedSample]]
CPU = torch.device("cpu")
ROWS = {
    "one short group": (GroupSpan(5, (3, 1, 7)),),
    "prefixes alone": (GroupSpan(40, ()), GroupSpan(300, ())),
    "ragged groups": (GroupSpan(130, (90, 1, 260)), GroupSpan(17, (2,)), GroupSpan(400, (64, 64, 128))),
    "no padding": (GroupSpan(512, (128, 256)), GroupSpan(64, (64,))),
}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def dense(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, enable_gqa: bool) -> Tensor:
    """What FlexAttention computes: the token rule in partial blocks, everything in full ones, nothing elsewhere."""
    length = block_mask.seq_lengths[0]
    places = torch.arange(length)
    rule = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places)

    def written(counts: Tensor, indices: Tensor) -> Tensor:
        matrix = torch.zeros(length // BLOCK, length // BLOCK, dtype=torch.bool)
        for q, n in enumerate(counts[0, 0].tolist()):
            matrix[q, indices[0, 0, q, :n].long()] = True
        return matrix.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    partial = written(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = written(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    sees = full | (partial & rule)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scale, enable_gqa=enable_gqa)


def operands(spans: tuple[GroupSpan, ...]) -> list[Tensor]:
    length = sum(span.prefix + sum(span.completions) for span in spans)
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 16), (2, 16), (2, 16))
    return [torch.randn(1, heads, length, width, generator=generator, requires_grad=True) for heads, width in shapes]


@pytest.mark.parametrize("spans", ROWS.values(), ids=ROWS)
def test_values_and_gradients_equal_attention_by_structure(spans: tuple[GroupSpan, ...]) -> None:
    tensors = operands(spans)
    expected = SharedPrefixAttention(spans)(*tensors, scaling=0.3)
    mask = row_block_mask(spans, CPU)
    with torch.no_grad():
        torch.testing.assert_close(attend_packed(*tensors, mask, 0.3, flex_attention), expected)
    actual = attend_packed(*tensors, mask, 0.3, dense)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("spans", ROWS.values(), ids=ROWS)
def test_no_block_is_missing_and_full_blocks_are_full(spans: tuple[GroupSpan, ...]) -> None:
    """Against torch's own block mask, which tries every pair of tokens."""
    mask = row_block_mask(spans, CPU)
    length = mask.seq_lengths[0]
    torch_own = create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu", BLOCK_SIZE=BLOCK)

    def blocks(counts: Tensor, indices: Tensor) -> set[tuple[int, int]]:
        return {(q, k) for q, n in enumerate(counts[0, 0].tolist()) for k in indices[0, 0, q, :n].tolist()}

    partial, full = (
        blocks(m, i)
        for m, i in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    own_partial = blocks(torch_own.kv_num_blocks, torch_own.kv_indices)
    own_full = blocks(torch_own.full_kv_num_blocks, torch_own.full_kv_indices)
    assert not partial & full
    assert full <= own_full
    assert own_partial | own_full <= partial | full
    assert len(partial | full) <= len(own_partial | own_full) + 2 * len(spans)  # little is computed in vain


def test_padding_costs_a_diagonal() -> None:
    spans = (GroupSpan(700, (700,)),)
    mask = row_block_mask(spans, CPU)
    assert mask.seq_lengths == (2048, 2048)
    counts = (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0]
    assert counts[11:].tolist() == [1] * 5


def test_lengths_fall_into_few_shapes() -> None:
    assert [padded_length(n) for n in (1, 1024, 1025, 5000)] == [1024, 1024, 2048, 8192]
    assert len({padded_length(n) for n in range(1, 65_537, 97)}) <= 7  # each is compiled, with and without gradients


def test_it_is_compiled_for_more_shapes_than_dynamo_compiles_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a reference and rows of five lengths needs ten versions. After eight, dynamo would give up."""
    monkeypatch.setattr(flex_module, "SHORTEST", BLOCK)

    def compile_all() -> None:
        flex = compiled_flex(backend="eager")  # dynamo's work alone
        for length, with_gradient in itertools.product((100, 200, 400, 800, 1600), (True, False)):
            spans = (GroupSpan(length - 10, (4, 6)),)
            tensors = [t.detach() for t in operands(spans)]  # there is no backward pass on a CPU
            with torch.set_grad_enabled(with_gradient):
                attend_packed(*tensors, row_block_mask(spans, CPU), 0.3, flex)

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run_ranks(1, compile_all)  # in a process of its own, as below


def log_probs_and_gradients(policy: QwenVL, items: list[EncodedSample]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    completions = [[torch.randint(0, 256, (n,), generator=generator) for n in (5, 1, 30)] for _ in items]
    items = [item.to(policy.device) for item in items]
    (row,) = pack_rows(items, [[c.to(policy.device) for c in group] for group in completions], 100_000)
    policy.zero_grad()
    log_probs = policy.token_log_probs(row, policy.encode_images(items))
    log_probs.mean().backward()
    return [log_probs.detach(), *(p.grad.clone() for p in policy.trainable_parameters())]


def assert_alike(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance * scale)


def new_policy(folder: Path, dtype: str) -> QwenVL:
    torch.manual_seed(0)
    return QwenVL(str(folder), LoraSettings(rank=4), dtype, gradient_checkpointing=True).train()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_whole_policy_agrees(
    tiny_model_dir: Path, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float
) -> None:
    policy, items = new_policy(tiny_model_dir, dtype), make_items([1, 6, 2])

    def flex(self: SharedPrefixAttention, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return attend_packed(q, k, v, row_block_mask(self.spans, CPU), scaling, dense)

    expected = log_probs_and_gradients(policy, items)
    monkeypatch.setattr(SharedPrefixAttention, "__call__", flex)
    assert_alike(log_probs_and_gradients(policy, items), expected, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_on_a_gpu_the_policy_agrees_with_a_cpus(
    tiny_model_dir: Path, make_items: MakeItems, dtype: str, tolerance: float
) -> None:
    policy, items = new_policy(tiny_model_dir, dtype), make_items([1, 6, 2])
    expected = log_probs_and_gradients(policy, items)
    assert_alike(log_probs_and_gradients(policy.cuda(), items), expected, tolerance)


@pytest.mark.slow
def test_compiled_as_on_a_gpu() -> None:
    spans = ROWS["ragged groups"]

    def compare() -> None:
        tensors = [t.detach() for t in operands(spans)]
        with torch.no_grad():
            expected = SharedPrefixAttention(spans)(*tensors, scaling=0.3)
            actual = attend_packed(*tensors, row_block_mask(spans, CPU), 0.3, compiled_flex())
        torch.testing.assert_close(actual, expected)

    # In a process of its own: compiling starts autograd's threads, and a process that has them can no longer be forked
    # by the tests that run several ranks.
    run_ranks(1, compare)
