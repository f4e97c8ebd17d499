"""Qwen3-VL as a second family, at a tiny size: norms on queries and keys, no biases there, and DeepStack, which adds
image features to the hidden states behind the first layers.

It stands here, not among the architectures, because nothing was trained with it. It is what such a file needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from experiments.nano.build_model import CHAT_TEMPLATE, build_tokenizer
from lightning_modules.models.architectures.base import Architecture, CacheSizes, SpeedUps, VisionSizes
from tests.conftest import QUESTIONS

GATED_MLP = ("gate_proj", "up_proj", "down_proj")


class Qwen3VL(Architecture):
    model_type = "qwen3_vl"
    name = "Qwen3-VL"
    text_path = "model.language_model"
    vision_path = "model.visual"
    linear_layers = ("q_proj", "k_proj", "v_proj", "o_proj", *GATED_MLP)
    published_prefixes = (("", ""),)

    def image_features(self, model: nn.Module, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
        found = model.model.get_image_features(patches, grids)
        return [torch.cat(image, dim=-1) for image in zip(found.pooler_output, *found.deepstack_features, strict=True)]

    def hidden_states(
        self, model: nn.Module, position_ids: Tensor, inputs_embeds: Tensor, mask: object, cache: object
    ) -> Tensor:
        # The decoder's own forward would build a mask from the cache and the mask that it is given.
        text = self.text_model(model)
        x, *later = inputs_embeds.split(text.config.hidden_size, dim=-1)
        rotation = text.rotary_emb(x, position_ids)
        for index, layer in enumerate(text.layers):
            x = layer(x, position_embeddings=rotation, attention_mask=mask, cache=cache)
            x = x + later[index] if index < len(later) else x
        return text.norm(x)

    def cache_sizes(self, model: nn.Module) -> CacheSizes:
        text = model.config.text_config
        return CacheSizes(text.num_hidden_layers, text.num_key_value_heads, text.head_dim)

    def decoder_parts(self, model: nn.Module) -> None:
        return None  # queries and keys have norms

    def speed_ups(self, model: nn.Module) -> SpeedUps:
        text = self.text_model(model)
        norms = [norm for layer in text.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return SpeedUps([text.norm, *norms], [layer.mlp for layer in text.layers], GATED_MLP, patch_embeddings=[])

    def vision_sizes(self, model: nn.Module) -> VisionSizes:
        raise NotImplementedError  # only the speed benchmark asks


def write_tiny_model(folder: Path) -> Path:
    tokenizer = build_tokenizer(QUESTIONS, vocab_size=340)
    size = {"shortest_edge": 64 * 64, "longest_edge": 170 * 170}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]},
            "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2], "initializer_range": 0.15,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # at their start they would hide a mistake
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    model.save_pretrained(folder)
    return folder
