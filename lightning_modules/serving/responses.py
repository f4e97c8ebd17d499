"""Read the responses of a model server strictly: a broken response must neither end a run nor be used as a value.

If a body does not have the expected form, `Malformed` is raised; the client counts it and repeats the request. A body
that is larger than LARGEST_BODY is cut off.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datamodules.persistence.strict_json import refuse_constant

# Bytes of one response. The largest real response has 40 MB: 32 completions of 8,192 tokens, with a log-probability for
# each token at about 150 bytes of JSON.
LARGEST_BODY = 2**26


class Malformed(ValueError):
    """A successful response whose body has a wrong form, such as a truncated body. The request is repeated."""


@dataclass(frozen=True)
class Completion:
    """One answer of a server."""

    text: str  # with the thinking inside its tags
    finish_reason: str
    prompt_tokens: int  # counted by the server; 0 if it sends no count
    completion_tokens: int


@contextmanager
def reading(body: bytes | str, wanted: str) -> Iterator[Any]:
    """A context in which the fields of a JSON response are read. `wanted` names the content, for the message.

    Raises:
        Malformed: the body is not JSON, or a field that is read is missing or has a wrong type or value.
    """
    try:
        yield json.loads(body, parse_constant=refuse_constant)
    # Errors of JSON: ValueError (also for bad UTF-8 and NaN), and RecursionError for nesting beyond Python's limit.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"not {wanted} ({error!r:.600}): {body[:200]!r}") from error


def read_completion(body: bytes) -> Completion:
    """Read a chat completion.

    Some servers move the thinking into a separate field (`reasoning_content` or `reasoning`). It is put back in front
    of the answer, in its tags.

    Raises:
        Malformed: the body is not a chat completion.
    """
    with reading(body, "a chat completion") as record:
        choice = record["choices"][0]
        message = choice["message"]
        content, usage = message.get("content") or "", record.get("usage") or {}
        thinking = message.get("reasoning_content") or message.get("reasoning")
        counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        if choice.get("finish_reason") in ("abort", "error"):
            raise ValueError(f"finish_reason={choice['finish_reason']!r}")  # from a vLLM server that is shutting down
        if not isinstance(content, str) or not isinstance(thinking, str | None):
            raise TypeError(f"content is a {type(content).__name__}, thinking a {type(thinking).__name__}")
    return Completion(_whole(thinking, content), str(choice.get("finish_reason"))[:40], *counts)


async def read_stream(lines: AsyncIterator[str], show: Callable[[str], None]) -> Completion:
    """Read a streamed chat completion; `show` gets the text so far, again and again.

    A server that cannot stream sends a whole chat completion, which is read as such.

    Args:
        lines: the lines of the body: "data: " and the JSON of a part, or other lines of server-sent events.

    Raises:
        Malformed: the body is neither, or it ends before the answer ends.
    """
    parts, whole, reason = {"content": "", "thinking": ""}, [], None
    async for line in lines:
        name, _, data = line.partition(":")
        if name != "data":
            whole.append(line)
            continue
        if data.strip() == "[DONE]":
            break
        with reading(data, "a part of a streamed chat completion") as record:
            for choice in record["choices"][:1]:  # a part about the usage has none
                delta = choice.get("delta") or {}
                parts["content"] += delta.get("content") or ""
                parts["thinking"] += delta.get("reasoning_content") or delta.get("reasoning") or ""
                reason = choice.get("finish_reason") or reason
            if reason in ("abort", "error"):
                raise ValueError(f"finish_reason={reason!r}")
        show(_joined(parts))
    if not any(parts.values()) and reason is None:
        return read_completion("\n".join(whole).encode())
    if reason is None:
        raise Malformed("a streamed chat completion that ends without a finish_reason")
    return Completion(_whole(parts["thinking"] or None, parts["content"]), str(reason)[:40], 0, 0)


def _whole(thinking: str | None, content: str) -> str:
    """The text of a whole answer: thinking in its tags, also if the answer was cut inside it, and the content."""
    return _writable(content if thinking is None else f"<think>{thinking}</think>{content}")


def _joined(parts: Mapping[str, str]) -> str:
    """The text of an answer so far: thinking in its tags, as far as it is there, and the content."""
    thinking, content = parts["thinking"], parts["content"]
    text = f"<think>{thinking}" + ("</think>" if content else "") if thinking else ""
    return _writable(text + content)


def _writable(text: str) -> str:
    """The text without lone surrogates: JSON may contain them, and they cannot be written to a file."""
    return text.encode(errors="replace").decode()


def _count(value: Any) -> int:
    """A number of tokens; 0 if the server sends none. Raises ValueError for anything else."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"a count of tokens of {value!r:.40}")
    return value


async def bound_body(response: Any) -> None:
    """A response hook of the HTTP client: reading the body raises Malformed after LARGEST_BODY bytes."""
    # A compressed body could be small here and huge after decompression.
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Malformed(f"a body in {encoding!r:.40}, where a plain one was asked for")
    stream = response.stream
    # The stream must be of the HTTP library's own class. That library is httpx or httpx2, depending on `openai`.
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
