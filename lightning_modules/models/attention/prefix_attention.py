"""Attention of packed rows, in which several completions share the prefix that is their prompt.

Shapes: L tokens in the row; H key-value heads, R query heads for each of them, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.models.attention.flex_attention import attend_packed, compiled_flex, row_block_mask
from lightning_modules.models.attention.layout import GroupSpan

KEPT_BIAS = 1 << 22  # numbers; of a long prompt all blocks together would fill gigabytes
QUERY_BLOCK = 256  # below it nothing is gained, and gradients of slices cost more


@dataclass(frozen=True)
class SharedPrefixAttention:
    """The attention of a packed row computed by its structure: what no token may see is not computed at all.

    Token i sees token j where j <= i, both are of one group, and j is in the prefix or in the branch of i. A mask over
    the row would cost the square of its length; here only each group's own length counts. On a GPU one kernel does it
    (`flex_attention`); on a CPU, slices of the row.
    """

    spans: tuple[GroupSpan, ...]
    biases: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)  # for every layer

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Query [1, H * R, L, D], key and value [1, H, L, D] -> [1, L, H * R, D]."""
        if query.is_cuda:
            return attend_packed(query, key, value, row_block_mask(self.spans, query.device), scaling, compiled_flex())
        heads = key.shape[1]
        # Token-major, so that every part below is a slice of memory; cut once, so that gradients are joined once.
        query = query[0].unflatten(0, (heads, -1)).permute(2, 0, 1, 3)  # [L, H, R, D]
        sizes = [size for span in self.spans for size in (span.prefix, sum(span.branches))]
        parts = zip(*(t.split(sizes) for t in (query, key[0].transpose(0, 1), value[0].transpose(0, 1))), strict=True)
        out = []
        for span, (q, k, v), branches in zip(self.spans, parts, parts, strict=True):  # two parts of each
            out.append(self._attend(q[None], k[None], v[None], scaling)[0])
            if span.branches:
                out.append(self._attend_branches(branches, (k, v), span.branches, scaling))
        return torch.cat(out).flatten(1, 2)[None]

    def _attend_branches(
        self, branches: tuple[Tensor, ...], prefix: tuple[Tensor, Tensor], lengths: tuple[int, ...], scaling: float
    ) -> Tensor:
        """All branches as one batch, padded to the longest; each sees the prefix before its own keys."""
        q, *own = (_side_by_side(part, lengths) for part in branches)
        k, v = (torch.cat([p.expand(len(o), *p.shape), o], dim=1) for p, o in zip(prefix, own, strict=True))
        out = self._attend(q, k, v, scaling)
        return torch.cat([branch[:length] for branch, length in zip(out, lengths, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of the last T of S tokens: query [G, T, H, R, D], key and value [G, S, H, D] -> as query.

        In blocks of queries, each with the keys that it may see: half of a long square is hidden. The R heads that
        share a key-value head are queries of one product, so keys and values are not repeated.
        """
        num_queries, sharing = query.shape[1], query.shape[3]
        if num_queries > QUERY_BLOCK:
            before = key.shape[1] - num_queries
            ends = [min(start + QUERY_BLOCK, num_queries) for start in range(0, num_queries, QUERY_BLOCK)]
            blocks = zip(query.split(QUERY_BLOCK, dim=1), ends, strict=True)
            parts = [self._attend(q, key[:, : before + end], value[:, : before + end], scaling) for q, end in blocks]
            return torch.cat(parts, dim=1)
        out = F.scaled_dot_product_attention(
            query.permute(0, 2, 3, 1, 4).flatten(2, 3),  # [G, H, R * T, D]
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=self._causal_bias(query, key.shape[1]),
            scale=scaling,
        )
        return out.unflatten(2, (sharing, num_queries)).permute(0, 3, 1, 2, 4)

    def _causal_bias(self, query: Tensor, num_keys: int) -> Tensor:
        """What is added to the scores [R * T, S] of the last T of S tokens; small ones are kept for the next layer."""
        num_queries, sharing = query.shape[1], query.shape[3]
        if (num_queries, num_keys) in self.biases:
            return self.biases[num_queries, num_keys]
        hidden = query.new_full((num_queries, num_keys), float("-inf")).triu_(num_keys - num_queries + 1)
        bias = hidden.repeat(sharing, 1)
        if bias.numel() <= KEPT_BIAS:
            self.biases[num_queries, num_keys] = bias
        return bias


def _side_by_side(parts: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Parts of these lengths, end to end [N, ...], as [G, longest, ...] with zeros behind the shorter."""
    longest = max(lengths)
    if min(lengths) < longest:  # joined by one operation, and in the backward pass cut by one
        zeros = parts.new_zeros(longest, *parts.shape[1:])
        pieces = zip(parts.split(lengths), lengths, strict=True)
        parts = torch.cat([piece for part, length in pieces for piece in (part, zeros[length:])])
    return parts.unflatten(0, (len(lengths), longest))
