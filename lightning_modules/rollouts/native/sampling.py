"""Sample the next token of each row by inversion of the cumulative distribution.

This needs one random number per row; torch.multinomial draws one for every entry of the vocabulary. Sums are in
float64, so that in a large vocabulary no likely token is lost by rounding. A banned token has probability 0.

Shapes: A rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 8192  # a vocabulary up to this size is summed in one pass
BLOCK = 512  # number of tokens in one block of a larger vocabulary


def sample(logits: Tensor, banned: Tensor, temperature: float, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [A] drawn from softmax(logits / temperature) without banned tokens, and their log-probabilities [A].

    Args:
        logits: [A, V].
        banned: token ids that are never drawn.
        temperature: logits are divided by it.
        draws: [A, 1], float64, uniform random numbers in [0, 1); None takes the most likely token.
    """
    logits = (logits.float() / temperature).index_fill_(-1, banned, float("-inf"))
    if draws is not None and logits.shape[-1] > WHOLE:
        return _sample_large(logits, draws)
    probabilities = logits.softmax(-1)
    if draws is None:
        tokens = probabilities.argmax(-1)
    else:
        # On a CPU, exponentials in float64 would cost more than everything else here.
        sums = probabilities.double().cumsum(-1)
        tokens = torch.searchsorted(sums, draws * sums[:, -1:], right=True)[:, 0]
        tokens.clamp_(max=logits.shape[-1] - 1)  # NaN logits give V; the NaN shall reach the finite check
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()


def _sample_large(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The same in two steps: choose a block of tokens, then a token inside it.

    On a GPU, a softmax or cumulative sum along a row of 150,000 entries runs on one multiprocessor and takes longer
    than a whole layer on all multiprocessors.
    """
    most = logits.amax(-1, keepdim=True)
    weights = (logits - most).exp_()
    blocks = F.pad(weights, (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = draws * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[-1] - 1)
    wanted = wanted - F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0].double().cumsum(-1)
    # Two sums of one block may differ by rounding, so a draw is limited to the end of the last token with nonzero
    # probability.
    wanted = torch.minimum(wanted, inside[:, -1:] * (1 - 1e-15))
    tokens = block * BLOCK + torch.searchsorted(inside, wanted, right=True)
    # NaN logits make searchsorted return V. Clamp, so that the NaN reaches the finite check. Otherwise the out-of-range
    # index would cause an assert on the GPU that ends the process.
    tokens.clamp_(max=logits.shape[-1] - 1)
    log_probs = logits.gather(-1, tokens) - most - sums[:, -1:].log().float()
    return tokens[:, 0], log_probs[:, 0]
