"""What one GRPO step logs: every metric is a ratio of two sums that add up over completions, packed rows and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_modules.metrics.step_sums import StepSums
from lightning_modules.rl.losses import LossTerms
from lightning_modules.rl.rewards.reward_list import Reward
from lightning_modules.rollouts.base import Rollout

RIGHT_IOU = 0.5  # a completion is right if its IoU is above it, as in the benchmark

SUMS = (
    "groups",
    "zero_advantage",  # groups whose rewards are all equal
    "informative",  # groups in which a completion that is trained on has an advantage other than 0
    "completions",
    "completion_tokens",
    "truncated",  # completions without an end token
    "zero_iou",  # completions
    "right",  # completions
    "well_formed",  # completions
    "rewarded",  # completions of groups that no failed reward leaves out
    "failed",  # completions that a reward could not judge
    "neg_log_prob_sum",  # Σ over sampled tokens of -log p
    "reward/total",
    "loss",
    "loss_count",
    "kl",
    "clipped",  # tokens whose surrogate is held by the clip
    "trained_tokens",
    "sampler_abs_log_ratio",  # Σ |log p of the trainer - log p of the sampler|, before any update
    "capped",  # tokens whose importance weight is held by its bounds
    "compared_tokens",
    "masked",  # tokens whose importance weight is beyond its bounds and therefore 0
    "maskable_tokens",
    "token_entropy",  # Σ over trained tokens of the exact entropy
    "entropy_tokens",
    "clipped_completions",  # whose ratio by sequence is held by the clip
    "trained_completions",  # counted with a ratio by sequence only
    "kl_penalty",  # Σ over completions of what the KL term takes from the reward
    "penalised_completions",
)
# Metric -> (sum, what it is divided by). Each reward is added by its name.
MEANS = {
    "reward/total": ("reward/total", "rewarded"),
    "grpo/completion_length": ("completion_tokens", "completions"),
    "grpo/frac_truncated": ("truncated", "completions"),
    # -log p of what was sampled is an unbiased estimate of the entropy of the sampling distribution
    "grpo/entropy": ("neg_log_prob_sum", "completion_tokens"),
    "grpo/frac_zero_advantage": ("zero_advantage", "groups"),
    "grpo/loss": ("loss", "loss_count"),
    "grpo/kl": ("kl", "trained_tokens"),
    "grpo/clip_fraction": ("clipped", "trained_tokens"),
    "grpo/sampler_abs_log_ratio": ("sampler_abs_log_ratio", "compared_tokens"),
    "grpo/frac_capped": ("capped", "compared_tokens"),
    # The next ones are of settings that are off by default: they are left out where nothing is counted.
    "grpo/frac_masked": ("masked", "maskable_tokens"),
    "grpo/token_entropy": ("token_entropy", "entropy_tokens"),
    "grpo/sequence_clip_fraction": ("clipped_completions", "trained_completions"),
    "grpo/kl_penalty": ("kl_penalty", "penalised_completions"),
}


class GRPOMetrics(StepSums):
    """The sums of one step, over its completions and over what it trained on, of all ranks.

    Args:
        rewards: names of the run's rewards.
    """

    def __init__(self, rewards: Sequence[str] = ("accuracy", "format")) -> None:
        named = tuple(f"reward/{name}" for name in rewards)
        # Of each reward: its sum, the sum of its squares, and how many completions have a value, 0, or a failure.
        parts = ("", "/square", "/count", "/zero", "/failed")
        super().__init__((*SUMS, *(f"{name}{part}" for name in named for part in parts)))
        self.rewards = named
        self._has_failed: set[str] = set()  # rewards whose failures are logged from now on, 0 too

    def add_rollouts(
        self,
        rollouts: Sequence[Sequence[Rollout]],
        rewards: Sequence[Sequence[Reward]],
        zero_advantage: Tensor,
    ) -> None:
        """Count what was sampled and how it was rewarded.

        Args:
            rollouts: P lists of G.
            rewards: P lists of G.
            zero_advantage: bool [P], the groups of equal rewards.
        """
        sums = dict.fromkeys(self.names, 0.0)
        sums["groups"] += len(rollouts)
        sums["zero_advantage"] += sum(zero_advantage.tolist())
        for group, group_rewards in zip(rollouts, rewards, strict=True):
            for rollout, reward in zip(group, group_rewards, strict=True):
                sums["completions"] += 1
                sums["completion_tokens"] += len(rollout.token_ids)
                sums["truncated"] += not rollout.finished
                sums["neg_log_prob_sum"] -= rollout.log_probs.sum().item()
                sums["rewarded"] += not reward.left_out
                sums["reward/total"] += reward.total
                sums["zero_iou"] += reward.iou == 0
                sums["right"] += reward.iou > RIGHT_IOU
                sums["well_formed"] += reward.well_formed
                sums["failed"] += bool(reward.failed)
                for name, value in reward.terms.items():
                    sums[f"reward/{name}/failed"] += name in reward.failed
                    if value is not None:
                        sums[f"reward/{name}"] += value
                        sums[f"reward/{name}/square"] += value * value
                        sums[f"reward/{name}/count"] += 1
                        sums[f"reward/{name}/zero"] += value == 0
        self.update(**sums)

    def add_loss(self, terms: LossTerms) -> None:
        """Count the loss of one packed row."""
        self.update(
            loss=terms.total.item(),
            loss_count=terms.count,
            kl=terms.kl_sum,
            clipped=terms.num_clipped,
            trained_tokens=terms.num_tokens,
            token_entropy=terms.entropy_sum or 0.0,
            entropy_tokens=0 if terms.entropy_sum is None else terms.num_tokens,
            clipped_completions=terms.num_clipped_completions,
            trained_completions=terms.num_completions,
        )

    def add_sampler(
        self, old_log_probs: Tensor, sampler_log_probs: Tensor, is_beyond: Tensor | None = None, masks: bool = False
    ) -> None:
        """Compare the trainer's log-probabilities with those of the engine that sampled.

        Args:
            old_log_probs: [N], by the trainer, of the policy that sampled.
            sampler_log_probs: [N], by the engine.
            is_beyond: bool [N], where importance weights are beyond their bounds; None where there are none.
            masks: weights beyond the bounds are 0, and not held there.
        """
        # [N], log of p_trainer / p_sampler: 0 if engine and trainer compute alike.
        difference = old_log_probs.detach().float() - sampler_log_probs
        num_beyond = 0 if is_beyond is None else is_beyond.sum().item()
        self.update(
            sampler_abs_log_ratio=difference.abs().sum().item(),
            capped=0 if masks else num_beyond,
            compared_tokens=len(difference),
            masked=num_beyond if masks else 0,
            maskable_tokens=len(difference) if masks else 0,
        )

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step, by the names in docs/metrics.md. A mean of nothing (no token was trained on) is left
        out.

        Args:
            sums: as `compute` gives them.
        """
        # Sums are divided only after all ranks are added: a mean of means would weight short ranks too much.
        ratios = MEANS | {name: (name, f"{name}/count") for name in self.rewards}
        return {name: sums[total] / sums[count] for name, (total, count) in ratios.items() if sums[count]}

    def spreads(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Of each reward: its standard deviation over the completions, its share of zeros, and, from its first failure
        on, the share of completions that it could not judge.

        Args:
            sums: as `compute` gives them.
        """
        found = {}
        for name in self.rewards:
            count = sums[f"{name}/count"]
            if count:
                mean = sums[name] / count
                # Rounding can make the difference slightly negative.
                found[f"{name}/std"] = math.sqrt(max(0.0, sums[f"{name}/square"] / count - mean * mean))
                found[f"{name}/zero"] = sums[f"{name}/zero"] / count
            if sums[f"{name}/failed"] or name in self._has_failed:
                self._has_failed.add(name)
                found[f"{name}/failed"] = sums[f"{name}/failed"] / sums["completions"]
        return found
