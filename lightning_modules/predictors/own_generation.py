"""Answers of a policy by its own generation settings, whatever they are, with transformers' `generate`.

This is slow and for evaluation alone: it measures a model as its authors ship it (`generation` "model").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutSettings
from lightning_modules.serving.generation_rules import configure, own_seed


class OwnGeneration:
    """A `RolloutEngine` of one answer to each prompt, one prompt at a time.

    From `RolloutSettings` it takes the length and the banned tokens; all else is the model's own. Where that samples,
    random numbers follow from the sample's id.
    """

    def __init__(self, policy: QwenVL) -> None:
        self.policy = policy

    def sync(self) -> None:
        """Nothing: each call reads the policy's weights."""

    def close(self) -> None:
        """Nothing is kept."""

    @torch.inference_mode()
    def generate(
        self,
        items: Sequence[EncodedSample],
        settings: RolloutSettings,
        features: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        on_progress: Callable[[int], None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """One rollout for each item, without log-probabilities (NaN)."""
        rollouts = []
        for number, item in enumerate(items, 1):
            rollouts.append([self._answer(item, settings)])
            if on_progress is not None:
                on_progress(number)
        return rollouts

    def _answer(self, item: EncodedSample, settings: RolloutSettings) -> Rollout:
        policy, model = self.policy, self.policy.base
        banned, ends = policy.banned_ids(settings.ban), policy.eos_ids
        config = configure(model.generation_config, "model", settings.max_new_tokens, ends, banned)
        ids = item.input_ids[None]
        with own_seed(item.sample.id):
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=item.pixel_values.to(model.dtype),
                image_grid_thw=item.grid_thw,
                mm_token_type_ids=(ids == policy.image_token_id).int(),
                generation_config=config,
            )
        written = whole[0, ids.shape[1] :].cpu()
        text = policy.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Rollout(written, torch.full((len(written),), torch.nan), int(written[-1]) in ends, text)
