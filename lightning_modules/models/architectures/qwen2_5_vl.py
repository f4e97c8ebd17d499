"""Qwen2.5-VL (arXiv:2502.13923) in the layout of transformers.

The decoder has biases only on query, key and value; it uses M-RoPE and SwiGLU. The vision tower has RMS norms, SwiGLU
and window attention. Its merger makes one token from 2 x 2 patches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_modules.models.architectures.base import (
    Architecture,
    CacheSizes,
    DecoderParts,
    LayerParts,
    SpeedUps,
    VisionSizes,
)

TEXT, VISION = "model.language_model", "model.visual"
GATED_MLP = ("gate_proj", "up_proj", "down_proj")


class Qwen25VL(Architecture):
    model_type = "qwen2_5_vl"
    name = "Qwen2.5-VL"
    text_path = TEXT
    vision_path = VISION
    linear_layers = ("q_proj", "k_proj", "v_proj", "o_proj", *GATED_MLP)
    # transformers 4 wrote `model.layers.0…`, `visual.blocks.0…` and `lm_head.weight`.
    published_prefixes = (
        ("", ""),
        ("visual.", f"{VISION}."),
        ("model.", f"{TEXT}."),
        ("language_model.model.", f"{TEXT}."),
        ("language_model.", ""),
    )

    def image_features(self, model: nn.Module, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
        return model.model.get_image_features(patches, grids).pooler_output

    def hidden_states(
        self, model: nn.Module, position_ids: Tensor, inputs_embeds: Tensor, mask: object, cache: object
    ) -> Tensor:
        text = self.text_model(model)
        return text(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            # A mapping is passed on unchanged; then transformers does not build its own mask.
            attention_mask={"full_attention": mask},
            use_cache=False,
            **{_cache_argument(type(text)): cache},
        ).last_hidden_state

    def cache_sizes(self, model: nn.Module) -> CacheSizes:
        text = model.config.text_config
        head_width = text.hidden_size // text.num_attention_heads
        return CacheSizes(text.num_hidden_layers, text.num_key_value_heads, head_width)

    def decoder_parts(self, model: nn.Module) -> DecoderParts | None:
        if not _has_silu(model.config.text_config):
            return None
        text = self.text_model(model)
        return DecoderParts([_layer_parts(layer) for layer in text.layers], text.rotary_emb, text.norm)

    def speed_ups(self, model: nn.Module) -> SpeedUps:
        text, tower = self.text_model(model), self.vision_tower(model)
        norms = [text.norm, tower.merger.ln_q]
        norms += [norm for layer in text.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        norms += [norm for block in tower.blocks for norm in (block.norm1, block.norm2)]
        layers = [*text.layers] if _has_silu(model.config.text_config) else []
        layers += [*tower.blocks] if _has_silu(model.config.vision_config) else []
        return SpeedUps(norms, [layer.mlp for layer in layers], GATED_MLP, [tower.patch_embed])

    def vision_sizes(self, model: nn.Module) -> VisionSizes:
        tower, config = self.vision_tower(model), model.config.vision_config
        in_merger = _num_weights(tower.merger)
        window = (config.window_size // config.patch_size) ** 2
        return VisionSizes(
            width=config.hidden_size,
            patch_weights=_num_weights(tower) - in_merger,
            token_weights=in_merger,
            merged_patches=config.spatial_merge_size**2,
            windows=tuple(None if i in config.fullatt_block_indexes else window for i in range(config.depth)),
        )


def _layer_parts(layer: nn.Module) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        attention_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        index=attention.layer_idx,
        num_key_heads=attention.num_key_value_heads,
        head_width=attention.head_dim,
        scaling=attention.scaling,
    )


def _has_silu(config: object) -> bool:
    return config.hidden_act == "silu"


def _num_weights(module: nn.Module) -> int:
    """Number of weights in linear layers and convolutions, without biases and norms."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    """The name of the argument for the cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
