"""Supervised fine-tuning on written answers (paper section 3.2.2), with thinking (CoT-SFT) or without it (SFT)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.persistence.problems import Problems
from lightning_modules.metrics.step_sums import StepSums
from lightning_modules.models.attention.packed_rows import PackedRows, pack_rows
from lightning_modules.models.vision_feature_cache import FeatureCache, tower_fingerprint
from lightning_modules.policy_module import PolicyModule


class CoTSFT(PolicyModule):
    """Next-token prediction on the completion and its closing <|im_end|>. Prompt and images are never targets.

    The loss is the mean over all completion tokens of one update: all batches of the accumulation window, on all ranks.
    So a long answer has more weight than a short one. The data decides whether the completion has thinking.

    Args:
        model: folder or Hub name of the model.
        feature_cache: folder for the image features of a frozen vision tower, which are kept for later epochs and runs;
            null keeps none.
        feature_cache_gib: largest size of these features in GiB.
        policy: the settings of `PolicyModule`.
    """

    def __init__(
        self, model: str, feature_cache: str | None = None, feature_cache_gib: float = 20.0, **policy: Any
    ) -> None:
        super().__init__(model, **policy)
        self.feature_cache, self.feature_cache_gib = feature_cache, feature_cache_gib
        self.metrics = StepSums(("loss", "correct", "tokens"))
        self.problems().raise_all(type(self).__name__)

    def problems(self) -> Problems:
        """Messages for all invalid settings."""
        problems, is_frozen = super().problems(), self.freeze_vision
        needs = f"needs freeze_vision=True, not {is_frozen}"
        problems.require(self.feature_cache is None or is_frozen, needs, feature_cache=self.feature_cache)
        problems.positive(feature_cache_gib=self.feature_cache_gib)
        return problems

    def configure_model(self) -> None:
        """Load the model, and attach the feature cache."""
        super().configure_model()
        # Lightning may call this twice. The key of the cache contains a hash of the tower's weights.
        if self.feature_cache is not None and self.policy.feature_cache is None:
            tower = tower_fingerprint(self.policy.vision_tower, self.model)
            self.policy.feature_cache = FeatureCache(self.feature_cache, tower, self.feature_cache_gib)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the gradient of one batch. The last batch of an accumulation window also updates the weights."""
        started = time.perf_counter()
        self.begin_batch(batch)

        # 1. Forward and backward passes; gradients add up until the window is complete.
        self.metrics.reset()
        self._backward(batch)

        # 2. At the end of the window: one optimizer step. Only then a checkpoint may mark the batches as used.
        if self.end_batch():
            self.update()
            self.commit_window(batch)

        # 3. Metrics of this batch over all ranks.
        sums = self.metrics.compute()
        seconds = time.perf_counter() - started
        self.log_step(
            {
                "train/loss": sums["loss"] / sums["tokens"],
                "train/token_accuracy": sums["correct"] / sums["tokens"],
                "train/tokens": sums["tokens"],
                "speed/completion_tokens_per_second": sums["tokens"] / seconds,
            }
        )

    def _backward(self, batch: Batch) -> None:
        """Add the gradient of the batch, and its sums to `metrics`."""
        for rows, log_probs, best in self.target_passes(batch.items):
            # Rows have different numbers of tokens, so the sum is added here, and `update` divides by the number of
            # tokens of the whole window.
            loss = -log_probs.sum()
            self.backward_sum(loss, len(log_probs))
            hits = (best == rows.targets).sum().item()
            self.metrics.update(loss=loss.item(), correct=hits, tokens=len(log_probs))

    def target_passes(self, items: Sequence[EncodedSample]) -> Iterator[tuple[PackedRows, Tensor, Tensor]]:
        """One forward pass for each packed row of `items`, in training and on held-out samples.

        Yields the row, log p of its N targets [N], and the most likely token at the position of each target [N]. Target
        n belongs to the item `rows.completion_index[n]`. All ranks must call this and exhaust the iterator, even a rank
        without items.
        """
        # Features of a frozen tower need no gradient, so they are computed once for the whole batch (or read from the
        # cache). A trained tower runs inside the forward pass of each row.
        known = self.policy.encode_images(items) if self.freeze_vision and items else None
        # Several samples share one packed row; attention does not cross from one sample to another.
        completions = [[_target(item)] for item in items]
        for rows in self.equal_passes(pack_rows(items, completions, self.max_tokens_per_row)):
            if rows is None:  # another rank has more rows; FSDP needs the same number of passes on every rank
                self.dummy_forward()
                continue
            features = known or self.row_features(rows, items)
            yield rows, *self.policy.token_log_probs(rows, features, ban_tokens=False, with_best=True)


def _target(item: EncodedSample) -> Tensor:
    """The token ids of the target, long [C]. Raises ValueError if the sample was encoded without one."""
    if item.completion_ids is None:
        raise ValueError(f"sample {item.sample.id!r} has no target: supervised training needs with_target=True")
    return item.completion_ids
