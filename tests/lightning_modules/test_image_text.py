"""Tiny random models of several families, built from their configurations: loaded, asked, answered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
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

from datamodules.boxes import Convention
from datamodules.chat_requests import RequestForm
from datamodules.dialects import find_dialect
from datamodules.samples import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from experiments.nano_model import CHAT_TEMPLATE, build_tokenizer
from lightning_modules.image_text import ImageTextAnswerer
from tests.conftest import QUESTIONS, random_png

SIDE = 56  # of the image that InternVL and LLaVA-OneVision see
SAMPLE = Sample(
    "q/0", "test", "refer", ("a.png", "b.png"), (ImagePart(0), ImagePart(1), TextPart(QUESTIONS[1])),
    BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "ring"),
)  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def load(sample: Sample) -> LoadedSample:
    if sample.id == "gone":
        raise SampleError(sample.id, "missing_image")
    return LoadedSample(
        sample, tuple(random_png(random.Random(k), size) for k, size in enumerate(((90, 60), (56, 84))))
    )


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


def save(build, folder: Path) -> Path:
    processor, config = build(build_tokenizer(QUESTIONS, vocab_size=340))
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("build", "convention"),
    [(qwen2_vl, Convention.PER_MILLE), (internvl, Convention.PER_MILLE), (llava_onevision, Convention.UNIT)],
    ids=["qwen2_vl", "internvl", "llava_onevision"],
)
def test_a_family_that_transformers_knows_answers(build, convention: Convention, tmp_path: Path) -> None:
    folder = save(build, tmp_path / "model")
    answerer = ImageTextAnswerer(str(folder), RequestForm(find_dialect(build.__name__, "")), max_tokens=6)
    gone = Sample("gone", "test", "refer", SAMPLE.images, SAMPLE.messages, SAMPLE.answer)
    (first, answer), (_, refused), (_, again) = answerer.answers([SAMPLE, gone, SAMPLE], load)
    assert answerer.convention == convention and first is SAMPLE
    assert answer == again and 1 <= answer.num_tokens <= 6
    assert [geometry.original for geometry in answer.geometries] == [(90, 60), (56, 84)]
    assert refused.refused == "missing_image"


def test_pixels_that_the_processor_would_change_are_an_error(tiny_model_dir: Path) -> None:
    dialect = find_dialect("qwen2_5_vl", "")
    answerer = ImageTextAnswerer(str(tiny_model_dir), RequestForm(dialect, max_pixels=28_900), max_tokens=2)
    ((_, answer),) = answerer.answers([SAMPLE], load)
    assert [geometry.processed for geometry in answer.geometries] == [(84, 56), (56, 84)]
    answerer.form = RequestForm(dialect, min_pixels=200_000)
    with pytest.raises(ValueError, match="min_pixels=200000"):
        list(answerer.answers([SAMPLE], load))


def test_code_that_comes_with_weights_is_not_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text()
    own = (
        '"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.M"}'
    )
    (tmp_path / "config.json").write_text(config.replace('"model_type": "qwen2_5_vl"', own, 1))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        ImageTextAnswerer(str(tmp_path), RequestForm(find_dialect("stated", "")))
