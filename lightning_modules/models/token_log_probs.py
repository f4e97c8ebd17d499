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
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    banned: Tensor | None,
    temperature: float,
    with_best: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) [N], float32, under softmax(logits / temperature) without banned tokens; likeliest tokens [N], if
    asked for.

    `hidden` [N, D] are the states that predict `targets` [N]; `head` makes logits [., V]. Where there is more than one
    chunk, none keeps its logits for the gradient: they are computed again.
    """
    size = max(1, MAX_LOGITS // head.out_features)
    if len(targets) <= size:
        return _score_chunk(hidden, targets, head, banned, temperature, with_best)
    scores = [
        checkpoint(_score_chunk, h, t, head, banned, temperature, with_best, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    log_probs, best = zip(*scores, strict=True)
    return torch.cat(log_probs), torch.cat(best) if with_best else None


def _score_chunk(
    hidden: Tensor, targets: Tensor, head: nn.Module, banned: Tensor | None, temperature: float, with_best: bool
) -> tuple[Tensor, Tensor | None]:
    # Logits are the largest tensor there is: what can be done in place, or not at all, is.
    logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill_(-1, banned, float("-inf"))
    best = logits.detach().argmax(-1) if with_best else None
    return -F.cross_entropy(logits, targets, reduction="none"), best
