"""What CoTSFT and GRPO share: the policy, the optimizer, and exact accumulation, failure and resume.

One optimizer update takes a *window* of `accumulate` batches on every rank. Losses are sums over tokens or completions,
divided once, at the update, by how many of them the whole window held on all ranks. So packing, accumulation and the
number of ranks never change the weight of a token, and a rank without anything to learn from takes part with zeros.
A window may reach over the end of an epoch; a run's last window may hold fewer batches, and is stepped like any other.
(Hugging Face's Trainer steps the remaining batches at the end of every epoch.)
A checkpoint written inside a window resumes at the window's start: a half-accumulated gradient is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from datamodules.encoding.encoder import Batch, EncodedSample
from lightning_modules.models.attention.packed_rows import PackedRows
from lightning_modules.models.fsdp import clip_divided, sum_gradients
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.models.unmoved import is_unmoved, weight_marks
from lightning_modules.training.endings import NothingLearnt
from lightning_modules.training.fsdp_strategy import ShardedStrategy
from lightning_modules.training.non_finite import require_finite
from lightning_modules.training.optim import build_optimizer, count_updates, require_same_groups
from lightning_modules.training.progress import is_last_batch, rewind
from lightning_modules.training.seeds import derive_seed, sample_seeds
from lightning_modules.training.training_faults import policy_faults

T = TypeVar("T")
STATE_KEY = "policy_module"


class PolicyModule(LightningModule):
    """A trained Qwen2.5-VL. The constructor is cheap: weights are read in `configure_model`.

    model: folder or Hub name. lora: `LoraSettings`; null trains all weights of the language model. dtype: of the
    weights. activation_gib: with gradient_checkpointing on a GPU, checkpoint only as many layers as keep their
    activations within it (null: all). betas, weight_decay: AdamW; norms and biases are not decayed (`optimizers`).
    warmup_fraction: share of all updates, from which the learning rate rises to its peak. max_grad_norm: null does
    not clip. accumulate: batches to an update (trainer.accumulate_grad_batches stays 1). max_tokens_per_row: packed
    length of one forward pass. seed: of everything random.
    """

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
        self.strict_loading = False  # checkpoints hold only what is trained; on_load_checkpoint is the strict check
        self.policy: QwenVL | None = None
        self.num_batches = 0  # trained on by this rank; seeds derive from it
        self._num_batches_committed = 0  # as of the last finished window: what a checkpoint says
        self._count = 0.0  # what the accumulated gradient must be divided by
        self._window_ids: list[str] = []
        self._start: dict[str, int] = {}  # marks of the weights as loaded, where they are trained themselves
        self._latest: dict[str, float] = {}  # metrics, as logged last
        self._latest_committed: dict[str, float] = {}

    def faults(self) -> list[str]:
        """Every setting that cannot work, as one sentence each; subclasses add theirs."""
        return policy_faults(self)

    def check_settings(self) -> None:
        """Called at the end of a subclass's constructor. Raises ValueError that lists all faults at once."""
        if faults := self.faults():
            raise ValueError(f"{type(self).__name__}: {'; '.join(faults)}")

    @property
    def with_reference(self) -> bool:
        return False

    @property
    def updates_per_window(self) -> int:
        return 1

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed))  # of the adapter's initial weights
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
            raise ValueError(
                f"trainer.strategy={type(strategy).__name__} is not supported: gradients are summed and divided here; "
                "use ddp, sharded (FSDP2) or one device"
            )
        optimizer, schedule = build_optimizer(
            self.policy.trainable_parameters(),
            self.learning_rate,
            self.betas,
            self.weight_decay,
            self.warmup_fraction,
            count_updates(self.trainer, self.accumulate, self.updates_per_window),
            foreach=False if self.policy.sharded is not None else None,  # no list may mix divided and whole tensors
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # One window of batches

    def begin_batch(self, batch: Batch) -> None:
        self._window_ids += batch.sample_ids
        if self.lora is not None and self.lora.dropout > 0:
            torch.manual_seed(self.batch_seed())  # dropout is all that draws from the global generator

    def batch_seed(self) -> int:
        return derive_seed(self.seed, self.num_batches, self.global_rank)

    def sample_seeds(self, batch: Batch) -> list[int]:
        """A seed for each item of a batch that has begun, the same on whichever rank it is."""
        earlier = self._window_ids[: -len(batch)]
        return sample_seeds(self.seed, self.num_batches // self.accumulate, earlier, batch.sample_ids)

    def end_batch(self) -> bool:
        """Count the batch; True if it was its window's last, and the caller should update."""
        self.num_batches += 1
        return self.num_batches - self._num_batches_committed >= self.accumulate or is_last_batch(self.trainer)

    @property
    def window_is_open(self) -> bool:
        """True when batches were trained on since the last update: a checkpoint would go back behind them."""
        return self.num_batches != self._num_batches_committed

    def commit_window(self, batch: Batch) -> None:
        """Call when a window's updates are done: a checkpoint written from now on resumes after `batch`."""
        self._num_batches_committed = self.num_batches
        self._window_ids = []
        mark_trained = getattr(getattr(self.trainer, "datamodule", None), "mark_trained", None)
        if mark_trained is not None:
            mark_trained(batch)

    def backward_sum(self, total: Tensor, count: float) -> None:
        """Add the gradient of `total`, a sum of `count` terms of the mean that is the loss."""
        self._require_finite(total, "the loss")
        with self._no_gradient_sync():
            self.manual_backward(total)
        self._count += count

    def update(self) -> bool:
        """Divide the accumulated gradient by what was counted on all ranks, clip it, and step.

        False if nothing was counted anywhere: weights, optimizer state and schedule stay as they are. All ranks make
        the same collective calls.
        """
        optimizer, parameters = self.optimizers(), self.policy.trainable_parameters()
        count = self.sum_over_ranks([self._count])[0]
        self._count = 0.0
        if count == 0:
            optimizer.zero_grad(set_to_none=True)
            return False
        norm = self._finish_gradients(parameters, count)
        self._require_finite(norm, "the gradient")
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
        """Log a batch's metrics, and again the latest value of those that only some batches have (an update ends a
        window; a batch may hold nothing to train on), so that a logger that samples batches misses none."""
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
        """Sum gradients over ranks, divide them by `count` and clip them; their norm before that."""
        sum_gradients(parameters, self._add_up if self.trainer.world_size > 1 else None)
        for parameter in parameters:
            parameter.grad.div_(count)
        limit, divided = self.max_grad_norm or math.inf, self.policy.sharded  # it is not 0 (`faults`)
        return clip_divided(parameters, limit, self._add_up) if divided else clip_grad_norm_(parameters, limit)

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
            if self.with_reference:
                self.policy.dummy_log_prob(reference=True)
            self.backward_sum(0.0 * total, 0)

    def _no_gradient_sync(self) -> AbstractContextManager:
        """DDP must not reduce in backward: ranks differ in how many backward passes they make."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _require_finite(self, value: Tensor, what: str) -> None:
        folder = self.trainer.default_root_dir
        require_finite(value, what, folder, self.global_step, self.global_rank, self._window_ids)

    def row_features(self, rows: PackedRows, items: Sequence[EncodedSample], reference: bool = False) -> list[Tensor]:
        """Image features by item for one forward pass with a trained tower. Only the items in `rows` have any: each
        backward pass frees its graph, so nothing can be shared between passes."""
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
        # Lightning has counted the open window's batches too; its epoch would end too soon by as many.
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
        self._latest_committed = checkpoint[STATE_KEY]["latest"]
        self._latest = dict(self._latest_committed)
