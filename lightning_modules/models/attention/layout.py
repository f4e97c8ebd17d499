"""How one prompt and its completions lie in a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from datamodules.encoding.encoder import EncodedSample


@dataclass(frozen=True)
class GroupSpan:
    """Tokens of one group's parts in a packed row."""

    prefix: int
    completions: tuple[int, ...]  # without those that take no token in the row


def group_length(item: EncodedSample, completions: Sequence[Tensor]) -> int:
    """Tokens that a group takes in a packed row. The last token of a completion predicts nothing and is left out."""
    return len(item.input_ids) + sum(max(len(completion) - 1, 0) for completion in completions)
