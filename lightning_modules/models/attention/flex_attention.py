"""Attention of packed rows on a GPU: FlexAttention under a block mask, for `prefix_attention.SharedPrefixAttention`.

A pair of blocks is not computed if no query in it may attend to any key, so the cost is the sum of the costs of the
groups. The full mask is never stored. Only the group and completion of each token are stored, and for each pair of
blocks whether it is needed.

Shapes: L tokens of a row, M its padded length, K = M / BLOCK blocks; H key-value heads, R query heads per key-value
head, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_modules.models.attention.layout import GroupSpan

BLOCK = 128
SHORTEST = 1024
MOST_COMPILATIONS = 64


def padded_length(length: int) -> int:
    """The next power of two, at least `SHORTEST`.

    A kernel is compiled for each padded length, so few different lengths need few compilations. The cost of padding is
    small. For fewer than 128 tokens, torch would choose another kernel, for which R must be a power of two.
    """
    return max(SHORTEST, 1 << (length - 1).bit_length())


@lru_cache(maxsize=4)  # all layers of a forward pass, its recomputation and the reference use the same mask
def row_block_mask(spans: tuple[GroupSpan, ...], device: torch.device) -> BlockMask:
    """FlexAttention's mask of a packed row.

    Token i attends to token j if j <= i, both are in the same group, and j is in the prefix or in the completion of i.
    A prefix counts as completion 0. Padding tokens attend to themselves, because a softmax over no keys would be NaN,
    and its gradient too.
    """
    parts = [(group, part, n) for group, s in enumerate(spans) for part, n in enumerate((s.prefix, *s.completions))]
    group, completion, counts = torch.tensor(parts).unbind(1)
    length = padded_length(int(counts.sum()))
    # Each padding token is a separate completion, in an additional group without a prefix.
    padding = torch.arange(1, length - int(counts.sum()) + 1)
    group = torch.cat([group.repeat_interleave(counts), torch.full_like(padding, len(spans))])
    completion = torch.cat([completion.repeat_interleave(counts), padding])
    partial, full = _blocks(group, completion)
    group, completion = group.to(device), completion.to(device)

    def may_see(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (group[j] == group[i]) & ((completion[j] == 0) | (completion[j] == completion[i]))

    lists = (part for matrix in (partial, full) for part in _listed(matrix.to(device)))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=may_see, seq_lengths=(length, length))


def _blocks(group: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """Compute which pairs of blocks are needed, from the ranges of groups and completions in each block.

    Group numbers ascend along a row, so overlapping ranges share a group. Completion numbers ascend inside a group.

    Args:
        group: long [M], the group of each token.
        completion: long [M], the completion of each token; 0 in a prefix.

    Returns:
        Two matrices, bool [K, K]. The first marks pairs in which some queries may attend to some keys; there, the rule
        for tokens decides. The second marks pairs in which every query attends to every key.
    """
    low_group, high_group = group.view(-1, BLOCK).aminmax(dim=1)
    low, high = completion.view(-1, BLOCK).aminmax(dim=1)
    one_group = low_group == high_group
    meet = (low_group[:, None] <= high_group) & (low_group <= high_group[:, None])
    overlap = (low[:, None] <= high) & (low <= high[:, None])
    # If a block has several groups, the range of completions is an upper bound.
    in_prefix = completion.view(-1, BLOCK) == 0
    first_prefix = group.view(-1, BLOCK).masked_fill(~in_prefix, len(group)).amin(dim=1)
    last_prefix = group.view(-1, BLOCK).masked_fill(~in_prefix, -1).amax(dim=1)
    sees_prefix = (low_group[:, None] <= last_prefix) & (high_group[:, None] >= first_prefix)
    some = (meet & overlap) | sees_prefix
    some &= torch.ones_like(some).tril()
    alike = (one_group[:, None] & one_group) & (low_group[:, None] == low_group)
    same_completion = (low[:, None] == high) & (high[:, None] == low)
    full = some & alike & ((high == 0) | same_completion) & torch.ones_like(some).tril(-1)
    return some & ~full, full


def _listed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix, bool [K, K], in FlexAttention's form, int32: the number of True entries in each row [1, 1, K], and the
    column indices of each row with the True entries first [1, 1, K, K]."""
    counts = matrix.sum(dim=1, dtype=torch.int32)
    indices = matrix.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


@cache
def compiled_flex(backend: str = "inductor") -> Callable[..., Tensor]:
    """Compiled once for each padded length, dtype and number of heads, with and without gradients.

    dynamo would give up after 8 compilations. Then PyTorch computes all pairs of tokens and keeps their scores: tens of
    gigabytes for a long row.
    """
    compiled = torch.compile(flex_attention, dynamic=False, backend=backend)

    def flex(*args: object, **options: object) -> Tensor:
        # Set around each call, because dynamo's settings belong to a thread, and the backward pass of a checkpointed
        # layer runs in a thread of autograd.
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
            return compiled(*args, **options)

    return flex


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, flex: Callable[..., Tensor]
) -> Tensor:
    """Attention of a packed row: query [1, H * R, L, D], key and value [1, H, L, D] -> [1, L, H * R, D].

    `flex` is `compiled_flex()`, or `flex_attention` itself in tests on a CPU.
    """
    length = query.shape[2]
    padding = (0, 0, 0, mask.seq_lengths[0] - length)
    query, key, value = (F.pad(t, padding) for t in (query, key, value))
    out = flex(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out[:, :, :length].transpose(1, 2)
