"""Log-probabilities of given tokens. Logits are computed in chunks, and only at the needed positions.

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
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target) under softmax(logits / temperature) without banned tokens.

    If there is more than one chunk, the backward pass computes the logits again, so that only one chunk is in memory.

    Args:
        hidden: states that predict the targets, [N, D].
        targets: token ids, long [N].
        head: maps hidden states [., D] to logits [., V].
        banned: token ids that get probability 0, long; None bans no token.
        temperature: divides the logits.
        with_best: also return the most likely tokens.
        with_entropy: also return the entropies of the distributions.

    Returns:
        float32 [N]; the most likely tokens, long [N], or None; the entropies in nats, float32 [N], or None.
    """
    size = max(1, MAX_LOGITS // head.out_features)
    if len(targets) <= size:
        return _score_chunk(hidden, targets, head, banned, temperature, with_best, with_entropy)
    scores = [
        checkpoint(_score_chunk, h, t, head, banned, temperature, with_best, with_entropy, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    log_probs, best, entropies = zip(*scores, strict=True)
    return torch.cat(log_probs), torch.cat(best) if with_best else None, torch.cat(entropies) if with_entropy else None


def _score_chunk(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    banned: Tensor | None,
    temperature: float,
    with_best: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # Logits are the largest tensor of a forward pass, so copies are avoided.
    logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill_(-1, banned, float("-inf"))
    best = logits.detach().argmax(-1) if with_best else None
    entropies = token_entropies(logits, banned) if with_entropy else None
    return -F.cross_entropy(logits, targets, reduction="none"), best, entropies


def token_entropies(logits: Tensor, banned: Tensor | None) -> Tensor:
    """-Σ p log p of each distribution, in nats: [N].

    Args:
        logits: [N, V], -inf where a token is banned.
        banned: token ids, long; None bans no token.
    """
    log_p = logits.log_softmax(-1)
    if banned is not None:
        log_p = log_p.index_fill(-1, banned, 0.0)  # p log p is 0 there, and 0 · -inf would be NaN
    return -(logits.softmax(-1) * log_p).sum(-1)
