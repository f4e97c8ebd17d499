"""GRPO's settings of sampling and updates: `model.init_args.update.minibatches` in a YAML, or
`--model.update.minibatches=2`. The settings of advantage and loss are in `loss_settings`.

Each class checks its own fields. `experiments.train` reports the problems of all classes together (`collect_problems`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from datamodules.persistence.problems import Problems
from lightning_modules.rollouts.base import SamplingSettings
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings

if TYPE_CHECKING:
    from lightning_modules.rl.loss_settings import LossSettings

ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Engine = Literal["native", "vllm"]
OldLogProbs = Literal["trainer", "sampler"]


@dataclass(frozen=True)
class RolloutSettings(SamplingSettings):
    """Sampling of completions, and their log. group_size, temperature, max_new_tokens and prompts_per_batch are
    described in `SamplingSettings`.

    Args:
        engine: "native" samples in this process, "vllm" on the servers that `vllm` names (docs/rollout_engines.md).
        vllm: the servers; used only with engine "vllm".
        staleness: with engine "vllm", the number of accumulation windows (0, 1 or 2) that the servers sample ahead,
            while the trainer updates (`sampling_ahead`). The policy of a completion is that many windows old, so
            `update.importance_cap` is needed.
        kv_cache_gib: most memory of the key-value cache of the native engine. All prompts of an accumulation window are
            sampled together, with memory for `prompts_per_batch` of them at full length; the run ends before its first
            step if this could be more. null: no limit.
        log: JSONL file for the sampled groups, read by `make compare`; a relative path is relative to the phase's
            folder. null writes no log.
        log_every: write the groups of every `log_every`-th batch.
    """

    engine: Engine = "native"
    vllm: VLLMSettings = VLLMSettings()
    staleness: int = 0
    kv_cache_gib: float | None = None
    log: str | None = None
    log_every: int = 1

    part: ClassVar[str] = "rollout"

    def problems(self) -> Problems:
        """Messages for all invalid settings."""
        problems = super().problems()
        problems.require(self.group_size != 1, ": an advantage needs a group of at least 2", group_size=self.group_size)
        problems.positive(log_every=self.log_every)
        problems.positive_or_null(kv_cache_gib=self.kv_cache_gib)
        problems.one_of(get_args(Engine), engine=self.engine)
        problems.one_of((0, 1, 2), staleness=self.staleness)
        rule = ": the native engine samples in the process that trains, so it cannot sample ahead"
        problems.require(
            self.staleness == 0 or self.engine == "vllm", rule, staleness=self.staleness, engine=self.engine
        )
        return problems


@dataclass(frozen=True)
class UpdateSettings:
    """Training on an accumulation window of rollouts.

    A window is used `epochs_per_rollout` times, each time with `minibatches` updates. If there is one update in total,
    the policy does not change between sampling and training: the ratio is 1, and rollouts are not kept. With more
    updates, the denominator of the ratio is the probability under the policy that sampled.

    Args:
        epochs_per_rollout: number of times that each completion is used.
        minibatches: number of updates in one epoch over the window.
        old_log_probs: source of the denominator of the ratio if there are several updates: "trainer" computes it again
            before the first update, "sampler" uses the values from the rollout engine.
        skip_zero_advantage: skip groups whose rewards are all equal; False trains on them for their KL term. A group
            without rewards, because one of them failed, is always skipped.
        mask_truncated: skip completions that were cut at the length limit. They still count in the mean reward of their
            group. `loss.normalise_over` decides whether these completions and skipped groups count in the normaliser of
            the loss.
        importance_cap: C, the upper bound of importance weights that correct the difference between engine and trainer
            (`sampler_correction.py`); null uses no weights.
        importance_floor: the lower bound of these weights; null means no lower bound.
        importance_mode: weights per "token" or per "sequence". Weights beyond the bounds are clipped ("truncate") or
            set to 0 ("mask"). TRL's vllm_importance_sampling_mode has the same four values.
        refill_windows: the budget of refilled dynamic sampling (`refill`): groups that teach nothing are replaced by
            further prompts, until an update has as many informative groups as its window has prompts, or until the
            further prompts are this number of windows. 0 does not refill.
        max_idle_windows: after this number of windows in a row without an informative group (`idle_windows`), the run
            ends with IdleTooLong; null means no limit. A resumed run continues counting.
    """

    epochs_per_rollout: int = 1
    minibatches: int = 1
    old_log_probs: OldLogProbs = "trainer"
    skip_zero_advantage: bool = True
    mask_truncated: bool = False
    importance_cap: float | None = None
    importance_floor: float | None = None
    importance_mode: ImportanceMode = "token_truncate"
    refill_windows: int = 0
    max_idle_windows: int | None = 100

    @property
    def updates_per_window(self) -> int:
        return self.epochs_per_rollout * self.minibatches

    def __post_init__(self) -> None:
        problems = Problems("update.")
        problems.positive(epochs_per_rollout=self.epochs_per_rollout, minibatches=self.minibatches)
        problems.at_least(0, refill_windows=self.refill_windows)
        problems.require(
            self.refill_windows == 0 or self.skip_zero_advantage,
            f"with skip_zero_advantage={self.skip_zero_advantage}: only groups that are skipped can be replaced",
            refill_windows=self.refill_windows,
        )
        problems.positive_or_null(importance_cap=self.importance_cap, max_idle_windows=self.max_idle_windows)
        problems.one_of(get_args(OldLogProbs), old_log_probs=self.old_log_probs)
        problems.one_of(get_args(ImportanceMode), importance_mode=self.importance_mode)
        problems.require(
            self.importance_floor is None or 0 < self.importance_floor < (self.importance_cap or 0),
            "must be between 0 and importance_cap, or null",
            importance_floor=self.importance_floor,
            importance_cap=self.importance_cap,
        )
        ratio_has_it = self.updates_per_window > 1 and self.old_log_probs == "sampler"
        problems.require(
            self.importance_cap is None or not ratio_has_it,
            f"with {self.updates_per_window} updates to a window: the quotient is in the ratio already",
            importance_cap=self.importance_cap,
            old_log_probs=self.old_log_probs,
        )
        problems.raise_all("update")


def problems_between(rollout: RolloutSettings, loss: LossSettings, update: UpdateSettings) -> Problems:
    """Messages for valid settings that exclude each other."""
    problems, refills = Problems(), update.refill_windows
    problems.require(
        refills == 0 or loss.normalise_over == "kept",
        f"with update.refill_windows={refills}: groups that are replaced cannot count in the mean too; use 'kept', or "
        "0 windows",
        **{"loss.normalise_over": loss.normalise_over},
    )
    stale = {"rollout.staleness": rollout.staleness}
    is_in_ratio = update.updates_per_window > 1 and update.old_log_probs == "sampler"
    problems.require(
        rollout.staleness == 0 or update.importance_cap is not None or is_in_ratio,
        ": an older policy has sampled, which needs the correction; set update.importance_cap, such as 2.0",
        **stale | {"update.importance_cap": update.importance_cap},
    )
    problems.require(
        rollout.staleness == 0 or refills == 0,
        ": a window cannot be refilled when the next one is sampled already; set one of them to 0",
        **stale | {"update.refill_windows": refills},
    )
    return problems
