"""Several completions of one prompt as one sequence: the prompt once, then its G completions side by side.

A row is [prefix a, branch a1 ... aG, prefix b, branch b1 ... bG, ...]. Every branch sees its own prefix and itself,
never a sibling or another group, and its positions start where the prefix ends. So each token gets the hidden state
that it would get in a plain row [prefix, completion], while the prefix is computed once instead of G times.

A forward pass takes one row without padding, so the batch dimension is 1 everywhere: more rows give a CPU nothing, and
a GPU is filled by one long row.

Shapes: L tokens in the row, N target tokens in all its completions; H key-value heads, R query heads for each of them,
D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.packed_flex import attend_packed, compiled_flex, row_block_mask

if TYPE_CHECKING:
    from datamodules.batches import PromptItem


KEPT_BIAS = 1 << 22  # numbers; of a long prompt all blocks together would fill gigabytes
QUERY_BLOCK = 256  # below it nothing is gained, and gradients of slices cost more


@dataclass(frozen=True)
class GroupSpan:
    """Lengths of one group's parts in a row, in tokens; empty branches are left out."""

    prefix: int
    branches: tuple[int, ...]


@dataclass(frozen=True)
class SharedPrefixAttention:
    """The attention of a packed row computed by its structure: what no token may see is not computed at all.

    Token i sees token j where j <= i, both are of one group, and j is in the prefix or in the branch of i. A mask over
    the row would cost the square of its length; here only each group's own length counts. On a GPU one kernel does it
    (`packed_flex`); on a CPU, slices of the row.
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


@dataclass(frozen=True)
class PackedRows:
    """One forward pass; `items` says which of the packed items its row holds."""

    items: tuple[int, ...]  # in order of their places
    spans: tuple[GroupSpan, ...]  # of the items, in order
    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [3, 1, L], M-RoPE: temporal, height, width
    is_prompt: Tensor  # bool [1, L], False for the completions
    predict: Tensor  # [N] index in the row of the token whose hidden state predicts target n
    targets: Tensor  # [N] token ids
    completion: Tensor  # [N] which completion target n is of, counted through all items given to `pack_rows`

    def image_slots(self, image_token_id: int) -> Tensor:
        """Indices in the row where the image features of `items`, concatenated in order, go.

        Only prompts hold images: a placeholder that a policy wrote itself stays an ordinary token.
        """
        return ((self.input_ids == image_token_id) & self.is_prompt)[0].nonzero()[:, 0]

    @cached_property
    def attention(self) -> SharedPrefixAttention:
        return SharedPrefixAttention(self.spans)


def group_length(item: PromptItem, completions: Sequence[Tensor]) -> int:
    """Tokens that a group takes in a row. The last token of a completion predicts nothing, so it is left out."""
    return len(item.input_ids) + sum(max(len(completion) - 1, 0) for completion in completions)


def pack_rows(
    items: Sequence[PromptItem], completions: Sequence[Sequence[Tensor]], max_tokens: int
) -> list[PackedRows]:
    """Lay out each item with its completions, in order, in rows of at most `max_tokens` tokens.

    A group is never split: one that is longer than `max_tokens` gets a row of its own.
    """
    if len(items) != len(completions):
        raise ValueError(f"{len(items)} items but completions for {len(completions)}")
    packed: list[PackedRows] = []
    waiting: list[int] = []
    room = max_tokens
    first = list(accumulate(map(len, completions), initial=0))  # each item's first completion, counted through all
    for index, item in enumerate(items):
        length = group_length(item, completions[index])
        if waiting and length > room:
            packed.append(_one_row(items, completions, waiting, first))
            waiting, room = [], max_tokens
        waiting.append(index)
        room -= length
    if waiting:
        packed.append(_one_row(items, completions, waiting, first))
    return packed


def one_token_row(token: Tensor) -> PackedRows:
    """A row of `token` [1] alone, as prompt and as target."""
    nothing = torch.zeros_like(token)
    return PackedRows(
        items=(),
        spans=(GroupSpan(1, ()),),
        input_ids=token[None],
        position_ids=nothing.expand(3, 1, 1),
        is_prompt=torch.ones_like(token, dtype=torch.bool)[None],
        predict=nothing,
        targets=token,
        completion=nothing,
    )


def _one_row(
    items: Sequence[PromptItem],
    completions: Sequence[Sequence[Tensor]],
    chosen: Sequence[int],
    first: Sequence[int],
) -> PackedRows:
    device = items[chosen[0]].input_ids.device
    ids, positions, prompts, spans = [], [], [], []
    predict, targets, completion_numbers = [], [], []
    start = 0

    def add(tokens: Tensor, places: Tensor, is_prompt: bool) -> None:
        nonlocal start
        ids.append(tokens)
        positions.append(places)
        prompts.append(torch.full((len(tokens),), is_prompt))
        start += len(tokens)

    for index in chosen:
        item = items[index]
        add(item.input_ids, item.positions, is_prompt=True)
        prefix_end = start - 1
        for number, completion in enumerate(completions[index], first[index]):
            if len(completion) == 0:
                continue
            inputs = completion[:-1]
            predict += [torch.tensor([prefix_end]), torch.arange(start, start + len(inputs))]
            targets.append(completion)
            completion_numbers.append(torch.full((len(completion),), number))
            places = item.next_position + torch.arange(len(inputs), device=device)
            add(inputs, places.expand(3, -1), is_prompt=False)
        lengths = (len(completion) - 1 for completion in completions[index])
        spans.append(GroupSpan(len(item.input_ids), tuple(length for length in lengths if length > 0)))

    none = [torch.zeros(0, dtype=torch.long)]
    return PackedRows(
        items=tuple(chosen),
        spans=tuple(spans),
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        is_prompt=torch.cat(prompts).to(device)[None],
        predict=torch.cat(predict or none).to(device),
        targets=torch.cat(targets or none).to(device),
        completion=torch.cat(completion_numbers or none).to(device),
    )
