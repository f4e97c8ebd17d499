"""Model folders for the benchmark: the nano base model, and the real sizes of Qwen2.5-VL with random weights.

A folder with random weights has the nano tokenizer, with its vocabulary filled up to the real size, and Qwen's limits
of image sizes. The weights are drawn once, so that both contenders read the same weights.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from datamodules.checkpoints.pretrained import load_config, load_tokenizer, new_model
from datamodules.persistence.files import fingerprint, read_json, write_json
from lightning_modules.models.token_bans import special_ids

NANO_BASE = Path("models/nano-base")
RECIPE = "recipe.json"  # written last: a folder without it is unfinished


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2.5-VL."""

    text: dict[str, Any]  # fields of text_config
    vision: dict[str, Any]  # fields of vision_config
    tied: bool  # whether the output head shares the weights of the embeddings
    dtype: str
    max_pixels: int  # largest area of an image


_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_THIN_VISION = _VISION | {"depth": 8, "fullatt_block_indexes": [7]}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_QWEN_PIXELS = 12_845_056


def _text(width: int, inner: int, depth: int, heads: int, kv_heads: int, vocab: int, rope: dict) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
    }


# "3b" and "7b": the sizes in config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct.
SHAPES = {
    "tiny": Shape(
        _text(64, 128, 2, 4, 2, 1024, _QWEN_ROPE | {"mrope_section": [2, 3, 3]}),
        _VISION
        | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]},
        tied=True,
        dtype="float32",
        max_pixels=10_000,
    ),
    "3b": Shape(_text(2048, 11_008, 36, 16, 2, 151_936, _QWEN_ROPE), _VISION, True, "bfloat16", _QWEN_PIXELS),
    # The widths of the 7B with few layers, to try a machine or a change in two minutes.
    "7b-thin": Shape(_text(3584, 18_944, 4, 28, 4, 152_064, _QWEN_ROPE), _THIN_VISION, False, "bfloat16", _QWEN_PIXELS),
    "7b": Shape(_text(3584, 18_944, 28, 28, 4, 152_064, _QWEN_ROPE), _VISION, False, "bfloat16", _QWEN_PIXELS),
}


def model_folder(shape: str, folder: Path) -> Path:
    """The model folder of a shape. It is written below `folder` unless it is complete there already."""
    if shape == "nano":
        return NANO_BASE  # trained, and part of the repository
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is none of {sorted([*SHAPES, 'nano'])}")
    recipe = {"recipe": fingerprint(vars(SHAPES[shape]))}
    target = folder / shape
    if read_json(target / RECIPE) != recipe:
        shutil.rmtree(target, ignore_errors=True)
        _write_model(SHAPES[shape], target)
        write_json(target / RECIPE, recipe)
    return target


def _write_model(shape: Shape, target: Path) -> None:
    """Write the processor and random weights."""
    target.mkdir(parents=True)
    _write_processor(target, shape.text["vocab_size"], shape.max_pixels)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU draws billions of numbers much faster
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = new_model(_config(shape, target)).to(getattr(torch, shape.dtype))
    model.save_pretrained(target)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def _write_processor(target: Path, vocab_size: int, max_pixels: int) -> None:
    """Write the nano processor with a vocabulary of the real size and the real limit of image sizes."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(NANO_BASE / name, target / name)
    # Unused tokens fill the vocabulary, so that every id that is sampled has a token.
    tokenizer = read_json(NANO_BASE / "tokenizer.json")
    vocab = tokenizer["model"]["vocab"]
    used = max(*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"]))
    vocab |= {f"<unused {index}>": index for index in range(used + 1, vocab_size)}
    write_json(target / "tokenizer.json", tokenizer)
    processor = read_json(NANO_BASE / "processor_config.json")
    processor["image_processor"]["size"] = {"shortest_edge": 56 * 56, "longest_edge": max_pixels}
    write_json(target / "processor_config.json", processor)


def _config(shape: Shape, target: Path) -> Qwen2_5_VLConfig:
    """The configuration of a shape, with the token ids of the tokenizer in `target`."""
    special = load_tokenizer(target).convert_tokens_to_ids
    ends = {"bos_token_id": special("<|endoftext|>"), "pad_token_id": special("<|endoftext|>")}
    ends["eos_token_id"] = special("<|im_end|>")
    config = Qwen2_5_VLConfig(
        text_config=shape.text | ends | {"tie_word_embeddings": shape.tied},
        vision_config=shape.vision | {"out_hidden_size": shape.text["hidden_size"]},
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
        tie_word_embeddings=shape.tied,
    )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = getattr(torch, shape.dtype)
    return config


def tokens_never_sampled(folder: str | Path) -> list[int]:
    """The ids that no contender may sample: all special tokens, and ids without a token.

    The end tokens are among them, so every completion has its full length.
    """
    return list(special_ids(load_config(folder), load_tokenizer(folder), ends=()))
