"""GRPO (paper section 3.3): sample completions, score them, compare them inside their group, train on the difference.

`GRPO.training_step` is the whole algorithm on one page. Shapes: P prompts of a batch, G completions of each (a group),
C completions of several groups, N tokens of the completions in one packed row, T tokens of one completion.
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
from lightning_modules.policy_module import STATE_KEY
from lightning_modules.rl.advantages import group_advantages, zero_advantage
from lightning_modules.rl.grpo_settings import RolloutSettings, UpdateSettings
from lightning_modules.rl.idle_windows import IdleWindows
from lightning_modules.rl.loss_settings import AdvantageSettings, LossSettings
from lightning_modules.rl.metrics import GRPOMetrics
from lightning_modules.rl.rewards.reward_list import Reward, RewardList
from lightning_modules.rl.rollout_batch import PromptGroup, trainable_groups
from lightning_modules.rl.rollout_log import RolloutLog, rollout_records
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.rollouts.vllm.lifecycle import CloseOnError, connect
from lightning_modules.training.seeds import derive_seed


class GRPO(GroupObjective):
    """Group-relative policy optimization (arXiv:2402.03300) with the paper's reward (eq. 3) and objective (eq. 2).

    An accumulation window is `accumulate` batches. All of them are sampled with one policy; then the window is trained
    on, in `update.updates_per_window` optimizer updates, and the engine gets the new weights.

    Args:
        model: model folder or Hub name; the merged model of stage 1.
        box_format: how the model writes coordinates; `experiments.train` sets it to `data.box_format`.
        rollout: how completions are sampled.
        advantage: how completions are compared inside their group.
        loss: the objective.
        update: how a window of rollouts is trained on.
        rewards: what a completion earns: a list whose weighted sum is the reward. Its entries have class_path, and
            maybe init_args, weight and name (`rewards.reward_list`). null is eq. 3: IoU as `accuracy` with weight 1.0,
            and `format` with 0.5.
        reward_weights: λ by the name of a reward, over the weight in the list; for flags and sweeps.
        learning_rate: peak of the schedule.
        policy: the other arguments of `PolicyModule`.

    Raises:
        ValueError: settings that cannot work.
    """

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
        self.last_rollouts: list[dict[str, Any]] = []  # of the last batch, for callbacks
        self._log: RolloutLog | None = None
        self._window: list[PromptGroup] = []  # of the open accumulation window, where it has several updates
        self._idle = IdleWindows()
        self.problems().raise_all(type(self).__name__)

    def problems(self) -> Problems:
        """All settings that cannot work, in words; those of the groups are told by the groups."""
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
        self.check_reference()
        self.engine.sync()

    def on_train_start(self) -> None:
        if self.trainer.strategy.restore_checkpoint_after_setup:  # a resumed run's weights are here only now
            self.engine.sync()

    def on_fit_end(self) -> None:
        self.engine.close()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch of P prompts: sample G completions each, score them, compare inside each group, add the gradient.

        The last batch of an accumulation window also updates the weights and gives them to the rollout engine.
        """
        self.begin_batch(batch)
        self.metrics.reset()
        started = time.perf_counter()

        # 1. Sample. The engine may be this process or a vLLM server; both return token ids with log-probabilities.
        with torch.no_grad():
            features = self.policy.encode_images(batch.items)  # P of [image tokens, D]
        request = RolloutRequest(batch.items, self.rollout_settings, features, self.sample_seeds(batch))
        rollouts = self.engine.generate(request)  # P lists of G
        sampled = time.perf_counter()

        # 2. Score every completion: a weighted sum of rewards, by default by the rules of eq. 3.
        max_tokens = self.rollout_settings.max_new_tokens
        rewards = self.rewards.score(batch.items, rollouts, self.box_format, max_tokens)  # P lists of G
        totals = torch.tensor([[reward.total for reward in group] for group in rewards], dtype=torch.float64)  # [P, G]

        # 3. Compare inside the group (eq. 1). Where all rewards are equal, no completion is better than another: such a
        # group has zero advantage and teaches no preference, whatever its completions' distances from the reference.
        is_zero = zero_advantage(totals)  # bool [P]
        if self.loss_settings.kl_in == "reward" and self.kl_beta > 0:
            totals = totals - self.kl_penalty(batch.items, rollouts, features)
        advantages = group_advantages(totals, self.advantage_settings.scale)  # [P, G]
        self.metrics.add_rollouts(rollouts, rewards, is_zero)
        self._save_rollouts(batch, rollouts, rewards, advantages, is_zero)
        groups = trainable_groups(
            batch.items,
            rollouts,
            advantages,
            features=features if self.freeze_vision else None,  # of a trained tower they change with each update
            skip=(is_zero & self.update_settings.skip_zero_advantage).tolist(),
            mask_truncated=self.update_settings.mask_truncated,
            with_absent=self.loss_settings.normalise_over == "all",
        )
        self.metrics.update(informative=sum(group.is_informative for group in groups))

        # 4. Train (eq. 2). With one update a window, the policy is still the one that sampled: the batch is
        # backpropagated at once, and nothing is kept of it. Otherwise its groups wait for the end of the window.
        if self.updates_per_window == 1:
            self.add_gradient(groups)
        else:
            self._window += groups
        if self.end_batch():
            self._update_window()
            self.commit_window(batch)
        self._log_step(sampled - started, time.perf_counter() - sampled)

    # Sampling: what is kept of it

    def _save_rollouts(
        self,
        batch: Batch,
        rollouts: list[list[Rollout]],
        rewards: list[list[Reward]],
        advantages: Tensor,
        is_zero: Tensor,
    ) -> None:
        """Keep the batch's groups for callbacks, and write them to the rollout log.

        Args:
            batch: P prompts.
            rollouts: P lists of G.
            rewards: P lists of G.
            advantages: [P, G].
            is_zero: bool [P], the groups of equal rewards.
        """
        counts = {"update": self.global_step, "batch": self.num_batches}
        records = rollout_records(batch.items, rollouts, rewards, advantages, is_zero)
        self.last_rollouts = [counts | record for record in records]
        file, every = self.rollout_settings.log, self.rollout_settings.log_every
        if file is not None and self.num_batches % every == 0:
            if self._log is None:
                path = Path(self.trainer.default_root_dir) / file
                self._log = RolloutLog(path, self.global_rank, self.trainer.world_size)
            self._log.append(self.last_rollouts)

    # Training on a window

    def _update_window(self) -> None:
        """All optimizer updates of an accumulation window; then the engine gets the weights.

        Every rank makes the same number of updates, whatever groups it has.
        """
        before = self.global_step
        if self.updates_per_window == 1:
            self.update()
        else:
            self.attach_old_log_probs(self._window)
            for epoch in range(self.update_settings.epochs_per_rollout):
                # The order is drawn from the window's seed, so a resumed run divides the window as before.
                generator = torch.Generator().manual_seed(derive_seed(self.batch_seed(), epoch))
                order = torch.randperm(len(self._window), generator=generator)
                for chosen in order.tensor_split(self.update_settings.minibatches):
                    self.add_gradient([self._window[index] for index in chosen.tolist()])
                    self.update()
            self._window = []
        if self.global_step != before:  # not if there was nothing to train on, on any rank
            self.engine.sync()

    # Logging, and ending where nothing is learnt

    def _log_step(self, rollout_seconds: float, update_seconds: float) -> None:
        sums = self.metrics.compute()  # of all ranks, which wait for one another here
        self._idle.add(sums, ends_window=not self.window_is_open)
        speeds = {
            "speed/rollout_seconds": rollout_seconds,
            "speed/update_seconds": update_seconds,
            "speed/completion_tokens_per_second": sums["completion_tokens"] / (rollout_seconds + update_seconds),
        }
        # Without a logger nobody draws the spread of each reward.
        spreads = self.metrics.spreads(sums) if self.trainer.loggers else {}
        self.log_step(self.metrics.means(sums) | spreads | speeds)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # after the callbacks' own
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
