"""What one GRPO step logs. Every metric is defined here once, as a ratio of sums that add up over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from datamodules.samples.boxes import image_sizes_to_json
from lightning_modules.rl.losses import GRPOTerms
from lightning_modules.rl.rewards import Reward
from lightning_modules.rollouts.base import Rollout

RIGHT_IOU = 0.5  # a completion is right above it, as in the metric


@dataclass
class StepSums:
    """Sums over the rollouts of a step and over what it trained on."""

    completions: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0
    format: float = 0.0
    completion_tokens: float = 0.0
    truncated: float = 0.0  # completions without an end token
    surprise: float = 0.0  # Σ -log p of the sampled tokens
    groups: float = 0.0
    equal_groups: float = 0.0
    loss: float = 0.0
    loss_count: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    trained_tokens: float = 0.0
    mismatch: float = 0.0  # Σ |log p of the trainer - log p of the engine| before any update
    capped: float = 0.0  # tokens whose importance weight is held by its cap
    compared_tokens: float = 0.0
    informative_groups: float = 0.0  # in which a completion that is trained on has an advantage other than 0
    zero_iou: float = 0.0  # completions
    right: float = 0.0  # completions

    def add_groups(
        self, rollouts: Sequence[Sequence[Rollout]], rewards: Sequence[Sequence[Reward]], equal: Tensor
    ) -> None:
        """`equal` [P]: the group's rewards are all equal."""
        for group, group_rewards, is_equal in zip(rollouts, rewards, equal.tolist(), strict=True):
            self.groups += 1
            self.equal_groups += is_equal
            for rollout, parts in zip(group, group_rewards, strict=True):
                self.completions += 1
                self.reward += parts.total
                self.accuracy += parts.accuracy
                self.format += parts.format
                self.zero_iou += parts.accuracy == 0
                self.right += parts.accuracy > RIGHT_IOU
                self.completion_tokens += len(rollout.token_ids)
                self.truncated += not rollout.finished
                self.surprise -= rollout.log_probs.sum().item()

    def add_terms(self, terms: GRPOTerms) -> None:
        self.loss += terms.total.item()
        self.loss_count += terms.count
        self.kl += terms.kl_sum
        self.clipped += terms.clipped
        self.trained_tokens += terms.num_tokens

    def add_engine(self, log_probs: Tensor, engine: Tensor, cap: float | None) -> None:
        """Log-probabilities [N] of sampled tokens, by the trainer as the policy was then, and by the engine."""
        difference = log_probs.detach().float() - engine
        self.mismatch += difference.abs().sum().item()
        self.capped += 0 if cap is None else (difference > math.log(cap)).sum().item()
        self.compared_tokens += len(difference)

    def means(self) -> dict[str, float]:
        """By metric name; a mean of nothing (no token was trained on) is left out."""
        ratios = {
            "reward/total": (self.reward, self.completions),
            "reward/accuracy": (self.accuracy, self.completions),
            "reward/format": (self.format, self.completions),
            "grpo/completion_length": (self.completion_tokens, self.completions),
            "grpo/frac_truncated": (self.truncated, self.completions),
            # -log p of what was sampled is an unbiased estimate of the entropy of the sampling distribution
            "grpo/entropy": (self.surprise, self.completion_tokens),
            "grpo/frac_zero_advantage": (self.equal_groups, self.groups),
            "grpo/loss": (self.loss, self.loss_count),
            "grpo/kl": (self.kl, self.trained_tokens),
            "grpo/clip_fraction": (self.clipped, self.trained_tokens),
            "grpo/engine_mismatch": (self.mismatch, self.compared_tokens),
            "grpo/importance_capped": (self.capped, self.compared_tokens),
        }
        return {name: total / count for name, (total, count) in ratios.items() if count}


def rollout_records(
    items: Sequence[EncodedSample],
    rollouts: Sequence[Sequence[Rollout]],
    rewards: Sequence[Sequence[Reward]],
    advantages: Tensor,
    equal: Tensor,
) -> list[dict[str, Any]]:
    """One JSON-like record for each group; advantages [P, G], equal [P]."""
    return [
        {
            "id": item.sample.id,
            "task": item.sample.task,
            "answer": item.sample.to_json()["answer"],
            "sizes": image_sizes_to_json(item.image_sizes),
            "texts": [rollout.text for rollout in rollouts[index]],
            "rewards": [asdict(parts) for parts in rewards[index]],
            "advantages": advantages[index].tolist(),
            "equal": bool(equal[index]),
        }
        for index, item in enumerate(items)
    ]
