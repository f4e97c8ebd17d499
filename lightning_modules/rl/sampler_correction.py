"""Importance weights for an engine whose sampling distribution differs from that of the trainer.

Shapes: C completions, N tokens of all completions, concatenated.
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
    """Importance weights p_trainer / p_sampler [N] within bounds, without gradient, and whether they were beyond the
    bounds.

    An engine with other kernels or another precision than the trainer samples from a slightly different distribution.
    The ratio corrects this in expectation, and the cap limits its variance at the cost of a bias (Ionides 2008,
    "Truncated importance sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training", with cap 2). Per sequence, the ratio is that of the whole completion (Liu et al. 2025,
    "When speed kills stability", who mask it).

    Args:
        old_log_probs: [N], computed by the trainer with the policy that sampled.
        sampler_log_probs: [N], computed by the engine.
        completion_index: [N] long, the completion of each token.
        mode: ratio per token or per sequence; beyond the bounds it is clipped (truncate) or set to 0 (mask).
        cap: upper bound of a weight.
        floor: lower bound; None means no bound.

    Returns:
        Weights [N], and bool [N], whether the bounds have changed them.
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
