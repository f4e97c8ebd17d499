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
    """Lengths of one group's parts in a row, in tokens; empty branches are left out."""

    prefix: int
    branches: tuple[int, ...]


def group_length(item: EncodedSample, completions: Sequence[Tensor]) -> int:
    """Tokens that a group takes in a row. The last token of a completion predicts nothing, so it is left out."""
    return len(item.input_ids) + sum(max(len(completion) - 1, 0) for completion in completions)
