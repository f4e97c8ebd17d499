"""Log-probabilities of given tokens. Logits are computed only where they are needed, and in chunks.

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
    """log p(target) under softmax(logits / temperature) without banned tokens.

    If there is more than one chunk, the backward pass computes the logits again, so that only one chunk is in memory.

    Args:
        hidden: states that predict the targets, [N, D].
        targets: token ids, long [N].
        head: makes logits [., V] from hidden states [., D].
        banned: token ids that get probability 0, long; None: no token.
        temperature: divides the logits.
        with_best: also return the likeliest tokens.

    Returns:
        float32 [N], and the likeliest tokens, long [N], or None.
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
    # Logits are the largest tensor of a forward pass: avoid copies of them.
    logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill_(-1, banned, float("-inf"))
    best = logits.detach().argmax(-1) if with_best else None
    return -F.cross_entropy(logits, targets, reduction="none"), best
