"""The client of an OpenAI-compatible server: one request at a time, made again until its answer is there.

The only file that imports `openai`, whose own retries are off: here they are counted and bounded by one deadline each.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

RETRIED = (408, 409, 425, 429)  # and every 5xx
REFUSED = (400, 413, 422)  # this one request cannot be answered: too long, or an image that the server does not take


class RequestRefused(ValueError):
    """The server will not answer this request however often it is asked."""


class EndpointMisused(ValueError):
    """The server does not know the key, the model or the path: no request can succeed."""


class EndpointUnavailable(RuntimeError):
    """No answer after every attempt. `status` is that of the last one, if the server gave any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Malformed(ValueError):
    """A success whose body is not what was asked for, such as one that was cut short: asked again."""


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible server, and how patiently it is asked.

    model: the server's name of it; "" only where a command has it elsewhere. base_url: such as
    http://localhost:8000/v1; None only where a local server is still to be started. api_key_env: the
    environment variable that holds the key, if it needs one. timeout: seconds for one whole request. attempts: how
    often a request is made before it is given up. Before attempt k + 1 it waits backoff * 2^(k - 1) seconds, at most
    max_backoff, times a random share of one half to one; longer where the server says so (Retry-After). concurrency:
    requests under way at once. extra_body: further fields of every request. sampling_fields: which samplers a request
    states, so that none is left to the server: `vllm` all (vLLM, SGLang), `openai` those that OpenAI's API has, for a
    server that refuses the others.
    """

    model: str = ""
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 300.0
    attempts: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    concurrency: int = 16
    extra_body: dict[str, Any] = field(default_factory=dict)
    sampling_fields: Literal["vllm", "openai"] = "vllm"

    def __post_init__(self) -> None:
        faults = []
        for name, least in (("attempts", 1), ("concurrency", 1), ("backoff", 0), ("max_backoff", 0)):
            if not getattr(self, name) >= least:
                faults.append(f"{name}={getattr(self, name)} must be at least {least}")
        if self.sampling_fields not in ("vllm", "openai"):
            faults.append(f"sampling_fields={self.sampling_fields!r} must be vllm or openai")
        if not self.timeout > 0:
            faults.append(f"timeout={self.timeout} must be greater than 0")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            faults.append(f"base_url={self.base_url!r} must begin with http:// or https://")
        if faults:
            raise ValueError(f"endpoint: {'; '.join(faults)}")


@dataclass(frozen=True)
class Completion:
    """One answer. Token counts are the server's; 0 where it sends none."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """`async with ChatEndpoint(settings) as endpoint: await endpoint.complete(messages, ...)`.

    It belongs to the event loop that it is used in. `faults` counts what was retried: by status, or as "timeout",
    "connection" or "malformed".
    """

    def __init__(self, settings: EndpointSettings) -> None:
        import openai

        if settings.base_url is None or not settings.model:
            raise ValueError(f"an endpoint needs base_url={settings.base_url!r} and model={settings.model!r}")
        self.settings = settings
        self.faults: Counter[str] = Counter()
        self._errors = openai
        self._random = random.Random()  # spreads waiting times; nothing that is kept depends on it
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.api_key_env) or "none",
            max_retries=0,
            timeout=settings.timeout,
        )

    async def __aenter__(self) -> ChatEndpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def complete(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int,
        temperature: float | None,
        seed: int | None = None,
        attempts: int | None = None,
    ) -> Completion:
        """The answer to `messages` (OpenAI's form), in at most `attempts`, or as many as the settings say.

        temperature None leaves it to the server.

        Raises RequestRefused, EndpointMisused, and after every attempt EndpointUnavailable.
        """
        return await self._persist(lambda: self._ask(messages, max_tokens, temperature, seed), attempts)

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[str], T] = str, attempts: int | None = None
    ) -> T:
        """What `read` makes of the answer to `body`, sent as JSON to a path below base_url.

        `read` raises Malformed for a text that is not what was asked for; other errors as of `complete`.
        """

        async def ask() -> T:
            return read(await self._client.post(path, cast_to=str, body=body))

        return await self._persist(ask, attempts)

    async def get(self, path: str, read: Callable[[str], T] = str, attempts: int | None = None) -> T:
        """As `post`, of what lies at the path."""

        async def ask() -> T:
            return read(await self._client.get(path, cast_to=str))

        return await self._persist(ask, attempts)

    async def _persist(self, ask: Callable[[], Awaitable[T]], attempts: int | None) -> T:
        settings = self.settings
        attempts = min(attempts or settings.attempts, settings.attempts)
        for attempt in range(1, attempts + 1):
            status = None
            try:
                async with asyncio.timeout(settings.timeout):
                    return await ask()
            except self._errors.APIStatusError as error:
                status, fault = error.status_code, f"{error.status_code} {error.message[:300]}"
                if status in REFUSED:
                    raise RequestRefused(fault) from error
                if status not in RETRIED and status < 500:
                    where = f"base_url={settings.base_url!r}, model={settings.model!r}"
                    raise EndpointMisused(f"{where}: {fault}") from error
                kind, wait = str(status), _retry_after(error.response.headers.get("retry-after"))
            except (TimeoutError, self._errors.APITimeoutError):
                kind, fault, wait = "timeout", f"no answer within {settings.timeout} s", 0.0
            except self._errors.APIConnectionError as error:
                kind, fault, wait = "connection", repr(error.__cause__ or error), 0.0
            except Malformed as error:
                kind, fault, wait = "malformed", str(error), 0.0
            self.faults[kind] += 1
            if attempt < attempts:
                await asyncio.sleep(self._delay(attempt, wait))
        message = f"{settings.base_url} gave no answer in {attempts} attempts; last: {fault}"
        raise EndpointUnavailable(message, status)

    async def _ask(
        self, messages: list[dict[str, Any]], max_tokens: int, temperature: float | None, seed: int | None
    ) -> Completion:
        stated = {"temperature": temperature, "seed": seed}
        # The raw body: the library reads a truncated one as a plain string, or as an answer without choices.
        response = await self._client.chat.completions.with_raw_response.create(
            model=self.settings.model,
            messages=messages,
            max_completion_tokens=max_tokens,
            extra_body=self.settings.extra_body | {name: value for name, value in stated.items() if value is not None},
        )
        return read_completion(response.http_response.content)

    def _delay(self, attempt: int, wait: float) -> float:
        longest = min(self.settings.max_backoff, self.settings.backoff * 2 ** (attempt - 1))
        return max(longest * self._random.uniform(0.5, 1.0), min(wait, self.settings.max_backoff))


def read_completion(body: bytes) -> Completion:
    """A server's chat completion. Raises ValueError where it is none, such as one that was cut short.

    Servers that part thinking from answer (`reasoning_content`, or `reasoning`) have it put back between its tags.
    """
    try:
        record = json.loads(body)
        choice = record["choices"][0]
        message = choice["message"]
        content, usage = message.get("content") or "", record.get("usage") or {}
        thinking = message.get("reasoning_content") or message.get("reasoning")
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if choice.get("finish_reason") in ("abort", "error"):
            raise ValueError(f"finish_reason={choice['finish_reason']!r}")  # vLLM's, of a server that is shut down
        if not isinstance(content, str) or not isinstance(thinking, str | None):
            raise TypeError(f"content is a {type(content).__name__}, thinking a {type(thinking).__name__}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise Malformed(f"not a chat completion ({error!r}): {body[:200]!r}") from error
    text = content if thinking is None else f"<think>{thinking}</think>{content}"
    text = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which no file takes
    return Completion(text, str(choice.get("finish_reason")), *counts)


def _retry_after(header: str | None) -> float:
    """Seconds; 0 without the header, or where it is a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
