"""The objective of GRPO over groups of completions: log-probabilities of policy and reference, loss and gradient.

The formulas are in `rl/losses.py`. This class computes their inputs in packed rows, on all ranks. It also keeps the
values that change with the number of updates: β, the coefficient of the entropy bonus, and the reference.

Shapes: P prompts, G completions of each prompt, C completions of several groups, N tokens of the completions in one
packed row, T tokens of one completion, F width of an image feature.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import SettingsError
from lightning_modules.models.attention.packed_rows import PackedRows, pack_rows
from lightning_modules.models.layers.lora import without_dropout
from lightning_modules.policy_module import STATE_KEY, PolicyModule
from lightning_modules.rl.coefficients import EntropyController, scheduled
from lightning_modules.rl.grpo_settings import RolloutSettings, UpdateSettings, problems_between
from lightning_modules.rl.loss_settings import FIXED_REFERENCE, LossSettings
from lightning_modules.rl.losses import LossInputs, kl_estimate, policy_loss
from lightning_modules.rl.metrics import GRPOMetrics
from lightning_modules.rl.rollout_batch import PromptGroup, absent_count, by_completion, trainable_groups
from lightning_modules.rl.sampler_correction import sampler_correction
from lightning_modules.rollouts.base import Rollout
from lightning_modules.training.optim import count_updates
from lightning_modules.training.part_clock import PartClock
from lightning_modules.training.progress import has_used_all_batches
from lightning_modules.training.seeds import derive_seed

log = logging.getLogger(__name__)


class GroupObjective(PolicyModule):
    """A policy with GRPO's objective.

    Args:
        model: model folder or Hub name.
        rollout: how completions are sampled.
        loss: the objective.
        update: how a window of rollouts is trained on.
        policy: the other arguments of `PolicyModule`.
    """

    def __init__(
        self, model: str, rollout: RolloutSettings, loss: LossSettings, update: UpdateSettings, **policy: Any
    ) -> None:
        super().__init__(model, **policy)
        self.rollout_settings, self.loss_settings, self.update_settings = rollout, loss, update
        self.metrics = GRPOMetrics()
        self._entropy = EntropyController(loss.entropy)
        self.reference_clock = PartClock()

    def problems(self) -> Problems:
        problems = super().problems()
        problems.extend(problems_between(self.rollout_settings, self.loss_settings, self.update_settings))
        return problems

    @property
    def with_reference(self) -> bool:
        return self.loss_settings.has_kl

    @property
    def loss_reads_reference(self) -> bool:
        return self.kl_beta > 0 and self.loss_settings.kl_in == "loss"

    def check_reference(self) -> None:
        """Raises SettingsError if the reference of a sharded policy should be refreshed."""
        every = self.loss_settings.reference_every
        if every is not None and self.policy.sharded is not None:
            raise SettingsError(f"loss.reference_every={every} with trainer.strategy='sharded': {FIXED_REFERENCE}")

    def on_train_end(self) -> None:
        """Warn if a run with refilling ends before its planned updates: its learning rate has not come to its end."""
        trainer, planned = self.trainer, count_updates(self.trainer, self.accumulate, self.updates_per_window)
        if not self.update_settings.refill_windows or self.global_step >= planned or not trainer.is_global_zero:
            return
        reason = "the Trainer was stopped, by trainer.max_time or a callback"
        if has_used_all_batches(trainer):
            epochs = f"trainer.max_epochs={trainer.max_epochs}"
            reason = f"groups that teach nothing were replaced, and the batches of {epochs} are used up"
        log.warning("ended after %d of %d planned updates: %s", self.global_step, planned, reason)

    # Values that change with the number of updates

    @property
    def kl_beta(self) -> float:
        """β of the next update."""
        schedule, start = self.loss_settings.kl_schedule, self.loss_settings.kl_beta
        if schedule.kind == "constant":
            return start
        planned = schedule.updates or count_updates(self.trainer, self.accumulate, self.updates_per_window)
        return scheduled(start, schedule, self.global_step, planned)

    def update(self) -> bool:
        """`PolicyModule.update`, and then the values that change with the number of updates."""
        made = super().update()
        if self.loss_settings.entropy.target is not None:
            self._entropy.end_update(*self.sum_over_ranks(self._entropy.take_sums()))
        every = self.loss_settings.reference_every
        if made and every is not None and self.global_step % every == 0:
            self.policy.reference.refresh(self.policy)
        return made

    def _coefficients(self) -> tuple[float, float]:
        """β and the entropy coefficient of the next update; values that change during training are logged."""
        beta, entropy = self.kl_beta, self._entropy.coefficient
        if self.loss_settings.kl_schedule.kind != "constant":
            self._latest["grpo/kl_beta"] = beta
        if self.loss_settings.entropy.target is not None:
            self._latest["grpo/entropy_coefficient"] = entropy
        return beta, entropy

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE_KEY]["entropy"] = self._entropy.state_dict()
        if self.loss_settings.reference_every is not None:
            checkpoint[STATE_KEY]["reference"] = self.policy.reference.state_dict(self.policy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE_KEY]  # a checkpoint of an older version has fewer entries
        self._entropy.load_state_dict(state.get("entropy", EntropyController(self.loss_settings.entropy).state_dict()))
        if self.loss_settings.reference_every is not None:
            self.policy.reference.load_state_dict(self.policy, state.get("reference", {}))

    # Training on a window

    def train_on(self, by_batch: list[list[PromptGroup]]) -> None:
        """All optimizer updates of a window. Every rank makes the same number of updates, whatever groups it has.

        Args:
            by_batch: the groups of each batch.
        """
        first = self._num_batches_committed  # number of the window's first batch
        window = [group for groups in by_batch for group in groups]
        if self.updates_per_window == 1:
            if self._compares_without_dropout:
                self.attach_old_log_probs(window)
            # Groups of all batches share packed rows, because few long rows cost less than many short ones. The policy
            # does not change before the update, so the ratio is 1, up to dropout.
            self.seed_dropout(first)
            self.add_gradient(window)
            self.update()
            return
        self.attach_old_log_probs(window)
        for epoch in range(self.update_settings.epochs_per_rollout):
            # The order is drawn from the window's seed, so a resumed run divides the window as before.
            generator = torch.Generator().manual_seed(derive_seed(self.batch_seed(first + len(by_batch)), epoch))
            order = torch.randperm(len(window), generator=generator)
            for chosen in order.tensor_split(self.update_settings.minibatches):
                self.add_gradient([window[index] for index in chosen.tolist()])
                self.update()

    # Log-probabilities of groups

    @property
    def _compares_without_dropout(self) -> bool:
        """Whether the sampler correction needs log-probabilities of its own: the engine samples without dropout."""
        return self.lora is not None and self.lora.dropout > 0 and self.update_settings.importance_cap is not None

    @torch.no_grad()
    def attach_old_log_probs(self, groups: list[PromptGroup]) -> None:
        """Store in each group the log-probabilities of the policy before the first update."""
        if self.update_settings.old_log_probs == "sampler":
            for group in groups:
                group.old_log_probs = group.sampler_log_probs
            return
        temperature, groups = self.rollout_settings.temperature, [group for group in groups if group.completions]
        rows = self._packed_rows(groups)
        with without_dropout(self.policy):  # the policy that sampled had none
            log_probs = by_completion(groups, [self.policy.token_log_probs(row, f, temperature) for row, f in rows])
        for group, old_log_probs in zip(groups, log_probs, strict=True):
            group.old_log_probs = old_log_probs

    @torch.no_grad()
    def kl_penalty(self, items: list[EncodedSample], rollouts: list[list[Rollout]], features: list[Tensor]) -> Tensor:
        """β · Σ over the tokens of a completion of the KL estimate, float64 [P, G].

        The policy's log-probabilities are those of the engine.

        Args:
            items: P prompts.
            rollouts: P lists of G rollouts.
            features: P tensors [image tokens, F].
        """
        none = torch.zeros(len(items), len(rollouts[0]))
        skip = [False] * len(items)
        groups = trainable_groups(items, rollouts, none, features if self.freeze_vision else None, skip, False)
        rows = self._packed_rows(groups, reference=True)
        reference = by_completion(groups, [self._reference_log_probs(row, f, items) for row, f in rows])
        estimator, beta = self.loss_settings.kl_estimator, self.kl_beta
        penalties = [
            [
                beta * kl_estimate(own, ref, estimator).sum().item()
                for own, ref in zip(g.sampler_log_probs, refs, strict=True)
            ]
            for g, refs in zip(groups, reference, strict=True)
        ]
        self.metrics.update(kl_penalty=sum(map(sum, penalties)), penalised_completions=none.numel())
        return torch.tensor(penalties, dtype=torch.float64)

    def _reference_log_probs(self, rows: PackedRows, features: list[Tensor], items: list[EncodedSample]) -> Tensor:
        """Log-probabilities [N] of a row's tokens under the reference; other arguments as in `_packed_rows`."""
        with self.reference_clock.running(self.device):
            fixed = features if self.freeze_vision else self.row_features(rows, items, reference=True)
            return self.policy.token_log_probs(rows, fixed, self.rollout_settings.temperature, reference=True)

    def _packed_rows(
        self, groups: list[PromptGroup], reference: bool = False
    ) -> Iterator[tuple[PackedRows, list[Tensor]]]:
        """Yields packed rows of the groups, each with the image features of all items.

        Runs the dummy passes if other ranks have more rows.

        Args:
            groups: the groups; each has at least one completion.
            reference: whether the caller runs only the reference on the rows.
        """
        items = [group.item for group in groups]
        known = [group.features for group in groups] if self.freeze_vision else None
        packed = pack_rows(items, [group.completions for group in groups], self.max_tokens_per_row)
        for rows in self.equal_passes(packed):
            if rows is not None:
                yield rows, known or self.row_features(rows, items)
            elif reference:
                self.policy.dummy_log_prob(reference=True)
            else:
                self.dummy_forward()

    # The gradient

    def add_gradient(self, groups: list[PromptGroup]) -> None:
        """Add the gradient of minus the objective over these groups, one packed row after the other."""
        # Sampled completions (or their tokens) without gradient that count in the mean; 0 with `normalise_over: kept`.
        absent = absent_count(groups, self.loss_settings.reduction)
        self._absent += absent
        self.metrics.update(loss_count=absent)
        groups = [group for group in groups if group.completions]

        items = [group.item for group in groups]
        beta, entropy = self._coefficients()
        with_entropy, temperature = self.loss_settings.entropy.is_on, self.rollout_settings.temperature
        advantages = torch.cat([group.advantages for group in groups] or [torch.zeros(0)])  # [C]
        old = [log_probs for group in groups for log_probs in group.old_log_probs or ()]  # C tensors [T], or []
        sampler = [log_probs for group in groups for log_probs in group.sampler_log_probs]  # C tensors [T]
        for rows, features in self._packed_rows(groups):
            # Log-probabilities [N] of the row's tokens: under the policy, with gradient, and under the reference model.
            log_probs = self.policy.token_log_probs(rows, features, temperature, with_entropy=with_entropy)
            log_probs, entropies = log_probs if with_entropy else (log_probs, None)
            ref_log_probs = self._reference_log_probs(rows, features, items) if self.loss_reads_reference else None

            # Log-probabilities [N] under the policy that sampled: computed by the trainer, and by the engine.
            present = rows.completion_index.unique_consecutive().tolist()
            old_log_probs = torch.cat([old[c] for c in present]) if old else None
            sampler_log_probs = torch.cat([sampler[c] for c in present])
            before = log_probs if old_log_probs is None else old_log_probs
            inputs = LossInputs(
                log_probs,
                rows.completion_index,
                advantages,
                self.rollout_settings.max_new_tokens,
                old_log_probs,
                ref_log_probs,
                self._sampler_weights(before, sampler_log_probs, rows.completion_index),
                entropies,
                beta,
                entropy,
            )
            terms = policy_loss(inputs, self.loss_settings)
            self.backward_sum(terms.total, terms.count)
            self.metrics.add_loss(terms)
            self._entropy.add(terms)

    def _sampler_weights(self, old_log_probs: Tensor, sampler_log_probs: Tensor, index: Tensor) -> Tensor | None:
        """Weights [N] that correct for differences between engine and trainer; None means no weights.

        Args:
            old_log_probs: [N], computed by the trainer.
            sampler_log_probs: [N], computed by the engine.
            index: [N] long, the index of each token's completion.
        """
        settings = self.update_settings
        if self.updates_per_window > 1 and settings.old_log_probs == "sampler":
            return None  # the trainer has not computed its log-probabilities
        weights, is_beyond, mode = None, None, settings.importance_mode
        if settings.importance_cap is not None:
            bounds = (settings.importance_cap, settings.importance_floor)
            weights, is_beyond = sampler_correction(old_log_probs, sampler_log_probs, index, mode, *bounds)
        self.metrics.add_sampler(old_log_probs, sampler_log_probs, is_beyond, masks=mode.endswith("mask"))
        return weights
