"""Answers of a policy with its own generation settings, with transformers' `generate`.

This is slow and only for evaluation: it measures a model with its published settings (`generation` "model").
"""

from __future__ import annotations

import torch

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.token_stream import TokenStreamer, Watch
from lightning_modules.rollouts.base import Rollout
from lightning_modules.serving.generation_rules import configure, own_seed


@torch.inference_mode()
def answer_by_own_settings(
    policy: QwenVL, item: EncodedSample, max_new_tokens: int, watch: Watch | None = None
) -> Rollout:
    """One answer to one prompt, without log-probabilities (NaN).

    Only the length and the banned tokens are set here; everything else comes from the model's settings. If these
    settings sample, the seed is derived from the sample's id. `watch` gets the token ids so far.
    """
    model = policy.base
    banned, ends = policy.banned_ids("placeholders"), policy.eos_ids
    config = configure(model.generation_config, "model", max_new_tokens, ends, banned)
    ids = item.input_ids[None]  # [1, prompt tokens]
    with own_seed(item.sample.id):
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=item.pixel_values.to(model.dtype),
            image_grid_thw=item.grid_thw,
            mm_token_type_ids=(ids == policy.image_token_id).int(),
            generation_config=config,
            streamer=TokenStreamer.of(config, watch),
        )
    written = whole[0, ids.shape[1] :].cpu()
    text = policy.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Rollout(written, torch.full((len(written),), torch.nan), int(written[-1]) in ends, text)
