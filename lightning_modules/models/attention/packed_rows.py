"""Packed rows: a sequence with each prompt once, followed by its G completions one after the other.

A row is [prompt a, completions a1 ... aG, prompt b, completions b1 ... bG, ...]. A completion attends to its own prompt
and to itself, but not to other completions or groups. Its positions start where the prompt ends. So each token gets the
hidden state that it would get in a plain row [prompt, completion], while the prompt is computed once instead of G
times.

A forward pass takes one row without padding, so the batch dimension is always 1. More rows would not be faster on a
CPU, and one long row is enough work for a GPU.

Shapes: L tokens in the row, N target tokens in all its completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from einops import repeat
from torch import Tensor

from lightning_modules.models.attention.layout import GroupSpan, group_length
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention

if TYPE_CHECKING:
    from datamodules.encoding.encoder import EncodedSample


@dataclass(frozen=True)
class PackedRows:
    """The input of one forward pass. `items` are the indices of the packed items in this row."""

    items: tuple[int, ...]  # in the order of the row
    spans: tuple[GroupSpan, ...]  # of these items
    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [3, 1, L], M-RoPE: temporal, height, width
    is_prompt: Tensor  # bool [1, L], False for the completions
    predict: Tensor  # long [N]: index in the row of the token whose hidden state predicts target n
    targets: Tensor  # long [N]: token ids
    completion_index: Tensor  # long [N]: the completion of target n, numbered over all items of `pack_rows`

    def image_token_index(self, image_token_id: int) -> Tensor:
        """Indices in the row, long [image tokens], for the image features of `items`, in order.

        Only prompts have images. A placeholder that the policy has generated is treated as an ordinary token.
        """
        return ((self.input_ids == image_token_id) & self.is_prompt)[0].nonzero()[:, 0]

    @cached_property
    def attention(self) -> SharedPrefixAttention:
        return SharedPrefixAttention(self.spans)


def pack_rows(
    items: Sequence[EncodedSample], completions: Sequence[Sequence[Tensor]], max_tokens: int
) -> list[PackedRows]:
    """Pack the items with their completions, in order, into rows of at most `max_tokens` tokens.

    Args:
        items: the prompts.
        completions: token ids of each item's completions, long [tokens] each.
        max_tokens: length of a row. A group is never split, so a longer group gets its own row.

    Raises:
        ValueError: `items` and `completions` differ in length.
    """
    if len(items) != len(completions):
        raise ValueError(f"{len(items)} items but completions for {len(completions)}")
    rows: list[list[int]] = []  # the items of each row
    room = 0
    first = list(accumulate(map(len, completions), initial=0))  # number of each item's first completion
    for index, item in enumerate(items):
        length = group_length(item, completions[index])
        if not rows or length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(index)
        room -= length
    return [_one_row(items, completions, chosen, first) for chosen in rows]


def one_token_row(token: Tensor) -> PackedRows:
    """A row with one `token`, long [1], which is both prompt and target."""
    nothing = torch.zeros_like(token)
    return PackedRows(
        items=(),
        spans=(GroupSpan(1, ()),),
        input_ids=token[None],
        position_ids=nothing.expand(3, 1, 1),
        is_prompt=torch.ones_like(token, dtype=torch.bool)[None],
        predict=nothing,
        targets=token,
        completion_index=nothing,
    )


def _one_row(
    items: Sequence[EncodedSample],
    completions: Sequence[Sequence[Tensor]],
    chosen: Sequence[int],
    first: Sequence[int],
) -> PackedRows:
    """One row with the items `chosen`. `first` has the number of each item's first completion."""
    device = items[chosen[0]].input_ids.device
    ids, positions, prompts, spans = [], [], [], []
    predict, targets, completion_index = [], [], []
    start = 0  # tokens in the row so far

    def add(tokens: Tensor, position_ids: Tensor, is_prompt: bool) -> None:
        nonlocal start
        ids.append(tokens)
        positions.append(position_ids)
        prompts.append(torch.full((len(tokens),), is_prompt))
        start += len(tokens)

    for index in chosen:
        item = items[index]
        add(item.input_ids, item.positions, is_prompt=True)
        prefix_end = start - 1
        for number, completion in enumerate(completions[index], first[index]):
            if len(completion) == 0:
                continue
            # The prompt's last token predicts the first target; the last target predicts nothing, so it is not an
            # input.
            inputs = completion[:-1]
            predict += [torch.tensor([prefix_end]), torch.arange(start, start + len(inputs))]
            targets.append(completion)
            completion_index.append(torch.full((len(completion),), number))
            text_positions = item.next_position + torch.arange(len(inputs), device=device)
            add(inputs, repeat(text_positions, "t -> axes t", axes=3), is_prompt=False)
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
        completion_index=torch.cat(completion_index or none).to(device),
    )
