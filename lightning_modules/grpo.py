"""GRPO (paper section 3.3): roll out, reward, compare inside the group, update."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.batches import Batch, PromptItem
from datamodules.boxes import Convention
from lightning_modules.grpo_metrics import StepSums
from lightning_modules.objectives import Reduction, equal_groups, group_advantages, grpo_loss
from lightning_modules.policy_module import PolicyModule
from lightning_modules.rewards import Reward, reward
from lightning_modules.rollouts import NativeEngine, Rollout, RolloutEngine, RolloutSettings
from lightning_modules.seeds import derive_seed
from lightning_modules.shared_prefix import PackedRows, pack_rows


@dataclass
class Group:
    """The completions of one prompt that are learnt from; C of its G."""

    item: PromptItem
    features: Tensor | None  # [image tokens, D] of a frozen tower; None when images are encoded at each forward pass
    completions: list[Tensor]  # C of token ids [T]
    advantages: Tensor  # [C]
    old: list[Tensor] | None  # C of log-probabilities [T] at the rollout; None: the policy has not moved since


class GRPO(PolicyModule):
    """Group-relative policy optimization with eq. 3's reward and eq. 2's objective.

    A window of `accumulate` batches is rolled out with one policy and trained on `epochs_per_rollout` times, each time
    in `minibatches` updates. With one update the policy has not moved when it is trained: the ratio is 1, and nothing
    is kept or computed again. With more, the ratio is against the log-probabilities of the rollout, as computed once
    more before the first update (`old_log_probs: trainer`), or as the engine gave them.

    group_size G; temperature and max_new_tokens of the rollouts; beta 0 needs no reference model; clip_range null is
    eq. 2 literally; loss_reduction as in `grpo_loss`. skip_equal_groups: groups whose rewards are all equal are not
    trained on at all (else they get the KL gradient). mask_truncated: completions without an end are not trained on;
    they count in their group's mean all the same. Neither is in the loss's normaliser: their tokens are left out of the
    packed rows. rollout_log: JSONL of every group (of a resumed run, a batch's last line counts). rollout_prompts:
    prompts decoded together. The other fields: `PolicyModule`.
    """

    def __init__(
        self,
        model: str,
        convention: Convention = Convention.ABSOLUTE,
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
        learning_rate: float = 5e-5,
        **policy: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **policy)
        self.convention = Convention(convention)
        self.group_size, self.temperature, self.max_new_tokens = group_size, temperature, max_new_tokens
        self.beta, self.clip_range, self.loss_reduction = beta, clip_range, loss_reduction
        self.accuracy_weight, self.format_weight = accuracy_weight, format_weight
        self.epochs_per_rollout, self.minibatches, self.old_log_probs = epochs_per_rollout, minibatches, old_log_probs
        self.skip_equal_groups, self.mask_truncated = skip_equal_groups, mask_truncated
        self.rollout_prompts, self.rollout_log = rollout_prompts, rollout_log
        self.engine: RolloutEngine | None = None
        self.last_rollouts: list[dict[str, Any]] = []  # of the last batch, for callbacks
        self._window: list[Group] = []
        self._sums = StepSums()
        self.check_settings()

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.group_size < 2:
            faults.append(f"group_size={self.group_size}: an advantage needs a group of at least 2")
        for name in ("temperature", "max_new_tokens", "epochs_per_rollout", "minibatches", "rollout_prompts"):
            if getattr(self, name) <= 0:
                faults.append(f"{name}={getattr(self, name)} must be greater than 0")
        if self.beta < 0:
            faults.append(f"beta={self.beta} must not be negative")
        if self.clip_range is not None and not 0 < self.clip_range < 1:
            faults.append(f"clip_range={self.clip_range} must be in (0, 1), or null")
        return faults

    @property
    def with_reference(self) -> bool:
        return self.beta > 0

    @property
    def updates_per_window(self) -> int:
        return self.epochs_per_rollout * self.minibatches

    def configure_model(self) -> None:
        super().configure_model()
        if self.engine is None:
            self.engine = NativeEngine(self.policy)

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
            self._update_window()
            self.commit_window(batch)
        self._log_step(rolled_out - started, time.perf_counter() - rolled_out)

    # Rolling out

    def _reward(self, item: PromptItem, rollout: Rollout) -> Reward:
        weights = (self.accuracy_weight, self.format_weight)
        try:
            return reward(rollout.text, item.sample.answer, item.geometries, self.convention, *weights)
        except ValueError as error:
            raise ValueError(f"sample {item.sample.id!r} cannot be rewarded: {error}") from error

    def _roll_out(self, batch: Batch) -> list[Group]:
        """Sample and reward every group of the batch; returns those that are learnt from."""
        with torch.no_grad():
            features = self.policy.encode_images(batch.items)
        settings = RolloutSettings(
            self.group_size, self.temperature, self.max_new_tokens, batch_prompts=self.rollout_prompts
        )
        rollouts = self.engine.generate(batch.items, settings, features, seeds=self.sample_seeds(batch))
        rewards = [
            [self._reward(item, rollout) for rollout in group]
            for item, group in zip(batch.items, rollouts, strict=True)
        ]
        totals = torch.tensor([[parts.total for parts in group] for group in rewards], dtype=torch.float64)
        advantages, equal = group_advantages(totals), equal_groups(totals)
        self._record(batch, rollouts, rewards, advantages, equal)
        groups = []
        for index, item in enumerate(batch.items):
            kept = [k for k, r in enumerate(rollouts[index]) if r.finished or not self.mask_truncated]
            if kept and not (self.skip_equal_groups and equal[index]):
                known = features[index] if self.freeze_vision else None
                groups.append(self._group(item, known, [rollouts[index][k] for k in kept], advantages[index, kept]))
        return groups

    def _group(self, item: PromptItem, features: Tensor | None, rollouts: list[Rollout], advantages: Tensor) -> Group:
        from_engine = self.updates_per_window > 1 and self.old_log_probs == "engine"
        return Group(
            item=item,
            features=features,
            completions=[rollout.token_ids.to(self.device) for rollout in rollouts],
            advantages=advantages.to(self.device),
            old=[rollout.log_probs.to(self.device) for rollout in rollouts] if from_engine else None,
        )

    def _record(
        self,
        batch: Batch,
        rollouts: list[list[Rollout]],
        rewards: list[list[Reward]],
        advantages: Tensor,
        equal: Tensor,
    ) -> None:
        """Keep the batch's rollouts for callbacks and the log, and add them to the step's sums."""
        self.last_rollouts = [
            {
                "update": self.global_step,
                "batch": self.num_batches,
                "id": item.sample.id,
                "texts": [rollout.text for rollout in rollouts[index]],
                "rewards": [asdict(parts) for parts in rewards[index]],
                "advantages": advantages[index].tolist(),
                "equal": bool(equal[index]),
            }
            for index, item in enumerate(batch.items)
        ]
        for group, group_rewards, is_equal in zip(rollouts, rewards, equal.tolist(), strict=True):
            self._sums.add_group(group, group_rewards, is_equal)
        if self.rollout_log is not None:
            path = Path(self.rollout_log)
            if self.trainer.world_size > 1:
                path = path.with_stem(f"{path.stem}-rank{self.global_rank}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.last_rollouts)

    # Updating

    def _update_window(self) -> None:
        """All updates of a window. Every rank makes the same number, whatever groups it has."""
        if self.updates_per_window == 1:
            self.update()
            return
        if self.old_log_probs == "trainer":
            self._store_old_log_probs(self._window)
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
        for rows in self.in_step(packed):
            if rows is None:
                self.idle_pass()
            else:
                yield rows, known or self.row_features(rows, items)

    def _backward(self, groups: list[Group]) -> None:
        """Add the gradient of minus eq. 2 over these groups."""
        items = [group.item for group in groups]
        advantages = torch.cat([group.advantages for group in groups] or [torch.zeros(0)])
        old = [log_probs for group in groups for log_probs in group.old or ()]
        for rows, features in self._rows(groups):
            log_probs = self.policy.token_log_probs(rows, features, self.temperature)
            reference = None
            if self.with_reference:
                fixed = features if self.freeze_vision else self.row_features(rows, items, reference=True)
                reference = self.policy.token_log_probs(rows, fixed, self.temperature, reference=True)
            terms = grpo_loss(
                log_probs,
                torch.cat([old[c] for c in rows.completion.unique_consecutive().tolist()]) if old else None,
                reference,
                rows.completion,
                advantages,
                self.beta,
                self.clip_range,
                self.loss_reduction,
                self.max_new_tokens,
            )
            self.backward_sum(terms.total, terms.count)
            self._sums.add_terms(terms)

    @torch.no_grad()
    def _store_old_log_probs(self, groups: list[Group]) -> None:
        """Log-probabilities of the policy before the window's first update."""
        log_probs = [self.policy.token_log_probs(rows, f, self.temperature) for rows, f in self._rows(groups)]
        lengths = [len(completion) for group in groups for completion in group.completions]
        split = iter(torch.cat(log_probs).split(lengths)) if lengths else iter(())
        for group in groups:
            group.old = [next(split) for _ in group.completions]

    def _log_step(self, rollout_seconds: float, update_seconds: float) -> None:
        sums = StepSums(*self.sum_over_ranks(astuple(self._sums)))
        self.log_step(
            sums.means()
            | {
                "speed/rollout_seconds": rollout_seconds,
                "speed/update_seconds": update_seconds,
                "speed/completion_tokens_per_second": sums.completion_tokens / (rollout_seconds + update_seconds),
            }
        )
