"""The client of an OpenAI-compatible server: one request at a time, made again until its answer is there.

The only file that imports `openai`, whose own retries are off: here they are counted and bounded by one deadline each.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from datamodules.persistence.credentials import find_credential, hide_credentials
from lightning_modules.serving.responses import Completion, Malformed, bound_body, read_completion

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


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible server, and how patiently it is asked.

    Secrets stand in environment variables only: settings are written to files, so a URL or a field that holds a secret
    is refused.

    Args:
        model: the server's name of the model; "" only where a command has the name elsewhere.
        base_url: such as http://localhost:8000/v1; None only where a local server is still to be started.
        api_key_env: the environment variable that holds the key, if the server needs one.
        basic_auth_env: the environment variable that holds user:password, for a server behind HTTP Basic
            authentication. Then no key is sent.
        timeout: seconds for one whole request.
        attempts: how often a request is made before it is given up.
        backoff, max_backoff: before attempt k + 1 the client waits backoff * 2^(k - 1) seconds, at most max_backoff,
            times a random factor between 0.5 and 1; longer where the server says so (Retry-After).
        concurrency: number of requests under way at the same time.
        extra_body: further fields of every request.
        sampling_fields: which samplers a request states, so that none is left to the server. `vllm`: all of them (vLLM,
            SGLang). `openai`: those of OpenAI's API, for a server that refuses the others.
    """

    model: str = ""
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    basic_auth_env: str | None = None
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
            faults.append(f"base_url={hide_credentials(self.base_url)!r} must begin with http:// or https://")
        faults += _credential_faults(self)
        if faults:
            raise ValueError(f"endpoint: {'; '.join(faults)}")


def _credential_faults(settings: EndpointSettings) -> list[str]:
    """Secrets among the settings, in words that do not repeat them."""
    faults = []
    if settings.base_url is not None and (kind := find_credential(settings.base_url)):
        faults.append(f"base_url holds {kind}: put it into the variable of basic_auth_env or api_key_env")
    if kind := find_credential(json.dumps(settings.extra_body, default=str)):
        faults.append(f"extra_body holds {kind}: put the key into the variable of api_key_env")
    for name in ("api_key_env", "basic_auth_env"):
        value = getattr(settings, name)
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            faults.append(f"{name} must be the name of an environment variable (letters, digits, _), not the secret")
    return faults


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
        self._key = os.environ.get(settings.api_key_env) or ""
        user = os.environ.get(settings.basic_auth_env or "") or ""
        if settings.basic_auth_env and not user:
            raise EndpointMisused(f"basic_auth_env={settings.basic_auth_env!r}: no such environment variable, or empty")
        basic = base64.b64encode(user.encode()).decode()
        self._secrets = [self._key, user, basic, user.partition(":")[2]]
        headers = {"Accept-Encoding": "identity"}  # a compressed body would not show its size
        if user:
            headers["Authorization"] = f"Basic {basic}"
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=settings.timeout,
            default_headers=headers,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [bound_body]}),
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
        """The server's answer to a chat.

        Args:
            messages: in OpenAI's form.
            max_tokens: the longest answer.
            temperature: None leaves it to the server.
            seed: None states no seed.
            attempts: how often the request is made; None: as the settings say.

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
                status, fault = error.status_code, self._hide(f"{error.status_code} {error.message[:300]}")
                if status in REFUSED:
                    raise RequestRefused(fault) from error
                if status not in RETRIED and status < 500:
                    where = f"base_url={settings.base_url!r}, model={settings.model!r}"
                    raise EndpointMisused(f"{where}: {fault}") from error
                kind, wait = str(status), _retry_after(error.response.headers.get("retry-after"))
            except (TimeoutError, self._errors.APITimeoutError):
                kind, fault, wait = "timeout", f"no answer within {settings.timeout} s", 0.0
            except self._errors.APIConnectionError as error:
                # `openai` calls every error of a transfer a connection error, that of a body without an end, too.
                kind = "malformed" if isinstance(error.__cause__, Malformed) else "connection"
                fault, wait = self._hide(repr(error.__cause__ or error)), 0.0
            except Malformed as error:
                kind, fault, wait = "malformed", self._hide(str(error)), 0.0
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

    def _hide(self, text: str) -> str:
        """A server may repeat the key that it was sent; messages end up in logs and journals."""
        return hide_credentials(text, self._secrets)

    def _delay(self, attempt: int, wait: float) -> float:
        longest = min(self.settings.max_backoff, self.settings.backoff * 2 ** (attempt - 1))
        return max(longest * self._random.uniform(0.5, 1.0), min(wait, self.settings.max_backoff))


def _retry_after(header: str | None) -> float:
    """Seconds; 0 without the header, or where it is a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
