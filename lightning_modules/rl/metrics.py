"""The metrics of a GRPO step. Each is a ratio of two sums, which are added over completions, packed rows and ranks."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from torch import Tensor

from lightning_modules.metrics.step_sums import StepSums
from lightning_modules.rl.losses import LossTerms
from lightning_modules.rl.rewards.reward_list import Reward
from lightning_modules.rollouts.base import Rollout

SUMS = (
    "groups",
    "zero_advantage",  # groups whose rewards are all equal
    "informative",  # groups with a trained completion whose advantage is not 0
    "wanted",  # with refilling: informative groups that the update should have
    "refill_exhausted",  # ranks whose budget of further prompts is spent, and groups are still missing
    "refillable",  # ranks that refill
    "staleness",  # Σ over ranks of the updates between a window's sampling and its training
    "stale",  # ranks that sample ahead
    "completions",
    "completion_tokens",
    "truncated",  # completions without an end token
    "zero_iou",  # completions with IoU 0
    "right",  # completions with an IoU above RIGHT_IOU
    "well_formed",  # completions in the right format
    "rewarded",  # completions of groups without a failed reward
    "failed",  # completions that a reward could not judge
    "left_out",  # completions of groups with a failed reward, which have no advantage
    "neg_log_prob_sum",  # Σ over sampled tokens of -log p
    "reward/total",
    "loss",
    "loss_count",
    "kl",
    "clipped",  # tokens whose surrogate is clipped
    "trained_tokens",
    "sampler_abs_log_ratio",  # Σ |log p of the trainer - log p of the sampler|, before any update
    "capped",  # tokens whose importance weight is clipped
    "compared_tokens",
    "masked",  # tokens whose importance weight is beyond the bounds and set to 0
    "maskable_tokens",
    "token_entropy",  # Σ over trained tokens of the exact entropy
    "entropy_tokens",
    "clipped_completions",  # completions whose ratio per sequence is clipped
    "trained_completions",  # trained completions; counted only with a ratio per sequence
    "kl_penalty",  # Σ over completions of the KL penalty in the reward
    "penalised_completions",
)
# Metric -> (numerator, denominator), names of sums. Metrics of rewards are added by name.
MEANS = {
    "reward/total": ("reward/total", "rewarded"),
    "grpo/completion_length": ("completion_tokens", "completions"),
    "grpo/frac_truncated": ("truncated", "completions"),
    # -log p of sampled tokens is an unbiased estimate of the entropy of the sampling distribution
    "grpo/entropy": ("neg_log_prob_sum", "completion_tokens"),
    "grpo/frac_zero_advantage": ("zero_advantage", "groups"),
    "grpo/loss": ("loss", "loss_count"),
    "grpo/kl": ("kl", "trained_tokens"),
    "grpo/clip_fraction": ("clipped", "trained_tokens"),
    "grpo/sampler_abs_log_ratio": ("sampler_abs_log_ratio", "compared_tokens"),
    "grpo/frac_capped": ("capped", "compared_tokens"),
    # The next metrics belong to settings that are off by default. They are omitted if nothing is counted.
    "grpo/frac_masked": ("masked", "maskable_tokens"),
    "grpo/token_entropy": ("token_entropy", "entropy_tokens"),
    "grpo/sequence_clip_fraction": ("clipped_completions", "trained_completions"),
    "grpo/kl_penalty": ("kl_penalty", "penalised_completions"),
    "grpo/frac_informative": ("informative", "wanted"),
    "grpo/prompts_per_group": ("groups", "wanted"),
    "grpo/refill_exhausted": ("refill_exhausted", "refillable"),
    "grpo/staleness": ("staleness", "stale"),
}


class GRPOMetrics(StepSums):
    """The sums of one step over all ranks, for sampled completions and for trained tokens.

    Args:
        rewards: names of the run's rewards.
    """

    def __init__(self, rewards: Sequence[str] = ("accuracy", "format")) -> None:
        named = tuple(f"reward/{name}" for name in rewards)
        # For each reward: its sum, the sum of its squares, and the numbers of completions with a value, with 0, and
        # with a failure.
        parts = ("", "/square", "/count", "/zero", "/failed")
        super().__init__((*SUMS, *(f"{name}{part}" for name in named for part in parts)))
        self.rewards = named

    def add_rollouts(
        self,
        rollouts: Sequence[Sequence[Rollout]],
        rewards: Sequence[Sequence[Reward]],
        equal_rewards: Tensor,
    ) -> None:
        """Count the sampled completions and their rewards.

        Args:
            rollouts: P lists of G rollouts.
            rewards: P lists of G rewards.
            equal_rewards: bool [P], whether all rewards of a group are equal.
        """
        sums = dict.fromkeys(self.names, 0.0)
        sums["groups"] += len(rollouts)
        sums["zero_advantage"] += sum(equal_rewards.tolist())
        for group, group_rewards in zip(rollouts, rewards, strict=True):
            for rollout, reward in zip(group, group_rewards, strict=True):
                sums["completions"] += 1
                sums["completion_tokens"] += len(rollout.token_ids)
                sums["truncated"] += not rollout.finished
                sums["neg_log_prob_sum"] -= rollout.log_probs.sum().item()
                sums["rewarded"] += not reward.left_out
                sums["left_out"] += reward.left_out
                sums["reward/total"] += reward.total
                sums["zero_iou"] += reward.iou == 0
                sums["right"] += reward.is_right
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
            old_log_probs: [N], computed by the trainer with the policy that sampled.
            sampler_log_probs: [N], computed by the engine.
            is_beyond: bool [N], whether importance weights are beyond their bounds; None without weights.
            masks: whether weights beyond the bounds are set to 0 instead of clipped.
        """
        # [N], log of p_trainer / p_sampler: 0 if engine and trainer agree.
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
        """The metrics of a step, with the names in docs/metrics.md. A mean over nothing (no trained token) is omitted.

        Args:
            sums: as `compute` gives them.
        """
        # Sums are divided only after adding all ranks, because a mean of means would give too much weight to ranks with
        # few tokens.
        ratios = MEANS | {name: (name, f"{name}/count") for name in self.rewards}
        return {name: sums[total] / sums[count] for name, (total, count) in ratios.items() if sums[count]}

    def spreads(self, sums: Mapping[str, float], logged: Container[str] = ()) -> dict[str, float]:
        """For each reward: the standard deviation over completions, the share of zeros, and, after its first failure,
        the share of completions that it could not judge.

        Args:
            sums: as `compute` gives them.
            logged: names of the metrics so far, also of the run that a resumed run continues.
        """
        found = {}
        for name in self.rewards:
            count = sums[f"{name}/count"]
            if count:
                mean = sums[name] / count
                # Rounding can make the difference slightly negative.
                found[f"{name}/std"] = math.sqrt(max(0.0, sums[f"{name}/square"] / count - mean * mean))
                found[f"{name}/zero"] = sums[f"{name}/zero"] / count
            if sums[f"{name}/failed"] or f"{name}/failed" in logged:  # or an old share would be logged for ever
                found[f"{name}/failed"] = sums[f"{name}/failed"] / sums["completions"]
        return found
