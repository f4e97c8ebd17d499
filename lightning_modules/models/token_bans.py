"""Special tokens of a model: tokens that end an answer, and tokens that are never sampled.

In training, a policy samples no special tokens except end tokens. In evaluation, it samples no image or video
placeholders.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

Ban = Literal["special", "placeholders"]


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer, from the model's generation config and from the tokenizer."""
    listed = generation.eos_token_id
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))


def placeholder_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Image and video placeholders. In an answer, they would be counted as further images of the prompt."""
    return tuple(sorted({config.image_token_id, config.video_token_id}))


def special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> tuple[int, ...]:
    """All special tokens except `ends`, and ids without a token.

    In evaluation they are allowed, as in transformers and vLLM, because official prompts ask for `<|box_start|>`.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*placeholder_ids(config), config.vision_start_token_id, config.vision_end_token_id}
    special |= set(range(len(tokenizer), config.text_config.vocab_size))
    return tuple(sorted(special - set(ends)))
