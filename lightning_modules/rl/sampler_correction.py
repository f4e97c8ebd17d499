"""Weights that correct for an engine that samples from another distribution than the trainer computes.

Shapes: C completions, N tokens of all completions laid end to end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.rl.grpo_settings import ImportanceMode


def sampler_correction(
    old_log_probs: Tensor,
    sampler_log_probs: Tensor,
    completion_index: Tensor,
    mode: ImportanceMode,
    cap: float,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights p_trainer / p_sampler [N] of sampled tokens within bounds, without gradient, and where they were beyond.

    An engine that computes otherwise than the trainer (another kernel, another precision) samples from another
    distribution. The quotient corrects that in the mean, and the cap bounds its variance at the price of a bias
    (Ionides 2008, "Truncated importance sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training", with cap 2). By sequence, the quotient is that of the whole completion
    (Liu et al. 2025, "When speed kills stability", who mask it).

    Args:
        old_log_probs: [N], by the trainer, of the policy that sampled.
        sampler_log_probs: [N], as the engine that sampled states them.
        completion_index: [N] long, the completion of each token.
        mode: the quotient is by token or by sequence; beyond the bounds it is held there (truncate) or 0 (mask).
        cap: upper bound of a weight.
        floor: lower bound; None: none.

    Returns:
        Weights [N], and bool [N], which of them the bounds have changed.
    """
    difference = old_log_probs.detach().float() - sampler_log_probs.float()
    if mode.startswith("sequence"):
        sums = difference.new_zeros(int(completion_index.max()) + 1)  # [C]
        difference = sums.index_add(0, completion_index, difference)[completion_index]
    weights = torch.exp(difference)
    is_beyond = weights > cap
    if floor is not None:
        is_beyond = is_beyond | (weights < floor)
    if mode.endswith("mask"):
        return weights.masked_fill(is_beyond, 0.0), is_beyond
    return weights.clamp(min=floor, max=cap), is_beyond
