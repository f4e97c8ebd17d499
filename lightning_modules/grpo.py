"""GRPO (paper section 3.3): sample completions, score them, compare them inside their group, train on the difference.

`GRPO.training_step` is the whole algorithm on one page. Shapes: P prompts of an accumulation window, G completions of
each prompt (its group), F width of an image feature.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.encoding.encoder import Batch
from datamodules.persistence.problems import Problems
from datamodules.samples.boxes import BoxFormat
from lightning_modules.group_objective import GroupObjective
from lightning_modules.models.attention.kv_cache import CacheShape
from lightning_modules.models.qwen_vl import DTYPES
from lightning_modules.policy_module import STATE_KEY
from lightning_modules.rl.advantages import group_advantages, has_equal_rewards
from lightning_modules.rl.grpo_settings import RolloutSettings, UpdateSettings
from lightning_modules.rl.idle_windows import IdleWindows
from lightning_modules.rl.loss_settings import AdvantageSettings, LossSettings
from lightning_modules.rl.metrics import GRPOMetrics
from lightning_modules.rl.rewards.reward_list import Reward, RewardList
from lightning_modules.rl.rollout_batch import PromptGroup, trainable_groups
from lightning_modules.rl.rollout_log import RolloutLog, rollout_records
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest
from lightning_modules.rollouts.native.cache_room import check_cache
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.rollouts.vllm.lifecycle import CloseOnError, connect
from lightning_modules.training.seeds import derive_seed


class GRPO(GroupObjective):
    """Group-relative policy optimization (arXiv:2402.03300) with the paper's reward (eq. 3) and objective (eq. 2).

    An accumulation window is `accumulate` batches. All of them are sampled with one policy; then the window is trained
    on, in `update.updates_per_window` optimizer updates, and the engine gets the new weights.

    Args:
        model: folder or Hub name of the model that GRPO starts from, such as the merged model of CoT-SFT.
        box_format: how the model writes coordinates; `experiments.train` sets it to `data.box_format`.
        rollout: how completions are sampled.
        advantage: how completions are compared inside their group.
        loss: the objective.
        update: how a window of rollouts is trained on.
        rewards: what a completion earns: a list whose weighted sum is the reward. Its entries have class_path, and
            maybe init_args, weight and name (`rewards.reward_list`). null is eq. 3: IoU as `accuracy` with weight 1.0,
            and `format` with 0.5.
        reward_weights: λ by the name of a reward. It replaces the weight in the list; for flags and sweeps.
        learning_rate: peak of the schedule.
        policy: the other arguments of `PolicyModule`.

    Raises:
        ValueError: settings that cannot work.
    """

    logs_every_batch = False

    def __init__(
        self,
        model: str,
        box_format: BoxFormat = BoxFormat.ABSOLUTE_PIXELS,
        rollout: RolloutSettings = RolloutSettings(),
        advantage: AdvantageSettings = AdvantageSettings(),
        loss: LossSettings = LossSettings(),
        update: UpdateSettings = UpdateSettings(),
        rewards: list[dict[str, Any]] | None = None,
        reward_weights: dict[str, float] | None = None,
        learning_rate: float = 5e-5,
        **policy: Any,
    ) -> None:
        super().__init__(model, rollout, loss, update, learning_rate=learning_rate, **policy)
        self.box_format, self.advantage_settings = BoxFormat(box_format), advantage
        self.rewards = RewardList(rewards, reward_weights)
        self.metrics = GRPOMetrics(self.rewards.names)
        self.engine: RolloutEngine | None = None
        self.last_rollouts: list[dict[str, Any]] = []  # of the last window, for callbacks
        self._log: RolloutLog | None = None
        self._batches: list[Batch] = []  # of the open accumulation window
        self._idle = IdleWindows()
        self.problems().raise_all(type(self).__name__)

    def problems(self) -> Problems:
        """Messages for all settings that cannot work. The settings classes, such as `LossSettings`, check their own."""
        problems = super().problems()
        problems.extend(self.rewards.problems)
        if self.rollout_settings.engine == "vllm" and (self.lora is None or not self.freeze_vision):
            problems.append(
                f"rollout.engine='vllm' with lora={self.lora}, freeze_vision={self.freeze_vision}: servers are sent an "
                "adapter of the language model, and nothing else"
            )
        return problems

    @property
    def updates_per_window(self) -> int:
        return self.update_settings.updates_per_window

    def configure_model(self) -> None:
        super().configure_model()
        if self.engine is None and self.rollout_settings.engine == "vllm":
            limit = self.rollout_settings.max_new_tokens
            self.engine = connect(self.policy, self.rollout_settings.vllm, self.trainer, limit)
        self.engine = self.engine or NativeEngine(self.policy)

    def configure_callbacks(self) -> list[CloseOnError]:
        return [CloseOnError()]

    def on_fit_start(self) -> None:
        self._batches = []  # of a fit that was stopped inside a window
        self.check_reference()
        self._check_cache()
        self.engine.sync()

    def _check_cache(self) -> None:
        """Raises ValueError if sampling may need more memory than `rollout.kv_cache_gib`."""
        settings, data = self.rollout_settings, getattr(self.trainer, "datamodule", None)
        if settings.engine == "native" and settings.kv_cache_gib is not None and data is not None:
            prompts = min(settings.prompts_per_batch, data.batch_size * self.accumulate)
            shape = CacheShape(prompts, settings.group_size, data.max_prompt_tokens, settings.max_new_tokens)
            sizes = self.policy.architecture.cache_sizes(self.policy.base)
            check_cache(shape, sizes, DTYPES[self.dtype_name], settings.kv_cache_gib)

    def on_train_start(self) -> None:
        if self.trainer.strategy.restore_checkpoint_after_setup:  # a resumed run's weights are here only now
            self.engine.sync()

    def on_fit_end(self) -> None:
        self.engine.close()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep one batch of prompts. The last batch of an accumulation window starts the work: all P prompts of the
        window are sampled (G completions each), scored, compared inside each group, and trained on.
        """
        # 0. Wait until the window is complete. One policy samples all of it, and decoding takes hardly longer for many
        # prompts than for few, because each step reads all weights.
        self.begin_batch(batch)
        self._batches.append(batch)
        if not self.end_batch():  # the window is not complete yet
            # Lightning would log the metrics of the window before again, as those of this batch. It has no public
            # method that removes them.
            self.trainer._results.reset(fx="training_step")
            return
        items = [item for each in self._batches for item in each.items]  # the P encoded prompts
        self.metrics.reset()
        sampling_began = time.perf_counter()

        # 1. Sample. The engine may be this process or a vLLM server; both return token ids with log-probabilities.
        with torch.no_grad():
            # P tensors [image tokens, F]. Each batch is encoded alone, which bounds the memory of the vision tower.
            features = [feature for each in self._batches for feature in self.policy.encode_images(each.items)]
        request = RolloutRequest(items, self.rollout_settings, features, self.window_seeds(self._batches))
        rollouts = self.engine.generate(request)  # P lists of G `Rollout`
        sampling_ended = time.perf_counter()

        # 2. Score every completion: its total is a weighted sum of rewards, by default that of eq. 3.
        max_tokens = self.rollout_settings.max_new_tokens
        rewards = self.rewards.score(items, rollouts, self.box_format, max_tokens)  # P lists of G `Reward`
        scoring_ended = time.perf_counter()
        totals = torch.tensor([[reward.total for reward in group] for group in rewards], dtype=torch.float64)  # [P, G]

        # 3. Compare inside the group (eq. 1). If all rewards of a group are equal, no completion is better than
        # another, and the group is left out by default. This is found before the KL penalty is subtracted: after that,
        # rewards differ by the distances from the reference alone, which say nothing about the answers.
        equal_rewards = has_equal_rewards(totals)  # bool [P]
        if self.loss_settings.kl_in == "reward" and self.kl_beta > 0:
            totals = totals - self.kl_penalty(items, rollouts, features)  # [P, G]
        advantages = group_advantages(totals, self.advantage_settings.scale)  # [P, G]
        self.metrics.add_rollouts(rollouts, rewards, equal_rewards)
        self._record_rollouts(rollouts, rewards, advantages, equal_rewards)

        # 4. Train (eq. 2): the optimizer updates of the window, after which the engine gets the new weights.
        groups = self._trainable(rollouts, advantages, equal_rewards, features)  # for each batch, a list of groups
        self._train_on_window(groups)
        self._batches = []
        self.commit_window(batch)  # a checkpoint from now on resumes after this batch
        self._log_window(sampling_began, sampling_ended, scoring_ended)

    # What is kept of the rollouts

    def _record_rollouts(
        self, rollouts: list[list[Rollout]], rewards: list[list[Reward]], advantages: Tensor, equal_rewards: Tensor
    ) -> None:
        """Keep the window's groups for callbacks, and write those of every `log_every`-th batch to the rollout log.

        Args:
            rollouts: P lists of G.
            rewards: P lists of G.
            advantages: [P, G].
            equal_rewards: bool [P], whether all rewards of a group are equal.
        """
        items = [item for each in self._batches for item in each.items]
        first = self.num_batches - len(self._batches)  # number of the window's first batch
        numbers = [number for number, each in enumerate(self._batches, first) for _ in each.items]
        records = rollout_records(items, rollouts, rewards, advantages, equal_rewards)
        self.last_rollouts = [
            {"update": self.global_step, "batch": number} | record
            for number, record in zip(numbers, records, strict=True)
        ]
        file, every = self.rollout_settings.log, self.rollout_settings.log_every
        chosen = [record for record in self.last_rollouts if record["batch"] % every == 0]
        if file is not None and chosen:
            if self._log is None:
                path = Path(self.trainer.default_root_dir) / file
                self._log = RolloutLog(path, self.global_rank, self.trainer.world_size)
            self._log.append(chosen)

    def _trainable(
        self,
        rollouts: list[list[Rollout]],
        advantages: Tensor,
        equal_rewards: Tensor,
        features: list[Tensor],
    ) -> list[list[PromptGroup]]:
        """For each batch, its groups that are trained on. `features`: P of [image tokens, F]."""
        skip = (equal_rewards & self.update_settings.skip_zero_advantage).tolist()
        by_batch, start = [], 0
        for batch in self._batches:
            own = slice(start, start := start + len(batch.items))
            by_batch.append(
                trainable_groups(
                    batch.items,
                    rollouts[own],
                    advantages[own],
                    # Features of a vision tower that is trained must be computed again after each update.
                    features=features[own] if self.freeze_vision else None,
                    skip=skip[own],
                    mask_truncated=self.update_settings.mask_truncated,
                    with_absent=self.loss_settings.normalise_over == "all",
                )
            )
        # For the idle-window check. Where truncated completions are masked, the rest of a group may have equal rewards.
        self.metrics.update(informative=sum(group.is_informative for groups in by_batch for group in groups))
        return by_batch

    # Training on a window

    def _train_on_window(self, by_batch: list[list[PromptGroup]]) -> None:
        """All optimizer updates of a window; then the engine gets the weights.

        Every rank makes the same number of updates, whatever groups it has.

        Args:
            by_batch: the groups of each batch.
        """
        before = self.global_step
        if self.updates_per_window == 1:
            # The policy is still the one that sampled, so the ratio is 1. Gradients of the batches add up to a sum,
            # which `update` divides once.
            for number, groups in enumerate(by_batch, self.num_batches - len(by_batch)):
                self.seed_dropout(number)
                self.add_gradient(groups)
            self.update()
        else:
            window = [group for groups in by_batch for group in groups]
            self.attach_old_log_probs(window)
            for epoch in range(self.update_settings.epochs_per_rollout):
                # The order follows from a seed of this window and epoch, so a resumed run divides the window as before.
                generator = torch.Generator().manual_seed(derive_seed(self.batch_seed(self.num_batches), epoch))
                order = torch.randperm(len(window), generator=generator)
                for chosen in order.tensor_split(self.update_settings.minibatches):
                    self.add_gradient([window[index] for index in chosen.tolist()])
                    self.update()
        if self.global_step != before:  # not if there was nothing to train on, on any rank
            self.engine.sync()

    # Logging, and ending where nothing is learnt

    def _log_window(self, sampling_began: float, sampling_ended: float, scoring_ended: float) -> None:
        """Log the metrics of a window, with the seconds between these times and now; count it if it was idle."""
        rollout_seconds, update_seconds = sampling_ended - sampling_began, time.perf_counter() - sampling_ended
        sums = self.metrics.compute()  # of all ranks, which wait for one another here
        self._idle.add(sums)
        speeds = {
            "speed/rollout_seconds": rollout_seconds,
            "speed/update_seconds": update_seconds,
            "speed/reward_seconds": scoring_ended - sampling_ended,
            "speed/reference_seconds": self.reference_clock.take(),
            "speed/completion_tokens_per_second": sums["completion_tokens"] / (rollout_seconds + update_seconds),
        }
        # Without a logger nobody draws the spread of each reward.
        spreads = self.metrics.spreads(sums) if self.trainer.loggers else {}
        self.log_step(self.metrics.means(sums) | spreads | speeds)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Lightning has called this method of the callbacks already, so they have seen the batch before the run ends.
        if not self.window_is_open:
            self._idle.require_fewer_than(self.update_settings.max_idle_windows, self.rollout_settings)

    def explain_no_learning(self) -> str:
        return self._idle.explain(self.rollout_settings) if self._idle.number > 0 else super().explain_no_learning()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE_KEY]["idle_windows"] = self._idle.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._idle.load_state_dict(checkpoint[STATE_KEY].get("idle_windows", IdleWindows().state_dict()))
