"""The decoding rules of answers: greedy decoding, in the same way for every model of a table.

A checkpoint's generation_config.json and a server's defaults may contain sampling parameters or a repetition penalty.
Qwen2.5-VL's file has a repetition penalty of 1.05, for example, and vLLM applies it to every request that does not set
another value.

- "greedy": every such field is set explicitly to its neutral value, so no value comes from the checkpoint or the
  server. Only token ids are taken from the checkpoint's settings.
- "model": the model's or the server's own settings, unchanged.

The choice and all its values are part of the identity of a result.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from lightning_modules.serving.openai_client import EndpointSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig

Generation = Literal["greedy", "model"]

# Neutral values of the fields with which transformers' `generate` changes logits, lengths or the search. Fields that
# are lists or objects (suppressed and forced tokens, bad words, biases, guidance, watermarks, …) are neutral if absent.
NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
}
TOKEN_IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")  # kept from the model's own settings
# Neutral values of a server's fields. OpenAI's API has the first three. vLLM and SGLang have all; top_k -1 means off.
OPENAI_FIELDS = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SERVER_FIELDS = OPENAI_FIELDS | {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
GREEDY_SERVER_FIELDS = {"temperature": 0.0} | SERVER_FIELDS


def rules(generation: Generation) -> dict[str, Any]:
    """The decoding rules of a model in this process that its answers depend on, as JSON values."""
    stated = {"generation": generation, "banned": "image and video placeholders"}
    return stated | (NEUTRAL if generation == "greedy" else {})


def note(generation: str) -> str:
    """The text that a table adds to a row; "" for greedy decoding, which is the default."""
    return "" if generation == "greedy" else ", the model's own generation settings"


def configure(
    own: GenerationConfig, generation: Generation, max_new_tokens: int, ends: Collection[int], banned: Collection[int]
) -> GenerationConfig:
    """The configuration of transformers' `generate` for one model.

    transformers fills every field that is None from the model's own configuration. So with "greedy", the result must
    also become the model's `generation_config`.

    Args:
        own: the model's own configuration.
        generation: greedy decoding, or the model's own rules.
        max_new_tokens: length of the longest answer, in tokens.
        ends: token ids that end an answer.
        banned: token ids that must never be generated.
    """
    from transformers import GenerationConfig

    # 1. The rules.
    if generation == "greedy":
        kept = {name: value for name in TOKEN_IDS if (value := getattr(own, name, None)) is not None}
        made = GenerationConfig(**NEUTRAL, **kept)
    else:
        made = copy.deepcopy(own)
        banned = {*banned, *(made.suppress_tokens or ())}
    # 2. Length, ends and banned tokens, which this project sets for every model.
    made.max_length, made.max_new_tokens = None, max_new_tokens
    made.eos_token_id, made.suppress_tokens = sorted(ends), sorted(banned) or None
    if made.pad_token_id is None:
        # any id is right, because questions are asked one at a time, without padding
        made.pad_token_id = made.eos_token_id[0]
    return made


@contextmanager
def own_seed(name: str) -> Iterator[None]:
    """Seed PyTorch's random numbers with `name` inside this context.

    So a model whose own settings use sampling gives the same answer to the same question every time.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(crc32(name.encode()))
        yield


def server_rules(settings: EndpointSettings, generation: Generation) -> dict[str, Any]:
    """The decoding rules of a model on a server that its answers depend on, as JSON values."""
    if generation == "model":
        return {"generation": "model"}
    return {"generation": "greedy", "temperature": 0.0} | server_fields(settings)


def server_fields(settings: EndpointSettings) -> dict[str, Any]:
    """The neutral sampler fields of a request to this server, without the temperature."""
    return dict(SERVER_FIELDS if settings.sampling_fields == "vllm" else OPENAI_FIELDS)


def stating(settings: EndpointSettings, generation: Generation) -> EndpointSettings:
    """The settings of the same server, with the rules in `extra_body` of each request; unchanged for "model".

    Raises:
        ValueError: the user's extra_body has a field that would change greedy decoding.
    """
    if generation == "model":
        return settings
    if own := sorted(settings.extra_body.keys() & GREEDY_SERVER_FIELDS.keys()):
        found = ", ".join(f"{name}={settings.extra_body[name]!r}" for name in own)
        raise ValueError(
            f"endpoint.extra_body: {found} would change greedy decoding, by which all models are compared; with"
            " generation=model the server's own rules, and these, hold"
        )
    return replace(settings, extra_body=server_fields(settings) | settings.extra_body)
