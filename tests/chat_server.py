"""A chat-completion server that knows its lines, and a proxy that loses them: for tests of clients."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

FAULTS = ("429", "500", "hang", "truncated", "reset")


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one HTTP/1.1 request."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    return head, await reader.readexactly(int(lengths[0]))


def http_response(status: int, body: bytes, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status} Some reason\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{headers}Connection: close\r\n\r\n".encode() + body


def completion(text: str, **message: Any) -> bytes:
    """The body of a chat completion of `text`."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text} | message}
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def streamed(*texts: str | threading.Event) -> list[bytes | threading.Event]:
    """A streamed chat completion, for a reply of `ChatServer`. It goes on behind an event when the event is set."""
    parts: list[bytes | threading.Event] = [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"]
    for text in texts:
        if isinstance(text, threading.Event):
            parts.append(text)
        else:
            parts.append(stream_part({"content": text}))
    return [*parts, stream_part({}, "stop"), b"data: [DONE]\n\n"]


def stream_part(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """One part of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "1", "choices": [choice]}).encode() + b"\n\n"


def question_text(request: dict[str, Any]) -> str:
    """All text of the user's turn."""
    return "".join(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")


class _Server:
    """An asyncio server in a thread of its own; `with` starts and ends it. `heads` holds the head of each request."""

    wanted_port = 0  # any free one

    def __enter__(self) -> Any:
        self.heads: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.wanted_port), self._loop
        )
        self._server = started.result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _stop(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that goes away, killed or out of patience, is what these tests are about.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head, body = await read_request(reader)
            self.heads.append(head)
            await self.answer(body, reader, writer)
        writer.close()
        with suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    async def answer(self, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class ChatServer(_Server):
    """Answers with `reply(request)`: a text, the bytes of a whole HTTP response, its parts (`streamed`), or None for no
    answer at all.

    It keeps the requests, and counts in `asked` those that were received, by question and seed.
    """

    def __init__(
        self, reply: Callable[[dict[str, Any]], str | bytes | list[bytes | threading.Event] | None], delay: float = 0.0
    ) -> None:
        self.reply, self.delay = reply, delay
        self.requests: list[dict[str, Any]] = []
        self.asked: Counter[tuple[str, int | None]] = Counter()

    async def answer(self, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(body)
        self.requests.append(request)
        self.asked[question_text(request), request.get("seed")] += 1
        await asyncio.sleep(self.delay)
        reply = self.reply(request)
        if reply is None:
            await reader.read()  # until the client gives up
            return
        if isinstance(reply, list):
            for part in reply:
                if isinstance(part, threading.Event):
                    assert await asyncio.to_thread(part.wait, 120)
                else:
                    writer.write(part)
                    await writer.drain()
            return
        writer.write(reply if isinstance(reply, bytes) else http_response(200, completion(reply)))
        await writer.drain()


class FaultProxy(_Server):
    """Passes requests on to `upstream`, but spoils a `share` of them, each in one of FAULTS; `faults` counts them."""

    def __init__(self, upstream: int, share: float, seed: int = 0) -> None:
        self.upstream, self.share = upstream, share
        self.faults: Counter[str] = Counter()
        self.passed = 0
        self.random = random.Random(seed)

    async def answer(self, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
        if fault is None:
            self.passed += 1
        else:
            self.faults[fault] += 1
        if fault == "hang":
            await reader.read()  # until the client gives up
        elif fault == "reset":
            writer.transport.abort()
        elif fault in ("429", "500"):
            writer.write(http_response(int(fault), b'{"error": {"message": "not now"}}'))
        else:
            whole = await self._forward(body)
            _, _, content = whole.partition(b"\r\n\r\n")
            writer.write(http_response(200, content[: len(content) // 2]) if fault else whole)
        if fault != "reset":
            await writer.drain()

    async def _forward(self, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: upstream\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        whole = await reader.read()
        writer.close()
        await writer.wait_closed()
        return whole
