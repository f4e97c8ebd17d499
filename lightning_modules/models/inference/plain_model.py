"""A transformers module as a `SamplingModel`. It works for every family and device, and it supports gradients."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.inference.base import Context, SamplingModel
from lightning_modules.models.layers.lora import refresh_merged


class PlainSamplingModel(SamplingModel):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module, self.lm_head = module, module.get_output_embeddings()

    def hidden_states(self, context: Context, position_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        # The registered attention function (`hf_attention`) gets the attention of a packed row in place of the mask,
        # and the cache of a decoding step in place of the keys.
        is_packed = isinstance(context, SharedPrefixAttention)
        mask, cache = (context, None) if is_packed else (None, context)
        return self.architecture.hidden_states(self.module, position_ids, inputs_embeds, mask, cache)

    def refresh(self, source: nn.Module) -> None:
        refresh_merged(self.module, source)
