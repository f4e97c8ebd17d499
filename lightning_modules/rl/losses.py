"""The objective of GRPO (eq. 2) and its variants, token by token. Pure tensor functions.

A loss consists of three parts: the surrogate as a function of ratio and advantage (`surrogate`), the distance from the
reference (`kl_estimate`), and the reduction of tokens to one number (`reduction_weights`). docs/rl.md has a table of
published objectives.

Shapes: C completions, N tokens of all completions, concatenated. `completion_index` [N] is the index of each token's
completion. Log-probabilities refer to the sampling distribution: logits divided by the temperature, without the banned
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.rl.loss_settings import KLEstimator, LossSettings, Reduction


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the loss of one packed row.

    A completion that is not trained on (zero advantage, masked truncation) has no tokens here, so it is not in
    `LossTerms.count`. With `normalise_over: all`, the caller adds it (`rollout_batch.absent_count`).

    Args:
        log_probs: [N], under the trained policy, with gradient.
        completion_index: [N] long, the index of each token's completion in `advantages`.
        advantages: [C].
        max_new_tokens: length limit of a completion; the reduction "dr_grpo" divides by this constant.
        old_log_probs: [N], under the policy before the first update of the window; the denominator of the ratio. None
            if the policy has not changed since the rollout: then the ratio is 1, with the gradient of `log_probs`.
        ref_log_probs: [N], under the frozen reference model; needed for a KL term in the loss.
        sampler_weights: [N], weights of the surrogate of each token (`sampler_correction.py`); None means 1.
        entropies: [N], entropy of the policy's distribution at each token, with gradient; None if it is not computed.
        kl_beta: β of this update if it is scheduled; None takes the setting.
        entropy_coefficient: entropy coefficient of this update if it is controlled; None takes the setting.
    """

    log_probs: Tensor
    completion_index: Tensor
    advantages: Tensor
    max_new_tokens: int
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    sampler_weights: Tensor | None = None
    entropies: Tensor | None = None
    kl_beta: float | None = None
    entropy_coefficient: float | None = None


@dataclass(frozen=True)
class LossTerms:
    """Sums over a set of completions.

    Terms of disjoint sets can be added: the loss of the union is (sum of totals) / (sum of counts). Packed rows,
    accumulated batches and ranks are combined in this way.
    """

    total: Tensor  # scalar with gradient: Σ over tokens of weight · loss
    count: float  # the divisor of `total`: number of tokens with the reduction "token", otherwise of completions
    num_tokens: int
    kl_sum: float  # Σ over tokens of the KL estimate; 0 without a KL term in the loss
    num_clipped: float  # number of tokens whose surrogate is clipped
    entropy_sum: float | None = None  # Σ over tokens of the entropy; None if it is not computed
    # number of completions with a token here; like the next field, counted only for a ratio per sequence
    num_completions: int = 0
    num_clipped_completions: int = 0

    @property
    def loss(self) -> Tensor:
        """The loss of these terms alone, a scalar; for a window, terms are added first."""
        return self.total / max(self.count, 1.0)


def policy_loss(inputs: LossInputs, settings: LossSettings) -> LossTerms:
    """The negative objective; by default eq. 2 with PPO's clip (arXiv:1707.06347, eq. 7) and the k3 estimate of the KL.

    Args:
        inputs: the trained tokens of one packed row, N tokens of C completions.
        settings: objective, clip range, reduction, KL term and entropy bonus.

    Returns:
        Sums, not means: `total` is divided by the sum of `count` over the window and all ranks. KL and entropy are in
        nats.

    Raises:
        ValueError: there is a KL term, but `ref_log_probs` is None.
    """
    log_probs, index = _at_least_float32(inputs.log_probs), inputs.completion_index
    advantages = inputs.advantages.to(log_probs)[index]  # [N], the advantage of each token's completion
    num_completions = len(inputs.advantages)

    # 1. Surrogate: a function of ratio and advantage, multiplied by the importance weights of the sampler correction.
    token_ratio = probability_ratio(log_probs, inputs.old_log_probs)
    by_sequence = settings.ratio == "sequence"
    ratio = sequence_ratio(log_probs, inputs.old_log_probs, index, num_completions) if by_sequence else token_ratio
    value, is_clipped = surrogate(ratio, log_probs, advantages, settings)
    if inputs.sampler_weights is not None:
        value = inputs.sampler_weights.to(value) * value
    token_loss, kl_sum, entropy_sum = -value, 0.0, None

    # 2. KL term: keeps the policy near the reference model. It has no importance weights.
    beta = settings.kl_beta if inputs.kl_beta is None else inputs.kl_beta
    if beta > 0 and settings.kl_in == "loss":
        if inputs.ref_log_probs is None:
            raise ValueError(f"kl_beta={beta} needs log-probabilities of the reference model, got None")
        kl = kl_estimate(log_probs, inputs.ref_log_probs.to(log_probs), settings.kl_estimator)
        if settings.kl_unbiased:
            kl = token_ratio * kl
        token_loss = token_loss + beta * kl
        kl_sum = kl.detach().sum().item()

    # 3. Entropy bonus: prevents the policy from becoming deterministic too early.
    if inputs.entropies is not None:
        coefficient = inputs.entropy_coefficient
        coefficient = settings.entropy.coefficient if coefficient is None else coefficient
        if coefficient != 0:
            token_loss = token_loss - coefficient * inputs.entropies.to(log_probs)
        entropy_sum = inputs.entropies.detach().sum().item()

    # 4. Reduction: a weighted sum over tokens, and the number by which it is divided at the end of the window.
    weights, count = reduction_weights(
        index, num_completions, settings.reduction, inputs.max_new_tokens, log_probs.dtype
    )
    total = (weights * token_loss).sum()
    terms = LossTerms(total, count, len(log_probs), kl_sum, is_clipped.sum().item(), entropy_sum)
    if by_sequence:
        clipped = len(index[is_clipped].unique())
        terms = replace(terms, num_completions=len(index.unique()), num_clipped_completions=clipped)
    return terms


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
    """π(token) / π_old(token) for each token [N]. Without `old_log_probs`, it is 1 with the gradient of `log_probs`."""
    old = log_probs.detach() if old_log_probs is None else old_log_probs.to(log_probs)
    return torch.exp(log_probs - old)


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor | None, index: Tensor, num_completions: int) -> Tensor:
    """(π(completion) / π_old(completion))^(1/tokens) at each token [N]: GSPO, arXiv:2507.18071, eq. 7.

    Args:
        log_probs: [N].
        old_log_probs: [N]; with None, the ratio is 1, with the gradient of `log_probs`.
        index: [N] long, the completion of each token.
        num_completions: C.
    """
    old = log_probs.detach() if old_log_probs is None else old_log_probs.to(log_probs)
    lengths = torch.bincount(index, minlength=num_completions).clamp(min=1).to(log_probs)  # [C]
    return torch.exp((_sum_by(log_probs - old, index, num_completions) / lengths)[index])


def _sum_by(values: Tensor, index: Tensor, num_completions: int) -> Tensor:
    """Σ of `values` [N] over the tokens of each completion: [C]."""
    return values.new_zeros(num_completions).index_add(0, index, values)


def surrogate(ratio: Tensor, log_probs: Tensor, advantages: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """The surrogate of each token [N], and whether it is clipped (bool [N]).

    Args:
        ratio: [N], per token or per sequence.
        log_probs: [N], with gradient.
        advantages: [N].
        settings: the objective and its bounds.
    """
    if settings.objective == "cispo":
        return cispo_surrogate(ratio, log_probs, advantages, settings.clip_low, settings.clip_high)
    if settings.objective == "sapo":
        gate = sapo_gate(ratio, advantages, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        return gate * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    return clipped_surrogate(ratio, advantages, settings.clip_low, settings.clip_high, settings.dual_clip)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """min(ratio · A, clip(ratio) · A) for each token [N], and whether it is clipped (bool [N]).

    Args:
        ratio: [N].
        advantages: [N].
        clip_low: the ratio is clipped to at least 1 - clip_low; None means no lower clip.
        clip_high: the ratio is clipped to at most 1 + clip_high; None means no upper clip. DAPO's clip-higher
            (arXiv:2503.14476, eq. 10) is clip_high > clip_low.
        dual_clip: upper bound of the ratio for negative advantages; the surrogate is then at least dual_clip · A
            (dual-clip PPO, arXiv:1912.09729, eq. 5); None means no bound.
    """
    plain = surrogate = ratio * advantages  # eq. 2 as it is printed
    if clip_low is not None or clip_high is not None:
        # The minimum makes the bound pessimistic: clipping can only decrease the surrogate.
        low = None if clip_low is None else 1 - clip_low
        high = None if clip_high is None else 1 + clip_high
        surrogate = torch.minimum(plain, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return surrogate, surrogate != plain


def cispo_surrogate(
    ratio: Tensor, log_probs: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """sg(clip(ratio)) · A · log π for each token [N], and whether its weight is clipped (bool [N]).

    CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5): the weight is clipped and has no gradient, so every token keeps
    its gradient of log π. TRL's epsilon_high is the bound itself, 1 + clip_high.

    Args:
        ratio: [N].
        log_probs: [N], with gradient.
        advantages: [N].
        clip_low: the weight is clipped to at least 1 - clip_low; with None, as in the paper, to at least 0.
        clip_high: the weight is clipped to at most 1 + clip_high.
    """
    weight = ratio.detach()
    held = weight.clamp(None if clip_low is None else 1 - clip_low, None if clip_high is None else 1 + clip_high)
    return held * advantages * log_probs, held != weight


def sapo_gate(ratio: Tensor, advantages: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """σ(τ (ratio - 1)) · 4 / τ for each token [N], instead of the ratio: SAPO, arXiv:2511.20347, eq. 6.

    At ratio 1, its gradient equals that of the ratio. It decreases smoothly in both directions.

    Args:
        ratio: [N].
        advantages: [N].
        temperature_pos: τ for advantages above 0.
        temperature_neg: τ for other advantages.
    """
    positive, negative = (torch.full_like(ratio, value) for value in (temperature_pos, temperature_neg))
    temperatures = torch.where(advantages > 0, positive, negative)
    return torch.sigmoid(temperatures * (ratio - 1)) * 4 / temperatures


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """Schulman's estimates of KL(policy | reference) at each sampled token [N], with d = reference - policy.

    k1 = -d is unbiased and may be negative; k2 = d² / 2; k3 = e^d - d - 1 is unbiased and never negative
    ("Approximating KL divergence", 2020). This holds for the values. Their gradients in a loss have other expected
    values: k2 has the gradient of this KL, k3 the gradient of KL(reference | policy), and k1 has gradient 0.
    `kl_unbiased` gives k1 and k3 the gradient of this KL.

    Args:
        log_probs: [N].
        ref_log_probs: [N].
        estimator: k1, k2 or k3.
    """
    difference = ref_log_probs - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.exp(difference) - difference - 1


def reduction_weights(
    completion_index: Tensor,
    num_completions: int,
    reduction: Reduction,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:
    """Weight of each token [N], and the normaliser: a loss is Σ weight · token loss / normaliser.

    Only completions with a token in `completion_index` count.

    Args:
        completion_index: [N] long.
        num_completions: C.
        reduction: "completion", the mean over a completion's tokens, then over completions (GRPO); "token", the mean
            over all tokens (DAPO, arXiv:2503.14476, eq. 8); "dr_grpo", the sum over tokens / max_new_tokens, then the
            mean over completions (arXiv:2503.20783); "completion_sum", the sum over tokens, then the mean over
            completions (with a ratio by sequence LUSPO, arXiv:2602.05261). verl calls these seq-mean-token-mean,
            token-mean, seq-mean-token-sum-norm and seq-mean-token-sum.
        max_new_tokens: length limit of a completion.
        dtype: data type of the weights.
    """
    # [C], number of tokens of each completion; 0 for completions that do not count.
    lengths = torch.bincount(completion_index, minlength=num_completions)
    present = float((lengths > 0).sum())
    ones = torch.ones_like(completion_index, dtype=dtype)
    if reduction == "token":
        return ones, float(len(completion_index))
    if reduction == "completion":
        return lengths[completion_index].to(dtype).reciprocal(), present
    return (ones if reduction == "completion_sum" else ones * (1.0 / max_new_tokens)), present
