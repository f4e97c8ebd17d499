"""Attention of packed rows on a GPU: FlexAttention under a block mask, for `prefix_attention.SharedPrefixAttention`.

What no token of a block may see is never computed, so a row costs what its groups cost. The mask itself is never
written out: a token's group and branch are kept, and for each pair of blocks whether any token may see any.

Shapes: L tokens of a row, M its padded length, K = M / BLOCK blocks; H key-value heads, R query heads for each of
them, D head width.
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


def padded_length(length: int) -> int:
    """The next power of two, `SHORTEST` at least: so few lengths need few compiled kernels. Padding costs little.

    Fewer than 128 tokens would get another kernel, which wants R to be a power of two.
    """
    return max(SHORTEST, 1 << (length - 1).bit_length())


@lru_cache(maxsize=4)  # the layers of a forward pass, its recomputation and the reference ask for the same one
def row_block_mask(spans: tuple[GroupSpan, ...], device: torch.device) -> BlockMask:
    """Token i sees token j where j <= i, both are of one group, and j is in the prefix (branch 0) or the branch of i.

    Padding tokens see themselves: a softmax over nothing would be NaN, and its gradient too.
    """
    parts = [(group, branch, n) for group, s in enumerate(spans) for branch, n in enumerate((s.prefix, *s.branches))]
    group, branch, counts = torch.tensor(parts).unbind(1)
    length = padded_length(int(counts.sum()))
    padding = torch.arange(1, length - int(counts.sum()) + 1)  # each a branch of its own, of a group without a prefix
    group = torch.cat([group.repeat_interleave(counts), torch.full_like(padding, len(spans))])
    branch = torch.cat([branch.repeat_interleave(counts), padding])
    partial, full = _blocks(group, branch)
    group, branch = group.to(device), branch.to(device)

    def may_see(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (group[j] == group[i]) & ((branch[j] == 0) | (branch[j] == branch[i]))

    lists = (part for matrix in (partial, full) for part in _listed(matrix.to(device)))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=may_see, seq_lengths=(length, length))


def _blocks(group: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [K, K] twice: query block sees some of key block (maybe none: the token rule decides), or surely all of it.

    Groups ascend along a row, so ranges that meet share a group; branches ascend inside a group.
    """
    low_group, high_group = group.view(-1, BLOCK).aminmax(dim=1)
    low, high = branch.view(-1, BLOCK).aminmax(dim=1)
    one_group = low_group == high_group
    meet = (low_group[:, None] <= high_group) & (low_group <= high_group[:, None])
    overlap = (low[:, None] <= high) & (low <= high[:, None])
    # Where a block holds several groups, the range of its branches still bounds them.
    in_prefix = branch.view(-1, BLOCK) == 0
    first_prefix = group.view(-1, BLOCK).masked_fill(~in_prefix, len(group)).amin(dim=1)
    last_prefix = group.view(-1, BLOCK).masked_fill(~in_prefix, -1).amax(dim=1)
    sees_prefix = (low_group[:, None] <= last_prefix) & (high_group[:, None] >= first_prefix)
    some = (meet & overlap) | sees_prefix
    some &= torch.ones_like(some).tril()
    alike = (one_group[:, None] & one_group) & (low_group[:, None] == low_group)
    same_branch = (low[:, None] == high) & (high[:, None] == low)
    full = some & alike & ((high == 0) | same_branch) & torch.ones_like(some).tril(-1)
    return some & ~full, full


def _listed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [K, K] as FlexAttention wants it: counts of each row, and indices with those first; int32 [1, 1, ...]."""
    counts = matrix.sum(dim=1, dtype=torch.int32)
    indices = matrix.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """Compiled once for each padded length, number of heads and dtype."""
    return torch.compile(flex_attention, dynamic=False)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, flex: Callable[..., Tensor]
) -> Tensor:
    """Query [1, H * R, L, D], key and value [1, H, L, D] -> [1, L, H * R, D]."""
    length = query.shape[2]
    padding = (0, 0, 0, mask.seq_lengths[0] - length)
    query, key, value = (F.pad(t, padding) for t in (query, key, value))
    out = flex(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out[:, :, :length].transpose(1, 2)
