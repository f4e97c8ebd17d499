"""vLLM servers: their settings, the checks of a server before it is used, and the reading of its answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.credentials import hide_credentials
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import UserError
from lightning_modules.rollouts.base import SamplingSettings
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)
from lightning_modules.serving.responses import reading

# A log-probability in a server's answer. For a token with probability near 1, rounding may give a value slightly above
# 0. vLLM sends -9999 for minus infinity; a sampled token never has it, so it need not be refused.
HIGHEST_LOG_PROB, LOWEST_LOG_PROB = 1e-3, -1e4


class PromptMismatch(UserError, ValueError):
    """The server has read other prompt tokens than the trainer."""


@dataclass(frozen=True)
class VLLMSettings:
    """The servers of the trained model; docs/rollout_engines.md describes how to start them.

    Args:
        servers: base URLs, such as http://localhost:8000/v1. Prompts are distributed over them.
        model: name of the model on the servers; null takes the only model that they serve.
        adapters: folder that the trainer writes and every server reads; null takes `adapters` in the phase's folder.
        timeout: seconds for all completions of one prompt.
        attempts: number of requests to one server before the prompt goes to another server, as in `EndpointSettings`.
        backoff: as in `EndpointSettings`.
        max_backoff: as in `EndpointSettings`.
        concurrency: number of prompts at the same time for each server, from each rank.
        patience: the run ends after this number of seconds without any server.
        pause: seconds between two health checks of a dead server.
        look: time limit in seconds of one health check, in which the server also loads the adapter.
        api_key_env: as in `EndpointSettings`.
        basic_auth_env: as in `EndpointSettings`.
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
    basic_auth_env: str | None = None

    def __post_init__(self) -> None:
        problems = Problems("rollout.vllm.")
        problems.positive(patience=self.patience, pause=self.pause, look=self.look)
        shown = [hide_credentials(url) for url in self.servers]
        one_of_each = bool(self.servers) and len(set(self.servers)) == len(self.servers)
        problems.require(one_of_each, "must name at least one server, and none twice", servers=shown)
        try:
            self.endpoints()
        except ValueError as error:
            problems.append(f"rollout.vllm: {error}")
        problems.raise_all("rollout.vllm")

    def endpoints(self) -> list[EndpointSettings]:
        patience = {name: getattr(self, name) for name in ("timeout", "attempts", "backoff", "max_backoff")}
        more = patience | {name: getattr(self, name) for name in ("concurrency", "api_key_env", "basic_auth_env")}
        return [EndpointSettings(self.model or "the one served", url.rstrip("/"), **more) for url in self.servers]


def find_model(url: str, served: dict[str, dict[str, Any]], wanted: str | None, needs: Mapping[str, int]) -> str:
    """The name of the model on the server: `wanted`, or the only model.

    `needs`: {user of the engine: largest number of tokens of a prompt with its completion}. Raises EndpointMisused if
    the model is not served, or if its sequences are too short.
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
    text: str, item: EncodedSample, sampling: SamplingSettings, ends: Collection[int], vocabulary: Collection[int]
) -> list[tuple[list[int], list[float]]]:
    """The token ids and log-probabilities of each of `group_size` completions, in order.

    Args:
        ends: token ids that end a completion.
        vocabulary: token ids that a policy can sample, as a `range`.

    Raises PromptMismatch if the server has read another prompt than that of `item`. Raises Malformed for any other
    invalid answer. This includes a completion that stops before its limit without one of the tokens `ends`, which
    happens if a server is shut down.
    """

    def fault(ids: list[int], log_probs: list[float]) -> str | None:
        """The problem of a completion; None if it is valid."""
        if type(ids) is not list or not ids or len(ids) != len(log_probs):
            return f"token ids {ids!r:.60} with {len(log_probs)} log-probabilities"
        if wrong := [token for token in ids if type(token) is not int or token not in vocabulary]:
            return f"token ids that the model does not have: {wrong[:5]!r:.100}"
        if wrong := [value for value in log_probs if not _is_log_prob(value)]:
            return f"log-probabilities {wrong[:5]!r:.100}"
        longest = sampling.max_new_tokens
        if len(ids) > longest or (ids[-1] not in ends and len(ids) < longest):
            return f"a completion of {len(ids)} tokens, at most {longest} of them, with the end {ids[-1]}"
        return None

    with reading(text, "a completion with token ids and log-probabilities") as answer:
        prompt, choices = answer["prompt_token_ids"], answer["choices"]
        if type(prompt) is not list or not all(type(token) is int for token in prompt):
            raise TypeError(f"prompt_token_ids={prompt!r:.60} is no list of integers")
        indices = [choice["index"] for choice in choices]
        if not all(type(index) is int for index in indices) or sorted(indices) != list(range(sampling.group_size)):
            raise ValueError(f"{sampling.group_size} completions were asked for, and these came: {indices!r:.100}")
        found = [
            (choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]
        if faults := [wrong for completion in found if (wrong := fault(*completion))]:
            raise ValueError("; ".join(faults))
    _require_same_prompt(item, prompt)
    return found


def _is_log_prob(value: Any) -> bool:
    return type(value) in (int, float) and LOWEST_LOG_PROB <= value <= HIGHEST_LOG_PROB


def _require_same_prompt(item: EncodedSample, read: list[int]) -> None:
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
    """{name: entry} of a server's list of models. Raises Malformed for anything else."""
    with reading(text, "a list of models") as record:
        entries = {entry["id"]: entry for entry in record["data"]}
        for name, entry in entries.items():
            longest = entry.get("max_model_len")
            if type(name) is not str or not (longest is None or (type(longest) is int and longest > 0)):
                raise TypeError(f"id={name!r:.60}, max_model_len={longest!r:.60}")
    return entries


async def require_lora(endpoint: ChatEndpoint) -> None:
    """Request an adapter that does not exist. A server with LoRA support reports that the adapter is missing."""
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
    """Raise `error` if the server is dead. A healthy server also sends 500 if it cannot load an adapter."""
    if error.status != 500:
        raise error
    await endpoint.get(endpoint.settings.base_url.removesuffix("/v1") + "/health")  # status 503 if its engine is dead


async def require_processed_log_probs(endpoint: ChatEndpoint, model: str, token: int) -> None:
    """Check that log-probabilities refer to the sampling distribution: if only one token is allowed, its
    log-probability must be 0. A server with raw log-probabilities gives another value.
    """
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
    with reading(text, "a token with its log-probability") as record:
        found = record["choices"][0]["logprobs"]["content"][0]["logprob"]
        if not _is_log_prob(found):
            raise ValueError(f"a log-probability of {found!r:.60}")
    return found
