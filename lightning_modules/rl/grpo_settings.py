"""GRPO's settings of sampling and updates, as they stand in a YAML: `model.init_args.update.minibatches`,
`--model.update.minibatches=2`. Those of advantage and loss are in `loss_settings`.

Each class checks its own fields. `experiments.train` tells the problems of all of them at once (`collect_problems`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from datamodules.persistence.problems import Problems
from lightning_modules.rollouts.base import SamplingSettings
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings

ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Engine = Literal["native", "vllm"]
OldLogProbs = Literal["trainer", "sampler"]


@dataclass(frozen=True)
class RolloutSettings(SamplingSettings):
    """How completions are sampled, and where they are kept; group_size, temperature, max_new_tokens and
    prompts_per_batch are those of `SamplingSettings`.

    Args:
        engine: "native" samples in this process, "vllm" on the servers that `vllm` names (docs/rollout_engines.md).
        vllm: the servers; read with engine "vllm" only.
        log: JSONL file for the sampled groups, read by `make compare`; a relative path lies in the phase's folder. null
            writes none.
        log_every: write the groups of every `log_every`-th batch.
    """

    engine: Engine = "native"
    vllm: VLLMSettings = VLLMSettings()
    log: str | None = None
    log_every: int = 1

    part: ClassVar[str] = "rollout"

    def problems(self) -> Problems:
        """All settings that cannot work, in words."""
        problems = super().problems()
        problems.require(self.group_size != 1, ": an advantage needs a group of at least 2", group_size=self.group_size)
        problems.positive(log_every=self.log_every)
        problems.one_of(get_args(Engine), engine=self.engine)
        return problems


@dataclass(frozen=True)
class UpdateSettings:
    """How an accumulation window of rollouts is trained on.

    A window is trained on `epochs_per_rollout` times, each time in `minibatches` updates. With one update in all the
    policy has not moved when it is trained: the ratio is 1, and no rollout is kept. With more, the ratio is taken
    against the log-probabilities of the policy that sampled.

    Args:
        epochs_per_rollout: how often each completion is trained on.
        minibatches: updates that an epoch is divided into.
        old_log_probs: the denominator of the ratio where there are several updates: "trainer" computes it once more
            before the first update, "sampler" takes what the rollout engine stated.
        skip_zero_advantage: leave out groups whose rewards are all equal; False trains on them for their KL term.
        mask_truncated: leave out completions that were cut at the length limit. They count in their group's mean all
            the same. Whether these and skipped groups are in the loss's normaliser says `loss.normalise_over`.
        importance_cap: C, the highest weight by how likely the trainer finds what the engine sampled
            (`sampler_correction.py`); null trusts the engine's log-probabilities.
        importance_floor: the lowest weight; null: none.
        importance_mode: weights by "token" or by "sequence"; beyond their bounds they are held there ("truncate") or
            set to 0 ("mask"). TRL's vllm_importance_sampling_mode has the same four.
        max_idle_windows: after this number of windows in a row without an informative group (`idle_windows`) the run
            ends with IdleTooLong; null goes on. A resumed run goes on counting.
    """

    epochs_per_rollout: int = 1
    minibatches: int = 1
    old_log_probs: OldLogProbs = "trainer"
    skip_zero_advantage: bool = True
    mask_truncated: bool = False
    importance_cap: float | None = None
    importance_floor: float | None = None
    importance_mode: ImportanceMode = "token_truncate"
    max_idle_windows: int | None = 100

    @property
    def updates_per_window(self) -> int:
        return self.epochs_per_rollout * self.minibatches

    def __post_init__(self) -> None:
        problems = Problems("update.")
        problems.positive(epochs_per_rollout=self.epochs_per_rollout, minibatches=self.minibatches)
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
