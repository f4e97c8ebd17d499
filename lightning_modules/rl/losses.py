"""The objective of GRPO (eq. 2), token by token. Pure tensor functions.

Shapes: C completions, N tokens of all completions laid end to end. `completion_index` [N] says whose each token is.
Log-probabilities are those of the distribution that is sampled from: logits divided by the temperature, without the
banned tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.rl.grpo_settings import LossSettings, Reduction


@dataclass(frozen=True)
class LossInputs:
    """What the loss of one packed row is computed from.

    A completion that must not count (zero advantage, masked truncation) has no token here. So it is not in the
    normaliser either, where eq. 2 and TRL divide by all completions.

    Args:
        log_probs: [N], of the policy that is trained, with gradient.
        completion_index: [N] long, the index of each token's completion in `advantages`.
        advantages: [C].
        max_new_tokens: length limit of a completion, the constant by which the reduction "dr_grpo" divides.
        old_log_probs: [N], of the policy before the window's first update, against which the ratio is taken. None if
            the policy has not moved since the rollout: the ratio is 1, with the gradient of `log_probs`.
        ref_log_probs: [N], of the frozen reference model. Needed where kl_beta > 0.
        sampler_weights: [N], weights of the surrogate of each token (`truncated_importance`); None for 1.
    """

    log_probs: Tensor
    completion_index: Tensor
    advantages: Tensor
    max_new_tokens: int
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    sampler_weights: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """Sums over some completions. Terms of disjoint sets of completions add up: the loss of the union is
    (sum of totals) / (sum of counts), which is how packed rows, accumulation and ranks are combined."""

    total: Tensor  # scalar with gradient: Σ over tokens of weight · loss
    count: float  # what `total` is divided by: completions ("completion", "dr_grpo") or tokens ("token")
    num_tokens: int
    kl_sum: float  # Σ over tokens of k3; 0 without a reference
    num_clipped: float  # tokens whose surrogate is held by the clip

    @property
    def loss(self) -> Tensor:
        return self.total / max(self.count, 1.0)


def policy_loss(inputs: LossInputs, settings: LossSettings) -> LossTerms:
    """Minus eq. 2 with PPO's clip (arXiv:1707.06347, eq. 7) and the k3 estimate of the KL term.

    Raises:
        ValueError: kl_beta > 0 without `ref_log_probs`.
    """
    log_probs = inputs.log_probs.float()
    advantages = inputs.advantages.to(log_probs)[inputs.completion_index]  # [N], of each token's completion

    # 1. Surrogate: ratio times advantage, clipped, and weighted by how likely the trainer finds what was sampled.
    ratio = probability_ratio(log_probs, inputs.old_log_probs)
    surrogate, is_clipped = clipped_surrogate(ratio, advantages, settings.clip_low, settings.clip_high)
    if inputs.sampler_weights is not None:
        surrogate = inputs.sampler_weights.to(surrogate) * surrogate
    token_loss, kl_sum = -surrogate, 0.0

    # 2. KL term: keeps the policy near the reference model. It is not weighted.
    if settings.kl_beta > 0:
        if inputs.ref_log_probs is None:
            raise ValueError(f"kl_beta={settings.kl_beta} needs log-probabilities of the reference model, got None")
        kl = kl_k3(log_probs, inputs.ref_log_probs.float())
        token_loss = token_loss + settings.kl_beta * kl
        kl_sum = kl.detach().sum().item()

    # 3. Reduction: a sum over tokens, and the number that it is divided by once the whole window is known.
    weights, count = reduction_weights(
        inputs.completion_index, len(inputs.advantages), settings.reduction, inputs.max_new_tokens
    )
    total = (weights.to(token_loss) * token_loss).sum()
    return LossTerms(total, count, len(log_probs), kl_sum, is_clipped.sum().item())


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
    """π(token) / π_old(token) for each token [N]. Without `old_log_probs` 1, with the gradient of `log_probs`."""
    old = log_probs.detach() if old_log_probs is None else old_log_probs.float()
    return torch.exp(log_probs - old)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """min(ratio · A, clip(ratio) · A) for each token [N], and whether the clip holds it (bool [N]).

    Args:
        ratio: [N].
        advantages: [N].
        clip_low: the ratio is held at 1 - clip_low or more; None leaves this side open.
        clip_high: the ratio is held at 1 + clip_high or less; None leaves this side open. DAPO's clip-higher
            (arXiv:2503.14476, eq. 10) is clip_high > clip_low.
    """
    surrogate = ratio * advantages
    if clip_low is None and clip_high is None:  # eq. 2 as it is printed
        return surrogate, torch.zeros_like(ratio, dtype=torch.bool)
    # The minimum below makes the bound pessimistic: the clip can only lower the surrogate.
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    bounded = ratio.clamp(low, high) * advantages
    return torch.minimum(surrogate, bounded), bounded < surrogate


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy | reference) at each sampled token: e^d - d - 1, d = reference - policy."""
    difference = ref_log_probs - log_probs
    return torch.exp(difference) - difference - 1


def truncated_importance(old_log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """Weights min(p_trainer / p_sampler, cap) [N] of sampled tokens, without gradient.

    An engine that computes otherwise than the trainer (another kernel, another precision) samples from another
    distribution. The quotient corrects that in the mean, and the cap bounds its variance at the price of a bias
    (Ionides 2008, "Truncated importance sampling"; for rollout engines Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training", with cap 2).

    Args:
        old_log_probs: [N], by the trainer, of the policy that sampled.
        sampler_log_probs: [N], as the engine that sampled states them.
        cap: upper bound of a weight.
    """
    return torch.exp(old_log_probs.detach().float() - sampler_log_probs.float()).clamp(max=cap)


def reduction_weights(
    completion_index: Tensor, num_completions: int, reduction: Reduction, max_new_tokens: int
) -> tuple[Tensor, float]:
    """Weight of each token [N], and the normaliser: a loss is Σ weight · token loss / normaliser.

    Only completions that have a token in `completion_index` count.

    Args:
        completion_index: [N] long.
        num_completions: C.
        reduction: "completion", the mean over a completion's tokens, then over completions (GRPO); "token", the mean
            over all tokens (DAPO, arXiv:2503.14476); "dr_grpo", the sum over tokens / max_new_tokens, then the mean
            over completions (arXiv:2503.20783).
        max_new_tokens: length limit of a completion.
    """
    # [C] tokens of each completion; 0 for one that does not count.
    lengths = torch.bincount(completion_index, minlength=num_completions)
    present = float((lengths > 0).sum())
    if reduction == "token":
        return torch.ones_like(completion_index, dtype=torch.float), float(len(completion_index))
    if reduction == "completion":
        return lengths[completion_index].float().reciprocal(), present
    return torch.full_like(completion_index, 1.0 / max_new_tokens, dtype=torch.float), present
