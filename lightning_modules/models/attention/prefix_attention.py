"""Attention of packed rows, in which several completions share a prefix (their prompt).

Shapes: L tokens in the row; H key-value heads, R query heads for each of them, D head width. In a batch of G sequences:
T queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.models.attention.flex_attention import attend_packed, compiled_flex, row_block_mask
from lightning_modules.models.attention.layout import GroupSpan

KEPT_BIAS = 1 << 22  # numbers; larger biases are not kept: those of all blocks of a long prompt would fill gigabytes
QUERY_BLOCK = 256  # smaller blocks are not faster, and more slices make the backward pass slower


@dataclass(frozen=True)
class SharedPrefixAttention:
    """The attention of one packed row, computed part by part. Masked pairs of tokens are not computed.

    Token i attends to token j if j <= i, both are in the same group, and j is in the prefix or in the completion of i.
    With a mask over the row, the cost would be quadratic in the row's length; here it is quadratic only in the length
    of each group. A GPU uses one kernel (`flex_attention`), a CPU uses slices of the row.
    """

    spans: tuple[GroupSpan, ...]
    # (queries, keys) -> bias of the scores; computed in the first layer, used by all layers.
    biases: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention over the row.

        Args:
            query: [1, H * R, L, D].
            key: [1, H, L, D].
            value: [1, H, L, D].
            scaling: of the scores.

        Returns:
            [1, L, H * R, D].
        """
        if query.is_cuda:
            return attend_packed(query, key, value, row_block_mask(self.spans, query.device), scaling, compiled_flex())
        # Tokens first, so that each part below is one contiguous slice. One split, so that autograd concatenates the
        # gradients once.
        query = rearrange(query[0], "(h r) l d -> l h r d", h=key.shape[1])
        key, value = (t[0].transpose(0, 1) for t in (key, value))
        sizes = [size for span in self.spans for size in (span.prefix, sum(span.completions))]
        parts = zip(*(t.split(sizes) for t in (query, key, value)), strict=True)
        out = []
        # The loop reads the same iterator twice: each span takes two parts, its prefix and its completions.
        for span, (q, k, v), completions in zip(self.spans, parts, parts, strict=True):
            out.append(self._attend(q[None], k[None], v[None], scaling)[0])
            if span.completions:
                out.append(self._attend_completions(completions, (k, v), span.completions, scaling))
        return rearrange(torch.cat(out), "l h r d -> 1 l (h r) d")

    def _attend_completions(
        self, completions: tuple[Tensor, ...], prefix: tuple[Tensor, Tensor], lengths: tuple[int, ...], scaling: float
    ) -> Tensor:
        """All completions of a group as one batch, padded to the longest; each attends to the prefix and to its own
        keys.

        Args:
            completions: queries [N, H, R, D], keys and values [N, H, D] of all completions, one after the other.
            prefix: keys and values of the prompt, each [tokens, H, D].
            lengths: number of tokens of each completion; the sum is N.
            scaling: of the scores.

        Returns:
            [N, H, R, D].
        """
        q, *own = (pad_sequence(part.split(lengths), batch_first=True) for part in completions)
        k, v = (torch.cat([p.expand(len(o), *p.shape), o], dim=1) for p, o in zip(prefix, own, strict=True))
        out = self._attend(q, k, v, scaling)
        return torch.cat([completion[:length] for completion, length in zip(out, lengths, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of the last T of S tokens: query [G, T, H, R, D], key and value [G, S, H, D] -> as query.

        Many queries are computed in blocks, each only with the keys that it may attend to, because causal masking hides
        half of all pairs. The R query heads of a key-value head are treated as further queries of one matrix product,
        so keys are not repeated.
        """
        num_queries, sharing = query.shape[1], query.shape[3]
        if num_queries > QUERY_BLOCK:
            before = key.shape[1] - num_queries
            ends = [min(start + QUERY_BLOCK, num_queries) for start in range(0, num_queries, QUERY_BLOCK)]
            blocks = zip(query.split(QUERY_BLOCK, dim=1), ends, strict=True)
            parts = [self._attend(q, key[:, : before + end], value[:, : before + end], scaling) for q, end in blocks]
            return torch.cat(parts, dim=1)
        out = F.scaled_dot_product_attention(
            rearrange(query, "g t h r d -> g h (r t) d"),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=self._causal_bias(query, key.shape[1]),
            scale=scaling,
        )
        return rearrange(out, "g h (r t) d -> g t h r d", r=sharing)

    def _causal_bias(self, query: Tensor, num_keys: int) -> Tensor:
        """The bias of the scores [R * T, S] of the last T of S tokens; a small bias is kept for the next layer."""
        num_queries, sharing = query.shape[1], query.shape[3]
        if (num_queries, num_keys) in self.biases:
            return self.biases[num_queries, num_keys]
        # The last query attends to all keys, the query before it to all except the last one.
        hidden = query.new_full((num_queries, num_keys), float("-inf")).triu_(num_keys - num_queries + 1)
        bias = repeat(hidden, "t s -> (r t) s", r=sharing)
        if bias.numel() <= KEPT_BIAS:
            self.biases[num_queries, num_keys] = bias
        return bias
