"""By which rules answers are generated: greedily, and the same way for every model of a table.

A checkpoint's generation_config.json and a server's defaults may hold a repetition penalty or samplers: Qwen2.5-VL's
has a repetition penalty of 1.05, which vLLM also applies where a request says nothing. Under "greedy" every such field
is stated with its neutral value, and no predictor leaves one to the checkpoint or to the server; from a checkpoint's
settings only token ids are taken. "model" is the opposite: the model's or the server's own settings, as they are. Which
of the two, with all values, is a part of a result's identity.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from lightning_modules.serving.openai_client import ChatEndpoint, EndpointMisused, EndpointSettings, RequestRefused

if TYPE_CHECKING:
    from transformers import GenerationConfig

Generation = Literal["greedy", "model"]

# The fields by which transformers' `generate` changes logits, lengths or the search, neutral; those that are lists or
# objects (suppressed and forced tokens, bad words, biases, guidance, watermarks, …) are neutral by their absence.
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
TOKEN_IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")  # the model's own, kept beside the ends
# A server's fields, neutral. OpenAI's API has the first three; vLLM and SGLang have all of them, and top_k -1 is off.
OPENAI_FIELDS = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SERVER_FIELDS = OPENAI_FIELDS | {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
GREEDY_SERVER_FIELDS = {"temperature": 0.0} | SERVER_FIELDS

GREEDY_RULES = {"generation": "greedy", "banned": "image and video placeholders"} | NEUTRAL
MODEL_RULES = {"generation": "model", "banned": "image and video placeholders"}


def rules(generation: Generation) -> dict[str, Any]:
    """The rules that answers of a model in this process depend on beside its files, JSON-like."""
    return dict(GREEDY_RULES if generation == "greedy" else MODEL_RULES)


def note(generation: str | None) -> str:
    """The words that a table adds to a row: none for greedy decoding, which is the default.

    None as `generation` is a result of an earlier version, which did not record its decoding.
    """
    if generation == "greedy":
        return ""
    return ", the model's own generation settings" if generation == "model" else ", decoding unknown: evaluate again"


def configure(
    own: GenerationConfig, generation: Generation, max_new_tokens: int, ends: Collection[int], banned: Collection[int]
) -> GenerationConfig:
    """The configuration of transformers' `generate` for one model.

    transformers fills every field that is None from the model's own configuration. So under "greedy" the model must
    also be given the result as its `generation_config`.

    Args:
        own: the model's own configuration.
        generation: whether its rules hold, or those of greedy decoding.
        max_new_tokens: the longest answer.
        ends: token ids that end an answer.
        banned: token ids that are never written.
    """
    from transformers import GenerationConfig

    if generation == "greedy":
        kept = {name: value for name in TOKEN_IDS if (value := getattr(own, name, None)) is not None}
        made = GenerationConfig(**NEUTRAL, **kept)
    else:
        made = copy.deepcopy(own)
        banned = {*banned, *(made.suppress_tokens or ())}
    made.max_length, made.max_new_tokens = None, max_new_tokens
    made.eos_token_id, made.suppress_tokens = sorted(ends), sorted(banned) or None
    if made.pad_token_id is None:
        made.pad_token_id = made.eos_token_id[0]  # one question at a time: nothing is padded
    return made


@contextmanager
def own_seed(name: str) -> Iterator[None]:
    """Random numbers that follow from `name` alone: a model whose own settings sample gives the same answer again."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(crc32(name.encode()))
        yield


def server_rules(settings: EndpointSettings, generation: Generation) -> dict[str, Any]:
    """The rules that answers of a model behind a server depend on beside the server's own settings, JSON-like."""
    if generation == "model":
        return {"generation": "model"}
    return {"generation": "greedy", "temperature": 0.0} | server_fields(settings)


def server_fields(settings: EndpointSettings) -> dict[str, Any]:
    """The samplers that a request to this server states as neutral; temperature is not among them."""
    return dict(SERVER_FIELDS if settings.sampling_fields == "vllm" else OPENAI_FIELDS)


def stating(settings: EndpointSettings, generation: Generation) -> EndpointSettings:
    """The same server, whose requests all state the rules in `extra_body`; under "model" nothing is stated.

    Raises ValueError where extra_body has another rule than greedy decoding.
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


async def require_taken(
    settings: EndpointSettings, generation: Generation, messages: list[dict[str, Any]], max_tokens: int
) -> None:
    """Raise EndpointMisused if the server refuses a request only because of the stated samplers.

    The same request is sent without the samplers that OpenAI's API does not have. If the server takes it, they are the
    reason.

    Args:
        settings: a server that has refused `messages`.
        generation: under "model" no sampler is stated, so nothing is asked.
        messages: the request, in OpenAI's form.
        max_tokens: the longest answer.
    """
    if generation == "model" or settings.sampling_fields == "openai":
        return
    plain = replace(settings, sampling_fields="openai")
    with suppress(RequestRefused):
        async with ChatEndpoint(stating(plain, generation)) as endpoint:
            await endpoint.complete(messages, max_tokens, 0.0, attempts=1)
        fields = ", ".join(sorted(SERVER_FIELDS.keys() - OPENAI_FIELDS.keys()))
        raise EndpointMisused(
            f"base_url={settings.base_url!r}, model={settings.model!r}: refuses requests that state {fields}, and takes"
            " them without; set sampling_fields=openai of this endpoint, if the server has no such rules of its own"
        )
