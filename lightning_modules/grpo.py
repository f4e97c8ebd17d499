"""GRPO (paper section 3.3): sample completions, score them, compare them inside their group, train on the difference.

`GRPO.learn_from` is the whole algorithm on one page. Shapes: P prompts of an accumulation window, G completions of
each prompt (its group), F width of an image feature.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.encoding.encoder import Batch
from datamodules.persistence.problems import Problems
from datamodules.samples.answer_text import AnswerForm
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
from lightning_modules.rl.refill import RefilledWindow
from lightning_modules.rl.rewards.reward_list import RewardList
from lightning_modules.rl.rollout_batch import PromptGroup, trainable_by_batch
from lightning_modules.rl.rollout_log import RolloutLog, rollout_records
from lightning_modules.rl.sampling_ahead import Round, SamplingAhead
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest
from lightning_modules.rollouts.native.cache_room import check_cache
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.rollouts.vllm.lifecycle import CloseOnError, connect
from lightning_modules.training.progress import is_last_batch


class GRPO(GroupObjective):
    """Group-relative policy optimization (arXiv:2402.03300) with the paper's reward (eq. 3) and objective (eq. 2).

    An accumulation window is `accumulate` batches, and those that refill it (`rl/refill.py`). All of them are sampled
    with one policy; then the window is trained on, in `update.updates_per_window` optimizer updates, and the engine
    gets the new weights.

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
        self.rewards = RewardList(rewards, reward_weights, rollout.max_new_tokens)
        self.metrics = GRPOMetrics(self.rewards.names)
        self.engine: RolloutEngine | None = None
        self.last_rollouts: list[dict[str, Any]] = []  # of the last window, for callbacks
        self._log: RolloutLog | None = None
        self._batches: list[Batch] = []  # of the open accumulation window, that wait to be sampled
        self._window: RefilledWindow | None = None
        self._ahead = SamplingAhead(rollout.staleness)
        self._began = 0.0  # time at which the window was first sampled from
        self._seconds = {"rollout": 0.0, "reward": 0.0}  # of the window, over all its rounds
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

    def data_problems(self, answer_form: AnswerForm) -> list[str]:
        return self.rewards.form_faults(answer_form)

    @property
    def updates_per_window(self) -> int:
        return self.update_settings.updates_per_window

    @property
    def window_length(self) -> int:
        return len(self._ahead.batches) + self._window.num_batches

    def configure_model(self) -> None:
        super().configure_model()
        if self.engine is None and self.rollout_settings.engine == "vllm":
            limits = self.rollout_settings.max_new_tokens, self.rollout_settings.staleness
            self.engine = connect(self.policy, self.rollout_settings.vllm, self.trainer, *limits)
        self.engine = self.engine or NativeEngine(self.policy)
        self._check_cache()

    def configure_callbacks(self) -> list[CloseOnError]:
        return [CloseOnError()]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.check_reference()
        self._batches = []  # of a fit that was stopped inside a window
        self._ahead.clear()
        ranks = self.global_rank, self.trainer.world_size, self.sum_over_ranks
        self._window = RefilledWindow(self.accumulate, self.update_settings.refill_windows, *ranks)
        self.engine.sync()

    def _check_cache(self) -> None:
        """Raises SettingsError if sampling may need more memory than `rollout.kv_cache_gib`."""
        settings = self.rollout_settings
        if settings.engine == "native" and settings.kv_cache_gib is not None:
            data = self.trainer.datamodule
            prompts = min(settings.prompts_per_batch, data.batch_size * self.accumulate)
            shape = CacheShape(prompts, settings.group_size, data.encoder.max_prompt_tokens, settings.max_new_tokens)
            sizes = self.policy.architecture.cache_sizes(self.policy.base)
            check_cache(shape, sizes, DTYPES[self.dtype_name], settings.kv_cache_gib)

    def on_train_start(self) -> None:
        if self.trainer.strategy.restore_checkpoint_after_setup:  # a resumed run's weights are here only now
            self.engine.sync()

    def on_fit_end(self) -> None:
        self.engine.close()

    def close_on_error(self) -> None:
        """Close the engine of a run that has failed. A checkpoint may still be written after that."""
        if self.engine is not None:
            with closing(self.engine):
                self._ahead.keep(self.engine)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch of prompts. With the last batch of an accumulation window, the window is sampled and trained on.

        One policy samples all of it: decoding takes hardly longer for many prompts than for few, because each step
        reads all weights. With staleness, servers begin to sample this window, and an earlier one is trained on.
        """
        self.begin_batch(batch)
        self._batches.append(batch)
        is_learnt = False
        if self.end_batch():
            window, ahead = self._round(), self._ahead
            if ahead.staleness == 0:
                is_learnt = self.learn_from(window)
            else:
                ahead.submit(self.engine, window)
                while due := ahead.due(is_last_batch(self.trainer)):
                    self._window_ids = due.sample_ids
                    is_learnt = self.learn_from(due)
                    if 0 < self.trainer.max_steps <= self.global_step:
                        ahead.cancel()  # no other window is needed
                        break
            self._batches = []
        if not is_learnt:
            # Lightning would log the metrics of the window before again. It has no public method that removes them.
            self.trainer._results.reset(fx="training_step")

    def _round(self) -> Round:
        """The waiting batches, with a seed for each prompt."""
        ahead, items = self._ahead.batches, [item for batch in self._batches for item in batch.items]
        sample_ids = self._window_ids[sum(map(len, ahead)) :]  # of the open window, earlier rounds too
        sample_ids, earlier = sample_ids[-len(items) :], sample_ids[: -len(items)]
        seeds = self.window_seeds(self._num_batches_committed + len(ahead), earlier, sample_ids)
        request = RolloutRequest(items, self.rollout_settings, seeds=seeds)
        return Round(self._batches, self.num_batches - len(self._batches), request, self.global_step)

    def learn_from(self, window: Round) -> bool:
        """Sample the P prompts of a round (G completions each), score them, compare them inside each group, and train.

        Returns False if the accumulation window is to be refilled, by a further round, before it is trained on.
        """
        items = window.request.items  # P
        if self._window.is_new:
            self.metrics.reset()
            self.last_rollouts, self._began, self._seconds = [], time.perf_counter(), {"rollout": 0.0, "reward": 0.0}
        sampling_began = time.perf_counter()

        # 1. Sample. The engine may be this process or a vLLM server; both return token ids with log-probabilities.
        with torch.no_grad():  # P of [image tokens, F]; one batch at a time bounds the memory of the vision tower
            features = [tokens for batch in window.batches for tokens in self.policy.encode_images(batch.items)]
        if window.submitted is None:
            rollouts = self.engine.generate(replace(window.request, features=features))  # P lists of G `Rollout`
        else:
            rollouts = self.engine.fetch(window.submitted)
        sampling_ended = time.perf_counter()
        self._seconds["rollout"] += sampling_ended - sampling_began

        # 2. Score every completion: its total is a weighted sum of rewards, by default that of eq. 3.
        max_tokens = self.rollout_settings.max_new_tokens
        rewards = self.rewards.score(items, rollouts, self.box_format, max_tokens)  # P lists of G `Reward`
        self._seconds["reward"] += time.perf_counter() - sampling_ended
        totals = torch.tensor([[reward.total for reward in group] for group in rewards], dtype=torch.float64)  # [P, G]

        # 3. Compare inside the group (eq. 1). If all rewards of a group are equal, no completion is better than
        # another, and the group is left out by default. This is found before the KL penalty is subtracted: after that,
        # rewards differ by the distances from the reference alone, which say nothing about the answers.
        equal_rewards = has_equal_rewards(totals)  # bool [P]
        left_out = torch.tensor([group[0].left_out for group in rewards])  # bool [P]: without rewards, never trained on
        if self.loss_settings.kl_in == "reward" and self.kl_beta > 0:
            totals = totals - self.kl_penalty(items, rollouts, features)  # [P, G]
        advantages = group_advantages(totals, self.advantage_settings.scale)  # [P, G]
        advantages[left_out] = 0.0
        skip = left_out | (equal_rewards & self.update_settings.skip_zero_advantage)  # bool [P]
        self.metrics.add_rollouts(rollouts, rewards, equal_rewards)
        self._record_rollouts(window, rollouts, rewards, advantages, equal_rewards)

        # 4. Refill (DAPO, section 3.2; off by default): further prompts replace the groups that teach nothing.
        self._window.add(self._trainable(window, rollouts, advantages, skip, features), len(items))
        if self._window.ask_for_more(is_last_batch(self.trainer)):
            return False

        # 5. Train (eq. 2): the optimizer updates of the window, after which the engine gets the new weights.
        if self._ahead.staleness:
            self.metrics.update(staleness=self.global_step - window.policy, stale=1)
        before = self.global_step
        self._train_on_window(self._window.groups())
        self._window.clear()
        self._ahead.finish(window)
        self.commit_window(window.batches[-1], self._ahead.batches)  # checkpoints resume after the window from now on
        # After the commit: servers may be lost here, and a resumed run must not train on the window again.
        self._sync_and_log(self.global_step != before)  # False if there was nothing to train on, on any rank
        return True

    # What is kept of the rollouts

    def _record_rollouts(self, window: Round, *scored: Any) -> None:
        """Keep the groups for callbacks, and log every `log_every`-th batch; `scored` as in `rollout_records`."""
        records = rollout_records(self.global_step, window.policy, window.first, window.batches, *scored)
        self.last_rollouts += records
        file, every = self.rollout_settings.log, self.rollout_settings.log_every
        chosen = [record for record in records if record["batch"] % every == 0]
        if file is not None and chosen:
            if self._log is None:
                path = Path(self.trainer.default_root_dir) / file
                self._log = RolloutLog(path, self.global_rank, self.trainer.world_size)
            self._log.append(chosen)

    def _trainable(
        self, window: Round, rollouts: list[list[Rollout]], advantages: Tensor, skip: Tensor, features: list[Tensor]
    ) -> list[list[PromptGroup]]:
        """For each sampled batch, its groups that are trained on; the arguments as in `trainable_groups`."""
        kept = features if self.freeze_vision else None  # those of a trained tower change with each update
        settings = self.update_settings.mask_truncated, self.loss_settings.normalise_over == "all"
        return trainable_by_batch(window.batches, rollouts, advantages, kept, skip.tolist(), *settings)

    # Training on a window

    def _train_on_window(self, by_batch: list[list[PromptGroup]]) -> None:
        """All optimizer updates of a window (`train_on`), and its counts for the idle-window check."""
        # Where truncated completions are masked, the rest of a group may have equal rewards.
        informative = sum(group.is_informative for groups in by_batch for group in groups)
        self.metrics.update(informative=informative, **self._window.sums())
        self.train_on(by_batch)

    # Logging, and ending where nothing is learnt

    def _sync_and_log(self, updated: bool) -> None:
        """The engine gets the weights of an update; the finished window is logged, even if that fails."""
        try:
            if updated:
                self.engine.sync()
        except Exception:  # the same on every rank
            self._log_window()
            raise
        self._log_window()

    def _log_window(self) -> None:
        """Log the metrics of a window, and count it if it was idle."""
        self._idle.add(sums := self.metrics.compute())  # of all ranks, which wait for one another here
        seconds = time.perf_counter() - self._began
        speeds = {
            "speed/rollout_seconds": self._seconds["rollout"],
            "speed/update_seconds": seconds - self._seconds["rollout"],
            "speed/reward_seconds": self._seconds["reward"],
            "speed/reference_seconds": self.reference_clock.take(),
            "speed/completion_tokens_per_second": sums["completion_tokens"] / seconds,
        }
        # Without a logger nobody draws the spread of each reward.
        spreads = self.metrics.spreads(sums, self._latest) if self.trainer.loggers else {}
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
        if self._ahead.staleness:
            checkpoint[STATE_KEY]["ahead"] = self._ahead.state_dict(self.engine)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._idle.load_state_dict(checkpoint[STATE_KEY].get("idle_windows", IdleWindows().state_dict()))
        self._ahead.load_state_dict(checkpoint[STATE_KEY].get("ahead", []))
