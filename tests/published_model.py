"""A tiny random Qwen2.5-VL folder in the layout in which Qwen publishes it (that of transformers 4): a flat
config.json, preprocessor_config.json, vocab.json and merges.txt, tensors named `model.layers.…` and
`visual.…` in several files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from datamodules.checkpoints.pretrained import new_model
from experiments.nano import build_model
from tests.conftest import QUESTIONS

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "vocab_size": 384,
}  # fmt: skip
ROPE = {"rope_theta": 10_000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
VISION = {
    "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_chans": 3,
    "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
IMAGES = {
    "min_pixels": 3136, "max_pixels": 10_000, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip


def published_folder(folder: Path, tied: bool = True, files: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the folder. `tied` is the 3B's head, untied the 7B's; with one of `files` there is no index."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder)
    tokens = {token["content"]: token["id"] for token in _read(folder / "tokenizer.json")["added_tokens"]}
    config = _config(tokens, tied, dtype)
    _write(folder / "config.json", config)
    ends = [tokens["<|im_end|>"], tokens["<|endoftext|>"]]
    decoding = {"bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends}
    _write(folder / "generation_config.json", decoding | {"do_sample": True, "repetition_penalty": 1.05})
    _write(folder / "preprocessor_config.json", IMAGES)
    _write(folder / "chat_template.json", {"chat_template": build_model.CHAT_TEMPLATE})
    _write_weights(folder, tied, files, dtype)
    return folder


def published_name(name: str) -> str:
    """The name in Qwen's files of a tensor of transformers 5's model."""
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def _config(tokens: dict[str, int], tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    fields = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {field: tokens[f"<|{name}|>"] for field, name in zip(fields, names, strict=True)}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": 2, "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-06,
        "sliding_window": 1024, "use_sliding_window": False, "use_cache": True, "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.41.2", "vision_config": VISION,
        "bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"],
    } | SIZES | ROPE | ids  # fmt: skip


def _write_tokenizer(folder: Path) -> None:
    build_model.build_tokenizer(QUESTIONS, vocab_size=340).save_pretrained(folder)
    model = _read(folder / "tokenizer.json")
    _write(folder / "vocab.json", model["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in model["added_tokens"]}
    special = [token["content"] for token in model["added_tokens"] if token["special"]]
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False, "added_tokens_decoder": added, "additional_special_tokens": special,
            "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
            "chat_template": build_model.CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "errors": "replace",
            "model_max_length": 2048, "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        },
    )  # fmt: skip


def _write_weights(folder: Path, tied: bool, files: int, dtype: torch.dtype) -> None:
    from transformers import AutoConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_model(AutoConfig.from_pretrained(folder)).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    tensors = {published_name(name): value for name, value in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, table = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in tensors.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": table})


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False))
