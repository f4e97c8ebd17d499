"""Choosing the next token of each row.

By inversion: one random number a row, where torch.multinomial draws one for every entry of the vocabulary. Summed in
float64, so that no sum over a large vocabulary rounds a likely token away; a banned token has no width.

Shapes: A rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 8192  # a vocabulary up to this size is summed at once
BLOCK = 512  # tokens of a block of a larger one


def sample(logits: Tensor, banned: Tensor, temperature: float, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [A] drawn from softmax(logits [A, V] / temperature) without banned tokens, and their log-probabilities.

    `draws` [A, 1], uniform in [0, 1) and float64, decide; without them the likeliest token is taken.
    """
    logits = (logits.float() / temperature).index_fill_(-1, banned, float("-inf"))
    if draws is not None and logits.shape[-1] > WHOLE:
        return _sample_large(logits, draws)
    probabilities = logits.softmax(-1)
    if draws is None:
        tokens = probabilities.argmax(-1)
    else:
        # On a CPU exponentials in float64 would cost more than all else here.
        sums = probabilities.double().cumsum(-1)
        tokens = torch.searchsorted(sums, draws * sums[:, -1:], right=True)[:, 0]
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()


def _sample_large(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The same by sums of blocks, then those inside one block. On a GPU a softmax or a cumulative sum along so long a
    row keeps one multiprocessor busy for longer than a layer takes all of them."""
    most = logits.amax(-1, keepdim=True)
    weights = (logits - most).exp_()
    blocks = F.pad(weights, (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = draws * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[-1] - 1)
    wanted = wanted - F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0].double().cumsum(-1)
    # Two sums of one block may differ by a rounding: a draw stays below the end of the last token that has width.
    wanted = torch.minimum(wanted, inside[:, -1:] * (1 - 1e-15))
    tokens = block * BLOCK + torch.searchsorted(inside, wanted, right=True)
    tokens.clamp_(max=logits.shape[-1] - 1)  # of NaN there is none: let it be seen, not end the process
    log_probs = logits.gather(-1, tokens) - most - sums[:, -1:].log().float()
    return tokens[:, 0], log_probs[:, 0]
