"""The layout of one prompt and its completions in a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from datamodules.encoding.encoder import EncodedSample


@dataclass(frozen=True)
class GroupSpan:
    """Numbers of tokens of one group's parts in a packed row."""

    prefix: int
    completions: tuple[int, ...]  # only completions with at least one token in the row


def group_length(item: EncodedSample, completions: Sequence[Tensor]) -> int:
    """Number of tokens of a group in a packed row, without each completion's last token, which predicts nothing."""
    return len(item.input_ids) + sum(max(len(completion) - 1, 0) for completion in completions)
