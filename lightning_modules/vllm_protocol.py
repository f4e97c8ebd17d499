"""What a vLLM server must be and what it answers: its settings here, the checks of a server, and the reading of its
answers."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.batches import PromptItem
from lightning_modules.endpoint import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    Malformed,
    RequestRefused,
)
from lightning_modules.rollouts import RolloutSettings


class PromptMismatch(ValueError):
    """The server read other prompt tokens than the trainer."""


@dataclass(frozen=True)
class VLLMSettings:
    """The servers that serve the model that is trained, each started as docs/rollout_engines.md says.

    servers: base URLs, such as http://localhost:8000/v1; prompts are spread over them. model: their name of it; null:
    the one they serve. adapters: folder that the trainer writes and every server reads; null: `adapters` in the phase's
    folder. timeout: seconds for all completions of one prompt. attempts, backoff, max_backoff: of one request at one
    server, as in `EndpointSettings`, before its prompt goes to another. concurrency: prompts under way at each server,
    from each rank. patience: seconds without any server until the run ends. pause: seconds between two looks at a dead
    server. look: seconds for one look. api_key_env: the environment variable with the key, if the servers want one.
    """

    servers: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)
    model: str | None = None
    adapters: str | None = None
    timeout: float = 600.0
    attempts: int = 2
    backoff: float = 1.0
    max_backoff: float = 10.0
    concurrency: int = 16
    patience: float = 900.0
    pause: float = 2.0
    look: float = 300.0
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.servers or len(set(self.servers)) < len(self.servers):
            raise ValueError(f"vllm: servers={self.servers} must name at least one server, and none twice")
        for name in ("patience", "pause", "look"):
            if not getattr(self, name) > 0:
                raise ValueError(f"vllm: {name}={getattr(self, name)} must be greater than 0")
        self.endpoints()

    def endpoints(self) -> list[EndpointSettings]:
        patience = {name: getattr(self, name) for name in ("timeout", "attempts", "backoff", "max_backoff")}
        more = patience | {"concurrency": self.concurrency, "api_key_env": self.api_key_env}
        return [EndpointSettings(self.model or "the one served", url.rstrip("/"), **more) for url in self.servers]


def find_model(url: str, served: dict[str, dict[str, Any]], wanted: str | None, needs: Mapping[str, int]) -> str:
    """The server's name of its model: `wanted`, or the only one.

    `needs`: {who asks: the most tokens of a prompt with its completion}. Raises EndpointMisused if the model is not
    served, or not in such sequences.
    """
    names = [name for name, entry in served.items() if not entry.get("parent")]
    name = wanted or (names[0] if len(names) == 1 else None)
    if name not in names:
        raise EndpointMisused(f"{url} serves {names}, not vllm.model={wanted!r}")
    longest = served[name].get("max_model_len")
    longer = {who: tokens for who, tokens in needs.items() if longest is not None and longest < tokens}
    if longer:
        found = ", ".join(f"{tokens} in {who}" for who, tokens in longer.items())
        raise EndpointMisused(
            f"{url}: max_model_len={longest} of {name!r} is less than the tokens that a prompt and its completion may "
            f"have: {found}; start it with --max-model-len {max(longer.values())}, or lower max_prompt_tokens or "
            "max_new_tokens there (in training: of data and of model)"
        )
    return name


def read_choices(
    text: str, item: PromptItem, settings: RolloutSettings, ends: Collection[int]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and their log-probabilities of each of `group_size` completions, in order.

    Raises PromptMismatch if the server read another prompt than `item`'s, and Malformed for what is no such answer:
    also where a completion stops before its limit without one of the tokens `ends`, as of a server that is shut down.
    """
    try:
        answer = json.loads(text)
        prompt = answer["prompt_token_ids"]
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = [
            (choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]) for choice in choices
        ]
        faults = [fault for ids, log_probs in found if (fault := _fault(ids, log_probs, settings.max_new_tokens, ends))]
    except (ValueError, KeyError, TypeError) as error:
        raise Malformed(f"no completion with token ids and log-probabilities ({error!r}): {text[:200]!r}") from error
    _require_same_prompt(item, prompt)
    if len(found) != settings.group_size:
        faults.append(f"{len(found)} completions instead of {settings.group_size}")
    if faults:
        raise Malformed("; ".join(faults))
    return found


def _fault(ids: list[int], log_probs: list[float], longest: int, ends: Collection[int]) -> str | None:
    """What is wrong with a completion."""
    if not ids or len(ids) != len(log_probs):
        return f"{len(ids)} token ids with {len(log_probs)} log-probabilities"
    if not all(type(token) is int for token in ids) or not all(math.isfinite(value) for value in log_probs):
        return f"token ids {ids[:5]} with log-probabilities {log_probs[:5]}"
    if len(ids) > longest or (ids[-1] not in ends and len(ids) < longest):
        return f"a completion of {len(ids)} tokens, at most {longest} of them, with the end {ids[-1]}"
    return None


def _require_same_prompt(item: PromptItem, read: list[int]) -> None:
    own = item.input_ids.tolist()
    if read == own:
        return
    place = next((k for k, (a, b) in enumerate(zip(own, read, strict=False)) if a != b), min(len(own), len(read)))
    raise PromptMismatch(
        f"sample {item.sample.id!r}: the server read {len(read)} prompt tokens, the trainer {len(own)}; they differ "
        f"from token {place} on: {read[place : place + 5]} there, {own[place : place + 5]} here. Does the server "
        "serve the trained model's own folder, with its chat template and image sizes?"
    )


def read_models(text: str) -> dict[str, dict[str, Any]]:
    try:
        return {entry["id"]: entry for entry in json.loads(text)["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Malformed(f"no list of models ({error!r}): {text[:200]!r}") from error


async def require_lora(endpoint: ChatEndpoint) -> None:
    """Ask for an adapter that does not exist: a server that could load one says that there is none."""
    try:
        await endpoint.post("/load_lora_adapter", {"lora_name": "a-check", "lora_path": "/no/such/adapter"})
        fault = "loads an adapter that does not exist"
    except (EndpointMisused, RequestRefused, EndpointUnavailable) as error:
        if "/no/such/adapter" in str(error):
            return
        if isinstance(error, EndpointUnavailable):
            await raise_if_down(endpoint, error)
        fault = str(error)
    raise EndpointMisused(
        f"{endpoint.settings.base_url} loads no adapters: {fault}. Start it with --enable-lora and "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    )


async def raise_if_down(endpoint: ChatEndpoint, error: EndpointUnavailable) -> None:
    """Raise `error` unless the server is well: 500 is also how it says that it cannot read or place an adapter."""
    if error.status != 500:
        raise error
    await endpoint.get(endpoint.settings.base_url.removesuffix("/v1") + "/health")  # 503 once its engine is dead


async def require_processed_log_probs(endpoint: ChatEndpoint, model: str, token: int) -> None:
    """Of a token that is the only one allowed the log-probability is 0, unless the server takes it before all that."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "?"}],
        "max_completion_tokens": 1,
        "allowed_token_ids": [token],
        "logprobs": True,
        "top_logprobs": 0,
    }
    found = await endpoint.post("/chat/completions", body, _read_first_log_prob)
    if abs(found) > 1e-3:
        raise EndpointMisused(
            f"{endpoint.settings.base_url} gives raw log-probabilities ({found:.3f} of a token without alternative); "
            "start it with --logprobs-mode processed_logprobs"
        )


def _read_first_log_prob(text: str) -> float:
    try:
        found = float(json.loads(text)["choices"][0]["logprobs"]["content"][0]["logprob"])
    except (ValueError, LookupError, TypeError) as error:
        raise Malformed(f"no token with its log-probability ({error!r}): {text[:200]!r}") from error
    if not math.isfinite(found):
        raise Malformed(f"a log-probability of {found}")
    return found
