"""GRPO's settings of advantage and loss: `model.init_args.loss.kl_beta` in a YAML, or `--model.loss.kl_beta=0.01`.

Each class checks its own fields (see `grpo_settings`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from datamodules.persistence.problems import Problems

Reduction = Literal["completion", "token", "dr_grpo", "completion_sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
Objective = Literal["clip", "cispo", "sapo"]
Ratio = Literal["token", "sequence"]
KLPlace = Literal["loss", "reward"]
KLEstimator = Literal["k1", "k2", "k3"]
NormaliseOver = Literal["kept", "all"]
AdvantageScale = Literal["group", "none"]
ScheduleKind = Literal["constant", "linear", "cosine"]
# Why `reference_every` cannot be used with sharded layers.
FIXED_REFERENCE = "the reference of a sharded policy cannot be refreshed; use ddp or one device"


@dataclass(frozen=True)
class AdvantageSettings:
    """Eq. 1 and its variants (`advantages.group_advantages`).

    Args:
        scale: "group" divides by the standard deviation of the group, as eq. 1 does; "none" does not, as in Dr. GRPO
            (arXiv:2503.20783, section 3.2). TRL calls it scale_rewards, verl norm_adv_by_std_in_grpo.
    """

    scale: AdvantageScale = "group"

    def __post_init__(self) -> None:
        problems = Problems("advantage.")
        problems.one_of(get_args(AdvantageScale), scale=self.scale)
        problems.raise_all("advantage")


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule of a coefficient from its initial value to `final` (`coefficients.scheduled`).

    Args:
        kind: "constant" does not change; "linear" is a straight line; "cosine" is half a cosine.
        final: value after the last update of the schedule; not used with kind "constant".
        updates: length of the schedule in optimizer updates; later updates have `final`. null means all updates of the
            run.
    """

    kind: ScheduleKind = "constant"
    final: float = 0.0
    updates: int | None = None

    def problems(self, prefix: str) -> Problems:
        problems = Problems(prefix)
        problems.one_of(get_args(ScheduleKind), kind=self.kind)
        problems.require(self.final >= 0, "must not be negative", final=self.final)
        problems.positive_or_null(updates=self.updates)
        return problems


@dataclass(frozen=True)
class EntropySettings:
    """The entropy bonus: coefficient · entropy is added to the objective (arXiv:1602.01783, section 4).

    The entropy of a token is the exact entropy of its sampling distribution. It is reduced over tokens in the same way
    as the rest of the loss. With a `target`, a controller changes the coefficient (Skywork-OR1, arXiv:2505.22312; TRL's
    use_adaptive_entropy): after each update, the coefficient increases by `step` if the entropy is at or below the
    target, and decreases by `step` if it is above. The bonus is added only after an update at or below the target.

    Args:
        coefficient: weight of the bonus; with a target, its initial value. TRL: entropy_coef, verl: entropy_coeff.
        target: desired mean entropy of trained tokens, in nats; null keeps the coefficient constant.
        step: change of the coefficient in an update.
        lowest: smallest coefficient of the controller.
        highest: largest coefficient of the controller.
    """

    coefficient: float = 0.0
    target: float | None = None
    step: float = 0.005
    lowest: float = 0.0
    highest: float = 1.0

    @property
    def is_on(self) -> bool:
        """Whether the loss needs the entropy of tokens."""
        return self.coefficient != 0 or self.target is not None

    def problems(self, prefix: str) -> Problems:
        problems = Problems(prefix)
        problems.require(self.coefficient >= 0, "must not be negative", coefficient=self.coefficient)
        problems.positive_or_null(target=self.target)
        problems.positive(step=self.step)
        problems.require(
            self.target is None or 0 <= self.lowest <= self.coefficient <= self.highest,
            "must be 0 <= lowest <= coefficient <= highest",
            lowest=self.lowest,
            coefficient=self.coefficient,
            highest=self.highest,
        )
        return problems


@dataclass(frozen=True)
class LossSettings:
    """The objective, eq. 2 and its variants (`losses.policy_loss`). docs/rl.md explains when to use each setting.

    Args:
        kl_beta: β, the weight of the KL term. With 0 there is no KL term, and no reference model is needed.
        clip_low: ε of the lower clip: the ratio is clipped to at least 1 - clip_low; null means no lower clip.
        clip_high: ε of the upper clip: the ratio is clipped to at most 1 + clip_high; null means no upper clip. If both
            are null, the objective is eq. 2 as it is printed. DAPO's clip-higher is clip_high > clip_low.
        reduction: the reduction from tokens to one number: completion, token, dr_grpo or completion_sum
            (`losses.reduction_weights`).
        objective: the surrogate as a function of ratio and advantage: "clip", PPO's minimum (arXiv:1707.06347, eq. 7);
            "cispo" (arXiv:2506.13585, eq. 4); "sapo" (arXiv:2511.20347, eq. 5).
        ratio: the ratio is computed per "token" (GRPO) or once per completion, "sequence" (GSPO, arXiv:2507.18071, eq.
            7). TRL calls it importance_sampling_level.
        dual_clip: for negative advantages, the surrogate is clipped to at least dual_clip · advantage (dual-clip PPO,
            arXiv:1912.09729). TRL calls it delta, verl clip_ratio_c; null means no such bound.
        sapo_temperature_pos: τ of SAPO's gate for advantages above 0.
        sapo_temperature_neg: τ for the others.
        kl_in: "loss" adds β · KL to each token's loss; "reward" subtracts β · Σ KL of a completion from its reward,
            before eq. 1 (verl's use_kl_in_reward).
        kl_estimator: k1, k2 or k3 (`losses.kl_estimate`).
        kl_unbiased: multiply a token's KL estimate by its ratio, so that the gradient is that of the true KL
            (arXiv:2512.02556, eq. 7). TRL calls it use_bias_correction_kl.
        kl_schedule: the schedule of β, from `kl_beta` to its `final`.
        entropy: the entropy bonus.
        normalise_over: the completions or tokens that count in the mean: "kept" counts those that are trained on; "all"
            counts every sampled one, as in eq. 2 and TRL (docs/paper_contradictions.md). For completions that
            `update.mask_truncated` skips, "all" counts the completion but not its tokens, as in TRL.
        reference_every: after each such number of updates, the reference is replaced by the present policy
            (`models/reference.py`; TRL's sync_ref_model with ref_model_mixup_alpha 1). null keeps the initial
            reference.
    """

    kl_beta: float = 0.001
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    reduction: Reduction = "completion"
    objective: Objective = "clip"
    ratio: Ratio = "token"
    dual_clip: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    kl_in: KLPlace = "loss"
    kl_estimator: KLEstimator = "k3"
    kl_unbiased: bool = False
    kl_schedule: ScheduleSettings = ScheduleSettings()
    entropy: EntropySettings = EntropySettings()
    normalise_over: NormaliseOver = "kept"
    reference_every: int | None = None

    @property
    def has_kl(self) -> bool:
        """Whether β is above 0 at any update."""
        return self.kl_beta > 0 or (self.kl_schedule.kind != "constant" and self.kl_schedule.final > 0)

    def __post_init__(self) -> None:
        problems = Problems("loss.")
        problems.require(self.kl_beta >= 0, "must not be negative", kl_beta=self.kl_beta)
        low = self.clip_low
        problems.require(low is None or 0 < low < 1, "must be in (0, 1), or null", clip_low=low)
        problems.positive_or_null(clip_high=self.clip_high, reference_every=self.reference_every)
        problems.one_of(REDUCTIONS, reduction=self.reduction)
        problems.one_of(get_args(Objective), objective=self.objective)
        problems.one_of(get_args(Ratio), ratio=self.ratio)
        problems.one_of(get_args(KLPlace), kl_in=self.kl_in)
        problems.one_of(get_args(KLEstimator), kl_estimator=self.kl_estimator)
        problems.one_of(get_args(NormaliseOver), normalise_over=self.normalise_over)
        problems.positive(
            sapo_temperature_pos=self.sapo_temperature_pos, sapo_temperature_neg=self.sapo_temperature_neg
        )
        self._require_terms_that_fit(problems)
        problems.extend(self.kl_schedule.problems("loss.kl_schedule."))
        problems.extend(self.entropy.problems("loss.entropy."))
        problems.raise_all("loss")

    def _require_terms_that_fit(self, problems: Problems) -> None:
        """Add the combinations of settings that cannot work together."""
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        problems.require(
            self.objective != "sapo" or (self.clip_low is None and self.clip_high is None),
            ": SAPO has a gate in place of the clip; set both to null",
            objective=self.objective,
            **clip,
        )
        problems.require(
            self.objective != "cispo" or self.clip_high is not None,
            ": CISPO needs the upper bound of its weights",
            objective=self.objective,
            clip_high=self.clip_high,
        )
        problems.require(
            self.objective == "clip" or self.ratio == "token",
            ": only objective='clip' has a ratio by sequence",
            objective=self.objective,
            ratio=self.ratio,
        )
        problems.require(
            self.dual_clip is None or (self.objective == "clip" and self.dual_clip > 1 + (self.clip_high or 0)),
            "must be greater than 1 + clip_high, with objective='clip'; or null",
            dual_clip=self.dual_clip,
            objective=self.objective,
        )
        problems.require(
            not (self.kl_unbiased and self.kl_in == "reward"),
            ": a reward is not differentiated, so there is nothing to correct",
            kl_unbiased=self.kl_unbiased,
            kl_in=self.kl_in,
        )
        problems.require(
            self.reference_every is None or self.has_kl,
            ": without a KL term there is no reference",
            reference_every=self.reference_every,
            kl_beta=self.kl_beta,
        )
