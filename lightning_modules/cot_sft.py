"""Supervised fine-tuning on written answers (paper section 3.2.2), with thinking (CoT-SFT) or without (SFT)."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from datamodules.encoding.encoder import Batch, EncodedSample
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.vision_feature_cache import FeatureCache, tower_fingerprint
from lightning_modules.policy_module import PolicyModule


class CoTSFT(PolicyModule):
    """Next-token prediction of the completion, its closing <|im_end|> included; prompt and images are never targets.

    The loss is the mean over all completion tokens of an update (all batches of the window, all ranks), so a long
    answer weighs more than a short one. What the completion is, thinking and answer or answer alone, the data decides.
    feature_cache: folder where a frozen tower's image features are kept over epochs and runs, at most
    feature_cache_gib of them; null keeps none. Fields: those of `PolicyModule`.
    """

    def __init__(
        self, model: str, feature_cache: str | None = None, feature_cache_gib: float = 20.0, **policy: Any
    ) -> None:
        super().__init__(model, **policy)
        self.feature_cache, self.feature_cache_gib = feature_cache, feature_cache_gib
        self.check_settings()

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.feature_cache is not None and not self.freeze_vision:
            faults.append(f"feature_cache={self.feature_cache!r} needs freeze_vision=True, not {self.freeze_vision}")
        if self.feature_cache_gib <= 0:
            faults.append(f"feature_cache_gib={self.feature_cache_gib} must be greater than 0")
        return faults

    def configure_model(self) -> None:
        super().configure_model()
        if self.feature_cache is not None and self.policy.feature_cache is None:
            tower = tower_fingerprint(self.policy.base.model.visual, self.model)
            self.policy.feature_cache = FeatureCache(self.feature_cache, tower, self.feature_cache_gib)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        started = time.perf_counter()
        self.begin_batch(batch)
        total, correct, num_tokens = self._backward(batch)
        if self.end_batch():
            self.update()
            self.commit_window(batch)
        total, correct, num_tokens = self.sum_over_ranks([total, correct, num_tokens])
        seconds = time.perf_counter() - started
        self.log_step(
            {
                "train/loss": total / num_tokens,
                "train/token_accuracy": correct / num_tokens,
                "train/tokens": num_tokens,
                "speed/completion_tokens_per_second": num_tokens / seconds,
            }
        )

    def _backward(self, batch: Batch) -> tuple[float, float, int]:
        """Add the batch's gradient; (sum of -log p, targets that are the likeliest token, targets)."""
        items = batch.items
        known = self.policy.encode_images(items) if self.freeze_vision else None
        completions = [[_target(item)] for item in items]
        total, correct, num_tokens = 0.0, 0.0, 0
        for rows in self.in_step(pack_rows(items, completions, self.max_tokens_per_row)):
            if rows is None:
                self.idle_pass()
                continue
            features = known or self.row_features(rows, items)
            log_probs, best = self.policy.token_log_probs(rows, features, ban_tokens=False, with_best=True)
            loss = -log_probs.sum()
            self.backward_sum(loss, len(log_probs))
            total += loss.item()
            correct += (best == rows.targets).sum().item()
            num_tokens += len(log_probs)
        return total, correct, num_tokens


def _target(item: EncodedSample) -> Tensor:
    if item.completion_ids is None:
        raise ValueError(f"sample {item.sample.id!r} has no target: supervised training needs with_target=True")
    return item.completion_ids
