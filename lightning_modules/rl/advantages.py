"""Advantages of GRPO (eq. 1): how much better a completion is than the others of its prompt.

Shapes: P prompts, G completions of a prompt (its group).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.rl.loss_settings import AdvantageScale

EPSILON = 1e-4  # added to the standard deviation; keeps eq. 1 finite
EQUAL_TOLERANCE = 1e-6  # rewards closer than this are equal: smaller differences are rounding, not preference


def has_equal_rewards(rewards: Tensor) -> Tensor:
    """Whether all rewards of a group in `rewards` [P, G] are equal, up to 1e-6: bool [P]. None of them is preferred."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= EQUAL_TOLERANCE


def group_advantages(rewards: Tensor, scale: AdvantageScale = "group") -> Tensor:
    """Eq. 1: (r - mean) / (std + 1e-4) inside each group, with the unbiased standard deviation; or r - mean.

    Without the division, groups with small differences have less weight (Dr. GRPO, arXiv:2503.20783, section 3.2).

    Two things are added to eq. 1: the 1e-4, and exact zeros for a group of equal rewards, where rounding would
    otherwise leave noise.

    Args:
        rewards: [P, G], float.
        scale: "group" divides by the standard deviation, "none" does not.

    Returns:
        [P, G], float32.

    Raises:
        ValueError: a group has only one completion, so its standard deviation is undefined; or rewards are not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group] with a group of at least 2, got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    exact = rewards.double()
    centred = exact - exact.mean(dim=1, keepdim=True)
    spread = exact.std(dim=1, keepdim=True, unbiased=True) + EPSILON if scale == "group" else 1.0
    return (centred / spread).masked_fill(has_equal_rewards(rewards)[:, None], 0.0).float()
