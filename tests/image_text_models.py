"""Tiny random models of several families, built from their configurations and saved as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from experiments.nano.build_model import CHAT_TEMPLATE, build_tokenizer
from tests.conftest import QUESTIONS

SIDE = 56  # of the image that InternVL and LLaVA-OneVision see
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def template(image: str) -> str:
    return CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)


def text_config(tokenizer: PreTrainedTokenizerFast, **more) -> dict:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return TEXT | {"vocab_size": len(tokenizer), "model_type": "qwen2"} | ends | more


def qwen2_vl(tokenizer: PreTrainedTokenizerFast):
    size = {"shortest_edge": 56 * 56, "longest_edge": 10_000}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=CHAT_TEMPLATE
    )
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"))}  # fmt: skip
    text = {key: value for key, value in text_config(tokenizer, rope_parameters=rope).items() if key != "model_type"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return processor, Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def internvl(tokenizer: PreTrainedTokenizerFast):
    named = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    named |= {"context_image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    size = {"height": SIDE, "width": SIDE}
    patches = (SIDE // 14) ** 2 // 4  # after pixel shuffling
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True), tokenizer, InternVLVideoProcessor(size=size),
        image_seq_length=patches, chat_template=template("<|image_pad|>\n"),
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    vision = VISION | {"image_size": [SIDE, SIDE], "patch_size": [14, 14]}
    return processor, InternVLConfig(
        text_config=text_config(tokenizer), vision_config=vision, image_token_id=image, image_seq_length=patches
    )


def llava_onevision(tokenizer: PreTrainedTokenizerFast):
    grid, size = [[SIDE, SIDE], [SIDE, 2 * SIDE]], {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=(SIDE // 14) ** 2,
        vision_feature_select_strategy="full", image_token="<|image_pad|>", video_token="<|video_pad|>",
        chat_template=template("<|image_pad|>\n"),
    )  # fmt: skip
    vision = VISION | {
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return processor, LlavaOnevisionConfig(
        text_config=text_config(tokenizer),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        image_grid_pinpoints=grid,
    )


def save_model(build, folder: Path) -> Path:
    processor, config = build(build_tokenizer(QUESTIONS, vocab_size=340))
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
