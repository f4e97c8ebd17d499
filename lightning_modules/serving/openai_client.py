"""The client of an OpenAI-compatible server: sends a request, and repeats it after a temporary failure.

This is the only file that imports `openai`. The retries of that library are switched off: here they are counted, and
each attempt has one time limit.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from datamodules.persistence.credentials import find_credential, hide_credentials
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import UserError
from lightning_modules.serving.responses import Completion, Malformed, bound_body, read_completion, read_stream

A = TypeVar("A")
T = TypeVar("T")

# HTTP status codes.
RETRIED = (408, 409, 425, 429)  # temporary, like every 5xx
REFUSED = (400, 413, 422)  # this request cannot be answered: it is too long, or the server does not accept its image


class RequestRefused(UserError, ValueError):
    """The server cannot answer this request; further attempts would not help."""


class EndpointMisused(UserError, ValueError):
    """The key, the model or the path is wrong, so no request can succeed."""


class EndpointUnavailable(UserError, RuntimeError):
    """All attempts have failed. `status` is the HTTP status of the last one, or None if there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible server, with timeouts and retries.

    Settings are written to files. So secrets must be in environment variables, and a URL or a field with a secret is
    refused.

    Args:
        model: name of the model on the server; may be "" if the command has this name in another setting.
        base_url: such as http://localhost:8000/v1; None if the command starts a local server itself.
        api_key_env: the environment variable that holds the key, if the server needs one.
        basic_auth_env: the environment variable that holds user:password, for a server behind HTTP Basic
            authentication. Then no key is sent.
        timeout: seconds for one request.
        attempts: number of attempts for a request.
        backoff: the wait in seconds before the second attempt; it doubles with each further attempt. Every wait is
            multiplied by a random factor from 0.5 to 1. A longer wait that the server requests (Retry-After) is
            respected.
        max_backoff: the longest wait in seconds.
        concurrency: number of requests at the same time.
        extra_body: further fields of every request.
        sampling_fields: the sampling parameters that every request sets, so that no default of the server applies.
            "vllm": all of them (vLLM, SGLang). "openai": those of OpenAI's API, for a server that refuses the others.
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
        problems, url = Problems(), self.base_url
        problems.at_least(1, attempts=self.attempts, concurrency=self.concurrency)
        problems.at_least(0, backoff=self.backoff, max_backoff=self.max_backoff)
        problems.one_of(("vllm", "openai"), sampling_fields=self.sampling_fields)
        problems.positive(timeout=self.timeout)
        if url is not None and not _is_address(url):
            rule = "must begin with http:// or https://, and have a host and no wrong port"
            problems.require(False, rule, base_url=hide_credentials(url))
        # Settings that hold a secret, in words that do not repeat it.
        if url is not None and (kind := find_credential(url)):
            problems.append(f"base_url holds {kind}: put it into the variable of basic_auth_env or api_key_env")
        if kind := find_credential(json.dumps(self.extra_body, default=str)):
            problems.append(f"extra_body holds {kind}: put the key into the variable of api_key_env")
        for name, value in (("api_key_env", self.api_key_env), ("basic_auth_env", self.basic_auth_env)):
            if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
                rule = "must be the name of an environment variable (letters, digits, _), not the secret"
                problems.append(f"{name} {rule}")
        problems.raise_all("endpoint")


class ChatEndpoint:
    """A connection to a server: `async with ChatEndpoint(settings) as endpoint: await endpoint.complete(…)`.

    It must be used in one event loop only. `faults` counts the failed attempts by HTTP status, or as "timeout",
    "connection" or "malformed".

    Args:
        settings: address, model, time-outs, attempts.
        was_reached: whether an earlier connection has reached the server. A server that was never reached is not waited
            for, because its address is probably wrong.
    """

    def __init__(self, settings: EndpointSettings, was_reached: bool = False) -> None:
        import openai

        if settings.base_url is None or not settings.model:
            raise ValueError(f"an endpoint needs base_url={settings.base_url!r} and model={settings.model!r}")
        self.settings = settings
        self.faults: Counter[str] = Counter()
        self.was_reached = was_reached
        self._errors = openai
        self._random = random.Random()  # only for the lengths of waits, so it needs no seed
        # Credentials, from environment variables. `_secrets` lists all their forms, so that messages can hide them.
        self._key = os.environ.get(settings.api_key_env) or ""
        user = os.environ.get(settings.basic_auth_env or "") or ""
        if settings.basic_auth_env and not user:
            raise EndpointMisused(f"basic_auth_env={settings.basic_auth_env!r}: no such environment variable, or empty")
        if not user and not (self._key.isascii() and self._key.isprintable()):  # no HTTP header can hold it
            found = f"api_key_env={settings.api_key_env!r}: the key in this variable holds a character that no key has"
            raise EndpointMisused(f"{found}, such as a line break at its end")
        basic = base64.b64encode(user.encode()).decode()
        self._secrets = [self._key, user, basic, user.partition(":")[2]]
        headers = {"Accept-Encoding": "identity"}  # the size of a compressed body could not be bounded
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
        show: Callable[[str], None] | None = None,
    ) -> Completion:
        """The server's answer to a chat.

        Args:
            messages: messages in OpenAI's format.
            max_tokens: length of the longest answer, in tokens.
            temperature: None uses the server's default.
            seed: seed of the sampling; None sends no seed.
            attempts: number of attempts, at most the number in the settings; None takes the number in the settings.
            show: the server is asked to stream; `show` gets the text so far, again and again. A further attempt begins
                with an empty text.

        Raises:
            RequestRefused: the server cannot answer this request.
            EndpointMisused: the key, the model or the path is wrong.
            EndpointUnavailable: all attempts have failed.
        """
        ask = partial(self._ask, messages, max_tokens, temperature, seed, show)
        return await self._persist(ask, read_completion if show is None else lambda found: found, attempts)

    async def post(self, path: str, body: dict[str, Any], read: Callable[[str], T] = str) -> T:
        """Send JSON to the server and read its response.

        Args:
            path: path below base_url.
            body: the JSON to send.
            read: converts the text of the response to the result; raises Malformed for an invalid text.

        The errors are those of `complete`.
        """
        return await self._persist(lambda: self._client.post(path, cast_to=str, body=body), read)

    async def get(self, path: str, read: Callable[[str], T] = str) -> T:
        """Like `post`, but with an HTTP GET request."""
        return await self._persist(lambda: self._client.get(path, cast_to=str), read)

    async def _persist(self, ask: Callable[[], Awaitable[A]], read: Callable[[A], T], attempts: int | None = None) -> T:
        """`read` the answer to `ask`. Repeat until this succeeds, fails permanently, or all attempts have failed."""
        settings = self.settings
        attempts = min(attempts or settings.attempts, settings.attempts)
        for attempt in range(1, attempts + 1):
            status = None
            try:
                async with asyncio.timeout(settings.timeout):
                    answer = read(await ask())
                self.was_reached = True
                return answer
            # The server has answered with an error, either permanent or temporary.
            except self._errors.APIStatusError as error:
                self.was_reached = True
                status, fault = error.status_code, self._hide(f"{error.status_code} {error.message[:300]}")
                if status in REFUSED:
                    raise RequestRefused(fault) from error
                if status not in RETRIED and status < 500:
                    where = f"base_url={settings.base_url!r}, model={settings.model!r}"
                    raise EndpointMisused(f"{where}: {fault}") from error
                kind, wait = str(status), _retry_after(error.response.headers.get("retry-after"))
            # No usable answer. All these failures may be temporary.
            except (TimeoutError, self._errors.APITimeoutError):
                kind, fault, wait = "timeout", f"no answer within {settings.timeout} s", 0.0
            except self._errors.APIConnectionError as error:
                # `openai` reports every error during the transfer as a connection error, even for a body that is too
                # large.
                if not self.was_reached and _is_refusal(error):
                    # A server that was reachable may return. This server was never reachable, so waiting is useless.
                    self.faults["connection"] += 1
                    raise EndpointUnavailable(
                        f"no server listens at {settings.base_url}: the connection was refused. Start the server, or "
                        "correct base_url"
                    ) from error
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
        self,
        messages: list[dict[str, Any]],
        max_tokens: int,
        temperature: float | None,
        seed: int | None,
        show: Callable[[str], None] | None,
    ) -> bytes | Completion:
        """Send one chat request; returns the body of the response, or with `show` the streamed answer."""
        stated = {"temperature": temperature, "seed": seed}
        request = {
            "model": self.settings.model,
            "messages": messages,
            "max_completion_tokens": max_tokens,
            "extra_body": self.settings.extra_body | {name: v for name, v in stated.items() if v is not None},
        }
        chat = self._client.chat.completions
        if show is not None:
            async with chat.with_streaming_response.create(**request, stream=True) as response:
                return await read_stream(self._lines(response), show)
        # The raw body is read here: `openai` would return a truncated body as a string or an answer without choices.
        return (await chat.with_raw_response.create(**request)).http_response.content

    async def _lines(self, response: Any) -> AsyncIterator[str]:
        """The lines of a streamed body. `openai` does not convert the errors that reading them raises."""
        try:
            async for line in response.iter_lines():
                yield line
        except Exception as error:
            raise self._errors.APIConnectionError(request=response.http_request) from error

    def _hide(self, text: str) -> str:
        """`text` without secrets: a server may repeat the key, and messages are written to logs and journals."""
        return hide_credentials(text, self._secrets)

    def _delay(self, attempt: int, wait: float) -> float:
        """Seconds before the next attempt; `wait` is the time that the server requests.

        The random factor distributes the clients in time.
        """
        longest = min(self.settings.max_backoff, self.settings.backoff * 2 ** (attempt - 1))
        return max(longest * self._random.uniform(0.5, 1.0), min(wait, self.settings.max_backoff))


def _is_address(url: str) -> bool:
    """Whether the HTTP library can read the address of a server."""
    try:
        parts = urlsplit(url)
        return url.startswith(("http://", "https://")) and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number as port, or an open bracket
        return False


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a refused connection is among the causes of `error`."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError) or "Connection refused" in str(error):
            return True
        # the members of an ExceptionGroup: one attempt for each address of the host
        causes = getattr(error, "exceptions", ())
        if any(_is_refusal(each) for each in causes):
            return True
        error = error.__cause__ or error.__context__
    return False


def _retry_after(header: str | None) -> float:
    """The seconds in a Retry-After header; 0 without the header, or if it is a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
