"""GRPO (paper section 3.3): roll out, reward, compare inside the group, update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.samples.boxes import BoxFormat
from lightning_modules.models.attention.packed_rows import PackedRows, pack_rows
from lightning_modules.policy_module import STATE_KEY, PolicyModule
from lightning_modules.rl.grpo_faults import grpo_faults
from lightning_modules.rl.idle_windows import IdleWindows
from lightning_modules.rl.losses import Reduction, equal_groups, group_advantages, grpo_loss, truncated_importance
from lightning_modules.rl.metrics import StepSums, rollout_records
from lightning_modules.rl.rewards import Reward, reward
from lightning_modules.rl.rollout_batch import Group, keep_old, learnt_groups
from lightning_modules.rl.rollout_log import RolloutLog
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.rollouts.vllm.lifecycle import CloseOnError, connect
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings
from lightning_modules.training.seeds import derive_seed


class GRPO(PolicyModule):
    """Group-relative policy optimization with eq. 3's reward and eq. 2's objective.

    A window of `accumulate` batches is rolled out with one policy and trained on `epochs_per_rollout` times, each time
    in `minibatches` updates. With one update the policy has not moved when it is trained: the ratio is 1, and nothing
    is kept or computed again. With more, the ratio is against the log-probabilities of the rollout, as computed once
    more before the first update (`old_log_probs: trainer`), or as the engine gave them.

    group_size G; temperature and max_new_tokens of the rollouts; beta 0 needs no reference model; clip_range null is
    eq. 2 literally; loss_reduction as in `grpo_loss`. skip_equal_groups: groups whose rewards are all equal are not
    trained on at all (else they get the KL gradient). mask_truncated: completions without an end are not trained on;
    they count in their group's mean all the same. Neither is in the loss's normaliser, where eq. 2 and TRL have both:
    their tokens are left out of the packed rows. rollout_log: JSONL of the groups of every `rollout_log_every`-th
    batch; a relative path lies in the phase's folder (`rollout_log.py` reads it). rollout_prompts: prompts decoded
    together. engine: "native" samples in this process, "vllm" on the servers that `vllm` names
    (docs/rollout_engines.md). importance_cap: of `truncated_importance`; null trusts the engine's log-probabilities.
    max_idle_windows: after this number of windows in a row without an informative group (`idle_windows`) the run ends
    with IdleTooLong; null goes on. A resumed run goes on counting. The other fields: `PolicyModule`.
    """

    def __init__(
        self,
        model: str,
        box_format: BoxFormat = BoxFormat.ABSOLUTE_PIXELS,
        group_size: int = 8,
        temperature: float = 0.7,
        max_new_tokens: int = 1024,
        beta: float = 0.001,
        clip_range: float | None = 0.2,
        accuracy_weight: float = 1.0,
        format_weight: float = 0.5,
        epochs_per_rollout: int = 1,
        minibatches: int = 1,
        old_log_probs: Literal["trainer", "engine"] = "trainer",
        loss_reduction: Reduction = "completion",
        skip_equal_groups: bool = True,
        mask_truncated: bool = False,
        rollout_prompts: int = 32,
        rollout_log: str | None = None,
        rollout_log_every: int = 1,
        engine: Literal["native", "vllm"] = "native",
        vllm: VLLMSettings | None = None,
        importance_cap: float | None = None,
        max_idle_windows: int | None = 100,
        learning_rate: float = 5e-5,
        **policy: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **policy)
        self.box_format = BoxFormat(box_format)
        self.group_size, self.temperature, self.max_new_tokens = group_size, temperature, max_new_tokens
        self.beta, self.clip_range, self.loss_reduction = beta, clip_range, loss_reduction
        self.accuracy_weight, self.format_weight = accuracy_weight, format_weight
        self.epochs_per_rollout, self.minibatches, self.old_log_probs = epochs_per_rollout, minibatches, old_log_probs
        self.skip_equal_groups, self.mask_truncated = skip_equal_groups, mask_truncated
        self.rollout_prompts = rollout_prompts
        self.rollout_log, self.rollout_log_every = rollout_log, rollout_log_every
        self.engine_name, self.vllm, self.importance_cap = engine, vllm or VLLMSettings(), importance_cap
        self.engine: RolloutEngine | None = None
        self.last_rollouts: list[dict[str, Any]] = []  # of the last batch, for callbacks
        self._log: RolloutLog | None = None
        self._window: list[Group] = []
        self._sums = StepSums()
        self.max_idle_windows, self._idle = max_idle_windows, IdleWindows()
        self.check_settings()

    def faults(self) -> list[str]:
        return super().faults() + grpo_faults(self)

    @property
    def with_reference(self) -> bool:
        return self.beta > 0

    @property
    def updates_per_window(self) -> int:
        return self.epochs_per_rollout * self.minibatches

    def configure_model(self) -> None:
        super().configure_model()
        if self.engine is None and self.engine_name == "vllm":
            self.engine = connect(self.policy, self.vllm, self.trainer, self.max_new_tokens)
        self.engine = self.engine or NativeEngine(self.policy)

    def configure_callbacks(self) -> list[CloseOnError]:
        return [CloseOnError()]

    def on_fit_start(self) -> None:
        self.engine.sync()

    def on_train_start(self) -> None:
        if self.trainer.strategy.restore_checkpoint_after_setup:  # a resumed run's weights are here only now
            self.engine.sync()

    def on_fit_end(self) -> None:
        self.engine.close()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.begin_batch(batch)
        self._sums = StepSums()
        started = time.perf_counter()
        groups = self._roll_out(batch)
        rolled_out = time.perf_counter()
        if self.updates_per_window == 1:
            self._backward(groups)
        else:
            self._window += groups
        if self.end_batch():
            before = self.global_step
            self._update_window()
            self.commit_window(batch)
            if self.global_step != before:
                self.engine.sync()
        self._log_step(rolled_out - started, time.perf_counter() - rolled_out)

    # Rolling out

    def _reward(self, item: EncodedSample, rollout: Rollout) -> Reward:
        weights = (self.accuracy_weight, self.format_weight)
        try:
            return reward(rollout.text, item.sample.answer, item.image_sizes, self.box_format, *weights)
        except ValueError as error:
            raise ValueError(f"sample {item.sample.id!r} cannot be rewarded: {error}") from error

    def _roll_out(self, batch: Batch) -> list[Group]:
        """Sample and reward every group of the batch; returns those that are learnt from."""
        with torch.no_grad():
            features = self.policy.encode_images(batch.items)
        sampling = SamplingSettings(self.group_size, self.temperature, self.max_new_tokens, self.rollout_prompts)
        rollouts = self.engine.generate(RolloutRequest(batch.items, sampling, features, self.sample_seeds(batch)))
        rewards = [
            [self._reward(item, rollout) for rollout in group]
            for item, group in zip(batch.items, rollouts, strict=True)
        ]
        totals = torch.tensor([[parts.total for parts in group] for group in rewards], dtype=torch.float64)
        advantages, equal = group_advantages(totals), equal_groups(totals)
        self._record(batch, rollouts, rewards, advantages, equal)
        skip = (equal & self.skip_equal_groups).tolist()
        known = features if self.freeze_vision else None
        groups = learnt_groups(batch.items, rollouts, advantages, known, skip, self.mask_truncated)
        self._sums.informative_groups += sum(bool(group.advantages.any()) for group in groups)
        return groups

    def _record(
        self,
        batch: Batch,
        rollouts: list[list[Rollout]],
        rewards: list[list[Reward]],
        advantages: Tensor,
        equal: Tensor,
    ) -> None:
        """Keep the batch's rollouts for callbacks and the log, and add them to the step's sums."""
        counts = {"update": self.global_step, "batch": self.num_batches}
        records = rollout_records(batch.items, rollouts, rewards, advantages, equal)
        self.last_rollouts = [counts | record for record in records]
        self._sums.add_groups(rollouts, rewards, equal)
        if self.rollout_log is not None and self.num_batches % self.rollout_log_every == 0:
            if self._log is None:
                path = Path(self.trainer.default_root_dir) / self.rollout_log
                self._log = RolloutLog(path, self.global_rank, self.trainer.world_size)
            self._log.append(self.last_rollouts)

    # Updating

    def _update_window(self) -> None:
        """All updates of a window. Every rank makes the same number, whatever groups it has."""
        if self.updates_per_window == 1:
            self.update()
            return
        if self.old_log_probs == "trainer":
            self._store_old_log_probs(self._window)
        else:
            for group in self._window:
                group.old = group.engine
        for epoch in range(self.epochs_per_rollout):
            generator = torch.Generator().manual_seed(derive_seed(self.batch_seed(), epoch))
            order = torch.randperm(len(self._window), generator=generator)
            for chosen in order.tensor_split(self.minibatches):
                self._backward([self._window[index] for index in chosen.tolist()])
                self.update()
        self._window = []

    def _rows(self, groups: list[Group]) -> Iterator[tuple[PackedRows, list[Tensor]]]:
        """Packed rows of all groups, and the image features for each. Makes the idle passes that are due itself."""
        items = [group.item for group in groups]
        known = [group.features for group in groups] if self.freeze_vision else None
        packed = pack_rows(items, [group.completions for group in groups], self.max_tokens_per_row)
        for rows in self.equal_passes(packed):
            if rows is None:
                self.dummy_forward()
            else:
                yield rows, known or self.row_features(rows, items)

    def _backward(self, groups: list[Group]) -> None:
        """Add the gradient of minus eq. 2 over these groups."""
        items = [group.item for group in groups]
        advantages = torch.cat([group.advantages for group in groups] or [torch.zeros(0)])
        old = [log_probs for group in groups for log_probs in group.old or ()]
        engine = [log_probs for group in groups for log_probs in group.engine]
        for rows, features in self._rows(groups):
            log_probs = self.policy.token_log_probs(rows, features, self.temperature)
            reference = None
            if self.with_reference:
                fixed = features if self.freeze_vision else self.row_features(rows, items, reference=True)
                reference = self.policy.token_log_probs(rows, fixed, self.temperature, reference=True)
            present = rows.completion_index.unique_consecutive().tolist()
            row_old = torch.cat([old[c] for c in present]) if old else None
            importance = self._importance(log_probs if row_old is None else row_old, [engine[c] for c in present])
            terms = grpo_loss(
                log_probs,
                row_old,
                reference,
                rows.completion_index,
                advantages,
                self.beta,
                self.clip_range,
                self.loss_reduction,
                self.max_new_tokens,
                importance,
            )
            self.backward_sum(terms.total, terms.count)
            self._sums.add_terms(terms)

    def _importance(self, log_probs: Tensor, engine: list[Tensor]) -> Tensor | None:
        """Weights [N] for what the engine sampled, from the trainer's own log-probabilities then."""
        if self.updates_per_window > 1 and self.old_log_probs == "engine":
            return None  # the trainer's were never computed
        sampled = torch.cat(engine)
        self._sums.add_engine(log_probs, sampled, self.importance_cap)
        return None if self.importance_cap is None else truncated_importance(log_probs, sampled, self.importance_cap)

    @torch.no_grad()
    def _store_old_log_probs(self, groups: list[Group]) -> None:
        """Log-probabilities of the policy before the window's first update."""
        keep_old(groups, [self.policy.token_log_probs(rows, f, self.temperature) for rows, f in self._rows(groups)])

    def _log_step(self, rollout_seconds: float, update_seconds: float) -> None:
        sums = StepSums(*self.sum_over_ranks(astuple(self._sums)))
        self._idle.add(sums, ends_window=not self.window_is_open)
        speeds = {
            "speed/rollout_seconds": rollout_seconds,
            "speed/update_seconds": update_seconds,
            "speed/completion_tokens_per_second": sums.completion_tokens / (rollout_seconds + update_seconds),
        }
        self.log_step(sums.means() | speeds)

    # Ending where nothing is learnt

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # behind the callbacks' own
        if not self.window_is_open:
            self._idle.require_fewer_than(self.max_idle_windows, self.max_new_tokens, self.temperature)

    def explain_no_learning(self) -> str:
        is_idle = self._idle.number > 0
        return self._idle.explain(self.max_new_tokens, self.temperature) if is_idle else super().explain_no_learning()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE_KEY]["idle_windows"] = self._idle.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._idle.load_state_dict(checkpoint[STATE_KEY].get("idle_windows", IdleWindows().state_dict()))
