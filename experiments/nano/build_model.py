"""Build an untrained nano Qwen2.5-VL: tokenizer, chat template, image processor and configuration, in the real format.

The folder can be loaded with `AutoProcessor` and `AutoModelForImageTextToText`, like `Qwen/Qwen2.5-VL-7B-Instruct`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.encoding import messages
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.synthetic import single_image, tasks

# Qwen2.5-VL's special tokens, in the order of its vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Fixed parts of prompts and answers. A real vocabulary needs few tokens for them. In this small vocabulary, each is one
# token.
PHRASES = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "```json\n",
    "\n```",
    '{"bbox_2d": [',
    '], "label": "',
    '"}',
    ", ",
    ". ",
    ": ",
    "Image ",
    "Picture ",
    " image ",
    " picture ",
    "You are a helpful assistant.",
    messages.THINK_SUFFIX.strip(),
    messages.ANSWER_SUFFIX.strip(),
)
# Qwen2's rule for splitting text before BPE: words, single digits, punctuation, line breaks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's chat template, without tools and videos.
CHAT_TEMPLATE = (
    "{%- set images = namespace(value=0) -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set images.value = images.value + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ images.value ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Limits of an image's area in pixels. Resized images have 112x84, 84x112, 84x84 or 112x56 pixels, small crops 56x56.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 10_000


def corpus(seed: int, size: int) -> Iterator[str]:
    """Texts of the synthetic dataset, for the tokenizer: `size` single images and `size` puzzles of all ten tasks."""
    rng = random.Random(seed)
    for _ in range(size):
        scene = single_image.single_scene(rng)
        sizes = ImageSizes(scene.size, scene.size)
        for turn in single_image.single_turns(rng, scene, sizes, BoxFormat.ABSOLUTE_PIXELS, 2):
            yield turn.question
            yield turn.answer
        puzzle = tasks.make_puzzle(rng, rng.choice(TASKS))
        yield puzzle.question
        yield from (puzzle.thinking(wording) for wording in range(6))


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on `texts`.

    Any other text can be encoded too, in single bytes if necessary.
    """
    # 1. Split and bytes, as in Qwen2.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # 2. Learn merges; leave room in the vocabulary for special tokens and phrases.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PHRASES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def build_processor(seed: int = 0, corpus_size: int = 3000) -> Qwen2_5_VLProcessor:
    """The processor: tokenizer, image processor and chat template."""
    tokenizer = build_tokenizer(corpus(seed, corpus_size))
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: PreTrainedTokenizerFast, text: tuple[int, int], vision: tuple[int, int]
) -> Qwen2_5_VLConfig:
    """The configuration of the nano model.

    Args:
        tokenizer: for the ids of special tokens and the size of the vocabulary.
        text: (width, number of layers) of the language model.
        vision: (width, number of layers) of the vision tower.
    """

    def inner(width: int) -> int:
        return round(width * 8 / 3 / 64) * 64  # the usual width of a SwiGLU MLP

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    width, depth = text
    vocab_size = -(-len(tokenizer) // 64) * 64  # rounded up to a multiple of 64
    # Qwen's 0.02 is meant for widths of thousands. At a width of 192, training began too slowly with it: the loss after
    # 140 steps was 1.06, and 0.93 with 0.04.
    initializer_range = 0.04
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "initializer_range": initializer_range,
            "hidden_size": width,
            "intermediate_size": inner(width),
            "num_hidden_layers": depth,
            "num_attention_heads": width // 32,  # heads of width 32
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            # As in Qwen, columns use the lowest frequencies of M-RoPE, so neighbouring columns hardly differ there, and
            # the model learns places from the vision tower. With a small theta, columns would differ; but the model
            # learned places later (docs/lab_book.md), because no slow frequency was left by which a word can find its
            # object at any distance.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision[1],
            "initializer_range": initializer_range,
            "hidden_size": vision[0],
            "intermediate_size": inner(vision[0]),
            "num_heads": vision[0] // 32,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": [vision[1] - 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
