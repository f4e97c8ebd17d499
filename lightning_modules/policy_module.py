"""The common base of CoTSFT and GRPO: the policy, the optimizer, gradient accumulation, error handling, and resuming.

One optimizer update takes an *accumulation window* of `accumulate` batches on every rank. Losses are sums over tokens
or completions. They are divided once, at the update, by the number of tokens or completions in the whole window on all
ranks. So packing, accumulation and the number of ranks never change the weight of a token. A rank without anything to
train on contributes zeros.

A window may continue over the end of an epoch. The last window of a run may have fewer batches; it makes an update like
any other window. (Hugging Face's Trainer makes an update with the remaining batches at the end of every epoch.) A
checkpoint written inside a window resumes at the window's start: a half-accumulated gradient is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import SettingsError
from datamodules.samples.answer_text import AnswerForm
from lightning_modules.models.attention.packed_rows import PackedRows
from lightning_modules.models.fsdp import clip_sharded, sum_gradients
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.models.unmoved import is_unmoved, weight_marks
from lightning_modules.training.endings import NothingLearnt
from lightning_modules.training.fsdp_strategy import ShardedStrategy
from lightning_modules.training.non_finite import NonFiniteLoss
from lightning_modules.training.optim import cosine_factor, count_updates, decay_groups, require_same_groups
from lightning_modules.training.progress import is_last_batch, rewind
from lightning_modules.training.seeds import derive_seed, sample_seeds

T = TypeVar("T")
STATE_KEY = "policy_module"


class PolicyModule(LightningModule):
    """A Qwen2.5-VL in training. The constructor is cheap: weights are read in `configure_model`.

    Args:
        model: folder or Hub name.
        lora: LoRA on the language model; null trains all its weights.
        dtype: data type of the frozen weights; adapters are float32.
        freeze_vision: do not train the vision tower.
        gradient_checkpointing: keep no activations of a layer, and compute them again in the backward pass.
        activation_gib: with gradient_checkpointing on a GPU, memory in GiB for activations. Only the smallest
            sufficient number of layers is checkpointed; null checkpoints all layers.
        learning_rate: peak of the schedule.
        warmup_fraction: share of all updates in which the learning rate rises to its peak.
        weight_decay: weight decay of AdamW; norms and biases are not decayed (`optim`).
        betas: betas of AdamW.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        accumulate: number of batches in an accumulation window (trainer.accumulate_grad_batches stays 1).
        max_tokens_per_row: length of one packed row, which is one forward pass.
        seed: seed of all random numbers.
    """

    logs_every_batch = True  # False: with the last batch of each window only

    def __init__(
        self,
        model: str,
        lora: LoraSettings | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        freeze_vision: bool = True,
        gradient_checkpointing: bool = False,
        activation_gib: float | None = None,
        learning_rate: float = 1e-4,
        warmup_fraction: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float | None = 1.0,
        accumulate: int = 1,
        max_tokens_per_row: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.lora, self.dtype_name = model, lora, dtype
        self.freeze_vision, self.gradient_checkpointing = freeze_vision, gradient_checkpointing
        self.activation_gib = activation_gib
        self.learning_rate, self.warmup_fraction = learning_rate, warmup_fraction
        self.weight_decay, self.betas, self.max_grad_norm = weight_decay, betas, max_grad_norm
        self.accumulate, self.max_tokens_per_row, self.seed = accumulate, max_tokens_per_row, seed
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold only the trained weights; on_load_checkpoint is the strict check
        self.policy: QwenVL | None = None
        self.num_batches = 0  # that this rank has trained on; seeds derive from it
        self._num_batches_committed = 0  # at the end of the last finished window, as a checkpoint has it
        self._num_batches_closed = 0  # the same, with later batches that had come when it was finished
        self._count = 0.0  # the number of tokens or completions in the accumulated gradient; `update` divides by it
        self._absent = 0.0  # what `update` adds to this divisor for sampled completions that give no gradient
        self._window_ids: list[str] = []  # sample ids of the open window
        self._start: dict[str, int] = {}  # marks of the weights as loaded, where they are trained themselves
        self._latest: dict[str, float] = {}  # every metric, as logged last
        self._latest_committed: dict[str, float] = {}  # the same at the end of the last finished window

    def data_problems(self, answer_form: AnswerForm) -> list[str]:
        """All settings that cannot work with `data.answer_form`, in words; subclasses may have some."""
        return []

    def problems(self) -> Problems:
        """All settings that cannot work, in words; subclasses add theirs."""
        problems = Problems()
        problems.extend(self.lora.problems() if self.lora is not None else ())
        problems.positive(
            learning_rate=self.learning_rate, accumulate=self.accumulate, max_tokens_per_row=self.max_tokens_per_row
        )
        problems.require(0 <= self.warmup_fraction < 1, "must be in [0, 1)", warmup_fraction=self.warmup_fraction)
        problems.at_least(0, weight_decay=self.weight_decay)
        problems.require(all(0 <= beta < 1 for beta in self.betas), "must be two numbers in [0, 1)", betas=self.betas)
        problems.positive_or_null(max_grad_norm=self.max_grad_norm)
        problems.require(
            self.activation_gib is None or (self.gradient_checkpointing and self.activation_gib > 0),
            f"must be greater than 0, with gradient_checkpointing=True, not {self.gradient_checkpointing}; or null",
            activation_gib=self.activation_gib,
        )
        problems.one_of(("float32", "bfloat16"), dtype=self.dtype_name)  # float16 would need a loss scaler
        if self.dtype_name == "bfloat16" and (self.lora is None or not self.freeze_vision):
            # LoRA adapters are always float32. Weights that are trained without LoRA have the dtype of the model.
            name = "lora=None" if self.lora is None else f"freeze_vision={self.freeze_vision}"
            problems.append(
                f"dtype={self.dtype_name!r} with {name}: updates of a small learning rate are smaller than half the "
                "last digit of a bfloat16 weight and would be rounded away; use dtype='float32'"
            )
        return problems

    @property
    def with_reference(self) -> bool:
        """Whether log-probabilities of the frozen reference model are needed in this run."""
        return False

    @property
    def loss_reads_reference(self) -> bool:
        """Whether the loss of the next update needs them, in a forward pass beside the policy's."""
        return self.with_reference

    @property
    def updates_per_window(self) -> int:
        """Optimizer updates at the end of an accumulation window."""
        return 1

    @property
    def window_length(self) -> int:
        """Number of batches of the open accumulation window. The last window of a run may have fewer."""
        return self.accumulate

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed))  # for the initial weights of the adapter
            policy = QwenVL(
                self.model,
                lora=self.lora,
                dtype=self.dtype_name,
                freeze_vision=self.freeze_vision,
                with_reference=self.with_reference,
                gradient_checkpointing=self.gradient_checkpointing,
                activation_gib=self.activation_gib,
            )
        # Weights are loaded in evaluation mode, which turns gradient checkpointing and LoRA dropout off.
        self.policy = policy.train()
        self._start = weight_marks(self.policy)

    def configure_optimizers(self) -> dict[str, Any]:
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy):
            raise SettingsError(
                f"trainer.strategy={type(strategy).__name__} is not supported: gradients are summed and divided here; "
                "use ddp, sharded (FSDP2) or one device"
            )
        groups = decay_groups(self.policy.trainable_parameters(), self.weight_decay)
        foreach = False if self.policy.sharded is not None else None  # no list may mix sharded and full tensors
        optimizer = AdamW(groups, self.learning_rate, self.betas, weight_decay=self.weight_decay, foreach=foreach)
        num_updates = count_updates(self.trainer, self.accumulate, self.updates_per_window)
        num_warmup = math.ceil(self.warmup_fraction * num_updates)
        schedule = LambdaLR(optimizer, partial(cosine_factor, num_warmup=num_warmup, num_steps=num_updates))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # One accumulation window

    def on_fit_start(self) -> None:
        """Forget the open window of an earlier fit of this module, such as one that a notebook has interrupted."""
        self.num_batches = self._num_batches_closed = self._num_batches_committed
        self._window_ids, self._count, self._absent = [], 0.0, 0.0
        for parameter in self.policy.trainable_parameters():
            parameter.grad = None

    def begin_batch(self, batch: Batch) -> None:
        """Call first in a training step: it notes the batch's samples, and seeds dropout."""
        self._window_ids += batch.sample_ids
        self.seed_dropout(self.num_batches)

    def seed_dropout(self, number: int) -> None:
        """Call before the forward passes of batch `number`, so that its dropout follows from the seed alone."""
        if self.lora is not None and self.lora.dropout > 0:
            torch.manual_seed(self.batch_seed(number))  # dropout is all that draws from the global generator

    def batch_seed(self, number: int) -> int:
        """A seed for batch `number` on this rank."""
        return derive_seed(self.seed, number, self.global_rank)

    def window_seeds(self, start: int, earlier: Sequence[str], sample_ids: Sequence[str]) -> list[int]:
        """A seed for each sample, which does not depend on its rank.

        Args:
            start: number of the first batch of the accumulation window.
            earlier: ids of the samples before these in the window, on this rank.
            sample_ids: ids of the samples.
        """
        # No other window has this number: each has at least `accumulate` batches, except the last one of a run.
        return sample_seeds(self.seed, start // self.accumulate, earlier, sample_ids)

    def end_batch(self) -> bool:
        """Count the batch as done. True if it is the last one of its window: then the caller must update the weights
        and call `commit_window`.
        """
        self.num_batches += 1
        return self.num_batches - self._num_batches_committed >= self.window_length or is_last_batch(self.trainer)

    @property
    def window_is_open(self) -> bool:
        """Whether batches have come since the last updates. A checkpoint would go back to before them."""
        return self.num_batches != self._num_batches_closed

    def commit_window(self, batch: Batch, waiting: Sequence[Batch] = ()) -> None:
        """Call after the updates of a window: a checkpoint written from now on resumes after `batch`.

        Args:
            batch: the last batch of the window.
            waiting: later batches that have come already; a resumed run gets them again.
        """
        self._num_batches_closed = self.num_batches
        self._num_batches_committed = self.num_batches - len(waiting)
        self._window_ids = [sample_id for each in waiting for sample_id in each.sample_ids]
        mark_trained = getattr(getattr(self.trainer, "datamodule", None), "mark_trained", None)
        if mark_trained is not None:
            self._latest |= mark_trained(batch)  # logged with the batch, and again until the next window ends

    def backward_sum(self, total: Tensor, count: float) -> None:
        """Add a gradient; `update` divides it.

        Args:
            total: scalar, a sum of the loss over `count` tokens or completions.
            count: what `total` adds to the number by which the gradient of the window is divided.

        Raises:
            NonFiniteLoss: `total` is NaN or infinite.
        """
        self._require_finite(total, "the loss")
        with self._no_gradient_sync():
            self.manual_backward(total)
        self._count += count

    def update(self) -> bool:
        """Divide the accumulated gradient by the count of all ranks, clip it, and make one optimizer step.

        All ranks make the same collective calls.

        Returns False if nothing was counted on any rank: weights, optimizer state and schedule stay as they are.

        Raises:
            NonFiniteLoss: the norm of the gradient is NaN or infinite.
        """
        optimizer, parameters = self.optimizers(), self.policy.trainable_parameters()

        # 1. If no rank has anything to train on, skip the step: weight decay and momentum would change the weights.
        count, absent = self.sum_over_ranks([self._count, self._absent])
        self._count = self._absent = 0.0
        if count == 0:
            optimizer.zero_grad(set_to_none=True)
            return False

        # 2. The gradient of the mean over the window, clipped.
        norm = self._finish_gradients(parameters, count + absent)
        self._require_finite(norm, "the gradient")

        # 3. One step of the optimizer and of the schedule.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule = self.lr_schedulers()
        self._latest |= {"train/learning_rate": schedule.get_last_lr()[0], "train/grad_norm": norm.item()}
        schedule.step()
        return True

    def require_learnt(self) -> None:
        """Call it on all ranks at the end of a run, before merging.

        Raises NothingLearnt if no update was made, or if every weight still equals the loaded weight.
        """
        updates = self.trainer.global_step
        if updates > 0 and not is_unmoved(self.policy, self._start):
            return
        fact = f"{updates} updates have changed no weight of the model" if updates else "no update was made"
        raise NothingLearnt(f"nothing was learnt: {fact}; {self.explain_no_learning()}")

    def explain_no_learning(self) -> str:
        """Possible reasons, in words."""
        return (
            f"learning_rate={self.learning_rate} may be too small for dtype={self.dtype_name!r}, or trainer.max_steps, "
            "max_epochs and limit_train_batches leave no batch"
        )

    def log_step(self, metrics: dict[str, float]) -> None:
        """Log a batch's metrics, and the latest value of every other metric.

        Some metrics exist for some batches only: the learning rate is logged at updates, and a batch may hold nothing
        to train on. A logger that samples every n-th batch would miss them.
        """
        self._latest |= metrics
        if not self.window_is_open:
            self._latest_committed = dict(self._latest)
        self.log_dict(self._latest)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum of the same list on every rank."""
        return self._add_up(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def _add_up(self, tensor: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def _finish_gradients(self, parameters: list[torch.nn.Parameter], count: float) -> Tensor:
        """Sum gradients over ranks, divide them by `count` and clip them. Returns their norm before clipping."""
        sum_gradients(parameters, self._add_up if self.trainer.world_size > 1 else None)
        for parameter in parameters:
            parameter.grad.div_(count)
        limit, sharded = self.max_grad_norm or math.inf, self.policy.sharded  # the limit is not 0 (`problems`)
        return clip_sharded(parameters, limit, self._add_up) if sharded else clip_grad_norm_(parameters, limit)

    def equal_passes(self, rows: Iterable[T]) -> Iterator[T | None]:
        """Yield this rank's rows, then None until every rank has made the same number of passes.

        With sharded layers (FSDP2) each forward pass is a collective operation. A rank that has run out of rows must
        still call `dummy_forward`; otherwise the others wait for ever.
        """
        rows, num_dummies = list(rows), 0
        if self.policy.sharded is not None:
            # Ranks agree before the first row: its pass waits for the other ranks already.
            most = self.trainer.strategy.reduce(torch.tensor(len(rows), device=self.device), reduce_op="max")
            num_dummies = int(most) - len(rows)
        yield from rows
        yield from [None] * num_dummies

    def dummy_forward(self) -> None:
        """Go through every pass that a row goes through, with one token and without any effect on the gradient."""
        total = self.policy.dummy_log_prob()
        if torch.is_grad_enabled():
            if self.loss_reads_reference:
                self.policy.dummy_log_prob(reference=True)
            self.backward_sum(0.0 * total, 0)

    def _no_gradient_sync(self) -> AbstractContextManager:
        """Keeps DDP from reducing gradients in a backward pass: ranks make different numbers of them."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _require_finite(self, value: Tensor, what: str) -> None:
        """Raises NonFiniteLoss if a loss or the norm of a gradient, named `what`, is NaN or infinite."""
        if not torch.isfinite(value):
            error = NonFiniteLoss(what, self.global_step, self._window_ids)
            error.write(Path(self.trainer.default_root_dir), self.global_rank)
            raise error

    def row_features(self, rows: PackedRows, items: Sequence[EncodedSample], reference: bool = False) -> list[Tensor]:
        """Image features for one forward pass with a trained vision tower: one [image tokens, F] for each item.

        Only the items in `rows` have any; the others have an empty tensor. Nothing is shared between passes, because
        each backward pass frees its graph.

        Args:
            rows: the packed row of the pass.
            items: all items given to `pack_rows`.
            reference: encode with the tower of the reference model.
        """
        features: list[Tensor] = [torch.empty(0)] * len(items)
        encoded = self.policy.encode_images([items[index] for index in rows.items], reference=reference)
        for index, tokens in zip(rows.items, encoded, strict=True):
            features[index] = tokens
        return features

    # Checkpoints hold the trained parameters, and the state as of the last finished window

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint[STATE_KEY] = {"num_batches": self._num_batches_committed, "latest": self._latest_committed}
        # Lightning has counted the batches of the open window too. They will be trained on again.
        rewind(checkpoint["loops"]["fit_loop"], self.num_batches - self._num_batches_committed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint's parameters are not exactly those trained here."""
        saved, trained = set(checkpoint["state_dict"]), self._trained_names()
        if saved != trained:
            raise ValueError(
                f"checkpoint does not fit the policy of model={self.model!r}, lora={self.lora}: "
                f"missing {sorted(trained - saved)[:3]}, unexpected {sorted(saved - trained)[:3]}"
            )
        require_same_groups(checkpoint, self.policy.trainable_parameters(), self.weight_decay)
        self.num_batches = self._num_batches_committed = checkpoint[STATE_KEY]["num_batches"]
        self._num_batches_closed = self.num_batches
        self._latest_committed = checkpoint[STATE_KEY]["latest"]
        self._latest = dict(self._latest_committed)
