"""Measure the loss on held-out samples during a supervised phase. A checkpoint with the lowest loss can be kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.multi_image import encode_for_training
from datamodules.persistence.problems import Problems
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import SampleError
from datamodules.streaming.prefetch import prefetch
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import read_shards, source_list
from lightning_modules.metrics.token_loss import TokenLoss
from lightning_modules.training.progress import is_last_batch

log = logging.getLogger(__name__)


class HeldOutLoss(Callback):
    """Measures loss and token accuracy by task on held-out shards during CoT-SFT or SFT, and at its end.

    It logs `val/loss` and `val/loss/<task>`, in nats per token of the completions, and `val/token_accuracy`, 0-1.
    `WindowCheckpoint` with `monitor: val/loss` and
    `mode: min` keeps the checkpoint with the lowest loss. Give both the same `every_n_steps`.

    It measures only between two updates, without gradients or random numbers, so training is exactly the same with and
    without it. As in training, an unusable sample is skipped and counted.

    Args:
        shards: folder of held-out shards, or a list of folders. Training must not read them.
        every_n_steps: updates between two measurements; null measures only at the end.
        limit: the largest number of samples, spread evenly over the shards; null takes all.
        batch_size: number of samples that one rank encodes and measures together.
    """

    def __init__(
        self,
        shards: str | list[str],
        every_n_steps: int | None = None,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        problems = Problems()
        problems.positive_or_null(every_n_steps=every_n_steps, limit=limit)
        problems.positive(batch_size=batch_size)
        problems.require(bool(shards), "names no folder", shards=shards)
        problems.raise_all(type(self).__name__)
        self.shards, self.every_n_steps, self.limit, self.batch_size = shards, every_n_steps, limit, batch_size
        self.tasks: tuple[str, ...] = ()
        self.rejections = Rejections()
        self._reader: ShardReader | None = None
        self._numbers: list[int] = []  # numbers of the samples; all ranks together measure these
        self._rejected: set[str] = set()
        self._last_step = 0  # number of updates after the previous batch
        self._measured_step: int | None = None
        self._values: dict[str, float] = {}  # as measured last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the shards before any weights are read. Raises ValueError for a folder without shards."""
        declared = [shard for source in source_list(self.shards) for shard in read_shards(source)]
        # The list of tasks must be equal on all ranks, because the metric sums a tensor with one entry for each task.
        self.tasks = tuple(sorted({task for shard in declared for task in shard.tasks}))
        self._reader = ShardReader(self.shards)
        count = min(self.limit or self._reader.count, self._reader.count)
        self._numbers = [place * self._reader.count // count for place in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._measured_step, "values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured_step, self._values = state_dict["step"], dict(state_dict["values"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run uses the last measured value as the score of its checkpoints, as an uninterrupted run does.
        self._show(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last, self._last_step = self._last_step, trainer.global_step
        # The number of updates grows only at the end of an accumulation window, so none is open here.
        due = self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps
        # The last weights are measured here and not in `on_train_end`: the last checkpoint needs their score.
        is_last = trainer.global_step == trainer.max_steps or is_last_batch(trainer)
        if due or is_last:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights of a run that has ended before its last batch."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights, unless they have been measured already. All ranks call this at the same step."""
        if self._measured_step == trainer.global_step:
            return
        # 1. Each rank measures its share.
        metric = TokenLoss(self.tasks).to(pl_module.device)
        nothing = torch.zeros(0, dtype=torch.long, device=pl_module.device)
        metric.update(nothing, nothing, nothing)  # without this, the metric warns on a rank that has no sample
        was_training = pl_module.policy.training
        pl_module.policy.eval()  # no dropout of the adapter
        with torch.no_grad():
            for items in self._batches(trainer):
                self._add(metric, pl_module, items)
        pl_module.policy.train(was_training)

        # 2. The sums of all ranks.
        values = metric.compute()
        self._measured_step, self._values = trainer.global_step, {f"val/{name}": v for name, v in values.items()}
        if not values and trainer.is_global_zero:
            log.warning("no held-out sample of shards=%s could be measured", self.shards)

        # 3. Log them, at the step at which Lightning logs its own metrics.
        for logger in trainer.loggers:
            logger.log_metrics(self._values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._show(trainer)
        if values and trainer.is_global_zero:
            words = f"held-out loss {values['loss']:.4f}, token accuracy {values['token_accuracy']:.4f}"
            print(f"step {trainer.global_step}: {words}", flush=True)

    def _add(self, metric: TokenLoss, pl_module: LightningModule, items: Sequence[EncodedSample]) -> None:
        """Add the targets of a batch. An empty batch runs too, because sharded ranks need equal passes."""
        items = [item.to(pl_module.device) for item in items]
        numbers = [self.tasks.index(item.sample.task) for item in items]
        tasks = torch.tensor(numbers, dtype=torch.long, device=pl_module.device)  # [n], the task of each item
        for rows, log_probs, best in pl_module.target_passes(items):
            metric.update(log_probs, best == rows.targets, tasks[rows.completion_index])

    def _batches(self, trainer: Trainer) -> Iterator[list[EncodedSample]]:
        """This rank's samples, encoded in a thread one batch ahead; the same number of batches on every rank."""
        rank, world_size, size = trainer.global_rank, trainer.world_size, self.batch_size
        mine = self._numbers[rank::world_size]
        most = -(-len(self._numbers) // world_size)  # largest number of samples on one rank
        encoder = copy.copy(trainer.datamodule.encoder)
        encoder.with_target = True
        chunks = [mine[start : start + size] for start in range(0, most, size)]
        batches = prefetch((self._encode(encoder, chunk) for chunk in chunks), num_ahead=1)
        yield from batches
        # Report each sample that cannot be measured once, after the first measurement that reads it.
        if self.rejections:
            log.warning("held-out samples, rank %d: %s", rank, self.rejections.summary())
            self.rejections = Rejections()

    def _encode(self, encoder: Encoder, numbers: Sequence[int]) -> list[EncodedSample]:
        items = []
        for number in numbers:
            try:
                item = encode_for_training(encoder, self._reader.read(number))
                if item.sample.task not in self.tasks:
                    raise SampleError(
                        item.sample.id, "unknown_task", f"the manifest names no task {item.sample.task!r}"
                    )
                items.append(item)
            except SampleError as error:
                if error.sample_id not in self._rejected:  # each measurement reads it again
                    self._rejected.add(error.sample_id)
                    self.rejections.add(error)
        return items

    def _show(self, trainer: Trainer) -> None:
        """Put the values into the dictionary in which `WindowCheckpoint` looks for its `monitor`."""
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._values.items()})
