"""Responses of a server of models, read strictly: no garbage may end a run or pass as a value.

A body of another form than the request needs is `Malformed`; the client counts it and asks again. A body without an end
is cut off at LARGEST_BODY.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from datamodules.persistence.strict_json import refuse_constant

# Bytes of one response. The largest real one, 32 completions of 8,192 tokens with a log-probability each at about 150
# bytes of JSON, has 40 MB.
LARGEST_BODY = 2**26


class Malformed(ValueError):
    """A success whose body has another form than the request needs, such as a body that was cut short: asked again."""


@dataclass(frozen=True)
class Completion:
    """One answer. Token counts are the server's; 0 where it sends none."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def read_json(body: bytes | str, wanted: str) -> Any:
    """The JSON of a response that should be `wanted`. Raises Malformed for other text: NaN, nesting beyond Python's
    limit, bad UTF-8."""
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not {wanted}: no JSON ({error!r:.100}): {body[:200]!r}") from error


def read_completion(body: bytes) -> Completion:
    """A server's chat completion. Raises Malformed where it is none, such as a body that was cut short.

    Servers that part thinking from answer (`reasoning_content`, or `reasoning`) have it put back between its tags.
    """
    record = read_json(body, "a chat completion")
    try:
        choice = record["choices"][0]
        message = choice["message"]
        content, usage = message.get("content") or "", record.get("usage") or {}
        thinking = message.get("reasoning_content") or message.get("reasoning")
        counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        if choice.get("finish_reason") in ("abort", "error"):
            raise ValueError(f"finish_reason={choice['finish_reason']!r}")  # vLLM's, of a server that is shut down
        if not isinstance(content, str) or not isinstance(thinking, str | None):
            raise TypeError(f"content is a {type(content).__name__}, thinking a {type(thinking).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Malformed(f"not a chat completion ({error!r:.200}): {body[:200]!r}") from error
    text = content if thinking is None else f"<think>{thinking}</think>{content}"
    text = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which no file takes
    return Completion(text, str(choice.get("finish_reason"))[:40], *counts)


def _count(value: Any) -> int:
    """A number of tokens; 0 where the server sends none."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"a count of tokens of {value!r:.40}")
    return value


async def bound_body(response: Any) -> None:
    """A hook of the HTTP client: cuts the response's body off at LARGEST_BODY bytes, with Malformed."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Malformed(f"a body in {encoding!r:.40}, where a plain one was asked for")
    stream = response.stream
    # The client takes a stream of its own library's class only: httpx or httpx2, by the version of `openai`.
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "AsyncByteStream")

    class Bounded(base):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > LARGEST_BODY:
                    raise Malformed(f"a body of more than {LARGEST_BODY} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()
