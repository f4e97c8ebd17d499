"""Special tokens of a model: those that end an answer, and those that it never writes.

In training a policy writes no special token but an end, in evaluation no placeholder of an image or video.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

Ban = Literal["special", "placeholders"]


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: those of the model's generation config and the tokenizer's own."""
    listed = generation.eos_token_id
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))


def placeholder_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Image and video placeholders: a model that wrote one would change which images the prompt has."""
    return tuple(sorted({config.image_token_id, config.video_token_id}))


def special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> tuple[int, ...]:
    """All special tokens but `ends`, and ids that no token has.

    In evaluation they may be written, as with transformers and vLLM: official prompts ask for `<|box_start|>`.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*placeholder_ids(config), config.vision_start_token_id, config.vision_end_token_id}
    special |= set(range(len(tokenizer), config.text_config.vocab_size))
    return tuple(sorted(special - set(ends)))
