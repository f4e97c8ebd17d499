"""Log-probabilities of chosen tokens, with logits only for those and only in chunks.

Shapes: N target tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26  # numbers in one chunk of logits (256 MiB in float32)


def score_tokens(
    hidden: Tensor, targets: Tensor, head: nn.Module, banned: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p(target) [N], float32, under softmax(logits / temperature) without banned tokens; likeliest tokens [N].

    `hidden` [N, D] are the states that predict `targets` [N]; `head` makes logits [., V]. Where there is more than one
    chunk, none keeps its logits for the gradient: they are computed again.
    """
    size = max(1, MAX_LOGITS // head.out_features)
    if len(targets) <= size:
        return _score_chunk(hidden, targets, head, banned, temperature)
    scores = [
        checkpoint(_score_chunk, h, t, head, banned, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    log_probs, best = zip(*scores, strict=True)
    return torch.cat(log_probs), torch.cat(best)


def _score_chunk(
    hidden: Tensor, targets: Tensor, head: nn.Module, banned: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    if banned is not None:
        logits = logits.index_fill(-1, banned, float("-inf"))
    return -F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)
