"""The nano tokenizer, template and folder: what the real Qwen2.5-VL's have, in small."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from datamodules.checkpoints.pretrained import new_model
from datamodules.encoding.messages import ANSWER_SUFFIX, THINK_SUFFIX
from datamodules.synthetic.world import KINDS, SIZES
from experiments.nano.build_model import (
    MAX_PIXELS,
    MIN_PIXELS,
    PHRASES,
    SPECIAL_TOKENS,
    build_config,
    build_processor,
    build_tokenizer,
    corpus,
)

TOKENIZER = build_tokenizer(corpus(0, 300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    processor = build_processor(seed=0, corpus_size=100)
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new_model(build_config(processor.tokenizer, text=(64, 2), vision=(32, 2))).save_pretrained(folder)
    return folder


def encode(text: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.text() | st.lists(st.sampled_from((*PHRASES, *SPECIAL_TOKENS, "12", "é", " "))).map("".join))
@example("\r\n\t  tabs,  blanks and new lines \n\n ")
@example("12½ ﬁ Ⅻ 漢字 👩‍👩‍👧 e\u0301 \u202e \x00\x7f")
@example('<think>it\'s <|im_end|>]] }, "label": "')
@settings(max_examples=150, deadline=None, database=None)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


@given(st.integers(0, 10**12))
@settings(max_examples=50, deadline=None, database=None)
def test_every_digit_is_a_token(number: int) -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(encode(str(number)))
    assert tokens == list(str(number))


@pytest.mark.parametrize("token", [*PHRASES, *SPECIAL_TOKENS])
def test_phrases_and_special_tokens_are_one_token(token: str) -> None:
    assert len(encode(token)) == 1


def test_special_tokens_are_skipped_on_decoding_and_phrases_are_not() -> None:
    for token in SPECIAL_TOKENS:
        assert TOKENIZER.decode(encode(token), skip_special_tokens=True) == ""
    for phrase in PHRASES:
        assert TOKENIZER.decode(encode(phrase), skip_special_tokens=True) == phrase


def test_the_prompts_of_this_project_and_its_answers_are_short() -> None:
    assert len(encode(f"Question?{THINK_SUFFIX}")) <= len(encode("Question?")) + 2
    assert len(encode(f"Question?{ANSWER_SUFFIX}")) <= len(encode("Question?")) + 2
    assert len(encode('{"bbox_2d": [12, 34, 56, 78], "label": "hollow red circle"}')) <= 20


def test_words_of_the_nano_world_are_single_tokens() -> None:
    words = {word for kind in KINDS for word in (kind.shape, kind.colour, "hollow")}
    assert {word for word in words if len(encode(f" {word}")) > 1} == set()


def test_the_vocabulary_holds_every_byte_and_no_id_twice() -> None:
    assert len(TOKENIZER) == len(set(TOKENIZER.get_vocab().values()))
    assert max(TOKENIZER.get_vocab().values()) == len(TOKENIZER) - 1
    assert all(len(encode(chr(code))) == 1 for code in range(128))


def test_equal_seeds_give_equal_tokenizers() -> None:
    first, second = (build_tokenizer(corpus(5, 60)).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_plain_auto_classes_load_the_folder(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}
    config = model.config
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert processor.tokenizer.eos_token_id == config.text_config.eos_token_id
    assert config.text_config.vocab_size >= len(processor.tokenizer)
    text = "what <|vision_start|><|image_pad|><|vision_end|> is it"
    inputs = processor(text=[text], images=[Image.new("RGB", (112, 84))], return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_id).sum() == 112 * 84 // 28**2
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], config.text_config.vocab_size)
    assert logits.isfinite().all()


def test_the_template_writes_qwen_s_conversation(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = f"<|im_start|>user\n{vision}{vision}Same?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert processor.apply_chat_template(messages, tokenize=False) == system + expected
    numbered = expected.replace(vision + vision, f"Picture 1: {vision}Picture 2: {vision}")
    assert processor.apply_chat_template(messages, add_vision_id=True, tokenize=False) == system + numbered
    own = [{"role": "system", "content": "Be brief."}, messages[0]]
    text = processor.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "helpful" not in text


def test_the_image_processor_resizes_by_qwen_s_rule(folder: Path) -> None:
    images = AutoProcessor.from_pretrained(folder).image_processor
    for width, height in (*SIZES, (9, 11), (300, 40)):
        grid = images(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
        expected = smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
        assert tuple((grid[0, 1:] * images.patch_size).tolist()) == expected


def test_the_corpus_is_text_of_all_kinds() -> None:
    text = "\n".join(corpus(random.Random(1).randrange(100), 300))
    pieces = ("bbox_2d", "share one object", "red bounding box", "<|object_ref_start|>", "Locate it in picture 2")
    for piece in pieces:
        assert piece in text
