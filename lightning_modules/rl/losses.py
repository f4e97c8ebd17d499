"""The mathematics of GRPO: advantages (eq. 1) and the objective (eq. 2). Pure tensor functions.

Tensor legend: P prompts, G completions of a prompt (its group), C = completions, N = tokens of all completions laid
end to end. Every token of N carries the index of its completion. Log-probabilities are those of the sampling
distribution: divided by the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["completion", "token", "dr_grpo"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
EPSILON = 1e-4  # keeps eq. 1 finite; added to the standard deviation
EQUAL_TOLERANCE = 1e-6  # rewards closer than this are one reward: below it differences are rounding, not preference


def equal_groups(rewards: Tensor) -> Tensor:
    """Bool [P]: groups of `rewards` [P, G] whose rewards are all equal, whatever their value, and so teach nothing."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= EQUAL_TOLERANCE


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 1 for `rewards` [P, G] (float): (r - mean) / (std + 1e-4) in each group, unbiased std; float32 [P, G].

    Added to eq. 1: the 1e-4, and exact zeros for a group of equal rewards (float rounding would leave noise there).
    Raises ValueError for a group of one (its std is undefined) and for rewards that are not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group] with a group of at least 2, got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    exact = rewards.double()
    centred = exact - exact.mean(dim=1, keepdim=True)
    advantages = centred / (exact.std(dim=1, keepdim=True, unbiased=True) + EPSILON)
    return advantages.masked_fill(equal_groups(rewards)[:, None], 0.0).float()


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy | reference) at each sampled token: e^d - d - 1, d = reference - policy."""
    difference = reference - log_probs
    return torch.exp(difference) - difference - 1


def truncated_importance(log_probs: Tensor, engine: Tensor, cap: float) -> Tensor:
    """Weights min(p_trainer / p_engine, cap) [N] of sampled tokens, without gradient.

    `log_probs` are the trainer's under the policy that sampled, `engine` those that the engine says it sampled with. An
    engine that computes otherwise (another kernel, another precision) samples from another distribution; the quotient
    puts that right in the mean, and the cap bounds its variance at the price of a bias (Ionides 2008, "Truncated
    importance sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training", with cap 2).
    """
    return torch.exp(log_probs.detach().float() - engine.float()).clamp(max=cap)


@dataclass(frozen=True)
class GRPOTerms:
    """Sums over some completions. Terms of disjoint sets of completions add up: the loss of the union is
    (sum of totals) / (sum of counts), which is how micro-batches, accumulation and ranks are combined."""

    total: Tensor  # scalar with gradient: Σ over tokens of weight · loss
    count: float  # what `total` is divided by: completions ("completion", "dr_grpo") or tokens ("token")
    num_tokens: int
    kl_sum: float  # Σ over tokens of k3; 0 without a reference
    clipped: float  # tokens whose surrogate is held by the clip

    @property
    def loss(self) -> Tensor:
        return self.total / max(self.count, 1.0)


def grpo_loss(
    log_probs: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    completion: Tensor,
    advantages: Tensor,
    beta: float,
    clip_range: float | None,
    reduction: Reduction = "completion",
    max_tokens: int | None = None,
    importance: Tensor | None = None,
) -> GRPOTerms:
    """Minus eq. 2, token by token, with PPO's clip and the k3 estimate of the KL term.

    log_probs [N] with gradient; old [N], or None when the policy has not moved since the rollout (the ratio is then
    1 with the gradient of log_probs); reference [N], needed when beta > 0; completion [N] long, the index of each
    token's completion into advantages [C]. Tokens of completions that must not count (equal groups, masked
    truncations) are left out by the caller, and so out of the normaliser too: eq. 2 and TRL divide by all of them.

    clip_range ε bounds the ratio to 1 ± ε; None is eq. 2 literally. reduction: "completion", mean over a completion's
    tokens, then over completions; "token" (DAPO), mean over all tokens; "dr_grpo", sum over tokens / max_tokens, mean
    over completions. importance [N] multiplies each token's surrogate, not its KL term (`truncated_importance`).
    Raises ValueError for an unknown reduction or a missing reference or max_tokens.
    """
    log_probs = log_probs.float()
    old = log_probs.detach() if old is None else old.float()
    ratio = torch.exp(log_probs - old)
    advantage = advantages.to(log_probs)[completion]
    surrogate = ratio * advantage
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_range is not None:
        bounded = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
        clipped = bounded < surrogate
        surrogate = torch.minimum(surrogate, bounded)
    if importance is not None:
        surrogate = importance.to(surrogate) * surrogate
    token_loss, kl_sum = -surrogate, 0.0
    if beta > 0:
        if reference is None:
            raise ValueError(f"beta={beta} needs reference log-probabilities, got None")
        kl = kl_k3(log_probs, reference.float())
        token_loss = token_loss + beta * kl
        kl_sum = kl.detach().sum().item()
    weights, count = reduction_weights(completion, len(advantages), reduction, max_tokens)
    return GRPOTerms((weights.to(token_loss) * token_loss).sum(), count, len(log_probs), kl_sum, clipped.sum().item())


def reduction_weights(
    completion: Tensor, num_completions: int, reduction: Reduction, max_tokens: int | None = None
) -> tuple[Tensor, float]:
    """Weight of each token [N] before normalising, and the normaliser: a loss is Σ weight · token loss / normaliser.

    Only completions that have a token in `completion` count.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    lengths = torch.bincount(completion, minlength=num_completions)
    present = float((lengths > 0).sum())
    if reduction == "token":
        return torch.ones_like(completion, dtype=torch.float), float(len(completion))
    if reduction == "completion":
        return lengths[completion].float().reciprocal(), present
    if not max_tokens:
        raise ValueError(f"reduction 'dr_grpo' needs max_tokens, got {max_tokens}")
    return torch.full_like(completion, 1.0 / max_tokens, dtype=torch.float), present
