"""The client: what it sends, what it retries, what it gives up, and what it reads."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import time

import pytest

from lightning_modules.serving import responses
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)
from lightning_modules.serving.responses import Completion, read_completion
from tests.chat_server import FAULTS, ChatServer, FaultProxy, completion, http_response

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]


def settings(base_url: str, **more) -> EndpointSettings:
    quick = {"timeout": 5.0, "attempts": 3, "backoff": 0.01, "max_backoff": 0.02}
    return EndpointSettings("teacher", base_url, **quick | more)


def ask(settings: EndpointSettings, times: int = 1) -> tuple[list[Completion], dict[str, int]]:
    async def run():
        async with ChatEndpoint(settings) as endpoint:
            asked = (endpoint.complete(MESSAGES, max_tokens=7, temperature=0.5, seed=k) for k in range(times))
            return await asyncio.gather(*asked), dict(endpoint.faults)

    return asyncio.run(run())


def test_a_request_holds_what_was_asked_and_the_answer_is_read() -> None:
    with ChatServer(lambda request: "there") as server:
        answers, faults = ask(settings(server.base_url, extra_body={"top_k": 5}))
    assert answers == [Completion("there", "stop", 10, 4)] and faults == {}
    (request,) = server.requests
    assert request["messages"] == MESSAGES and request["model"] == "teacher"
    assert (request["temperature"], request["max_completion_tokens"], request["seed"], request["top_k"]) == (
        0.5,
        7,
        0,
        5,
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried_and_counted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(lambda request: "there") as server, FaultProxy(server.port, share=1.0) as proxy:
        monkeypatch.setattr(proxy.random, "choice", lambda faults: fault)
        # The first request is spoiled, the second passes.
        shares = iter((0.0, 1.0))
        monkeypatch.setattr(proxy.random, "random", lambda: next(shares))
        answers, faults = ask(settings(proxy.base_url, timeout=2.0 if fault == "hang" else 30.0))
    assert [answer.text for answer in answers] == ["there"]
    assert proxy.faults == {fault: 1} and proxy.passed == 1
    kind = {"hang": "timeout", "truncated": "malformed", "reset": "connection"}.get(fault, fault)
    assert faults == {kind: 1}


@pytest.mark.parametrize("status", [429, 503])
def test_a_request_is_given_up_after_its_attempts(status: int) -> None:
    with ChatServer(lambda request: http_response(status, b"{}")) as server:
        with pytest.raises(EndpointUnavailable, match=f"3 attempts; last: {status}"):
            ask(settings(server.base_url))
        assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_given_up_at_once() -> None:
    with ChatServer(lambda request: "there") as server:
        base_url = server.base_url
    with pytest.raises(EndpointUnavailable, match=f"no server listens at {base_url}.*correct base_url"):
        ask(settings(base_url, backoff=60.0, max_backoff=60.0))


@pytest.mark.parametrize(("status", "error"), [(400, RequestRefused), (422, RequestRefused), (401, EndpointMisused)])
def test_what_cannot_succeed_is_not_asked_again(status: int, error: type[Exception]) -> None:
    with ChatServer(lambda request: http_response(status, b'{"error": {"message": "too long"}}')) as server:
        with pytest.raises(error, match=f"{status}.*too long") as caught:
            ask(settings(server.base_url))
        assert type(caught.value) is error
        assert len(server.requests) == 1


def test_retry_after_lengthens_the_wait_up_to_the_limit() -> None:
    replies = iter((http_response(429, b"{}", "Retry-After: 30\r\n"), "there"))
    with ChatServer(lambda request: next(replies)) as server:
        began = time.monotonic()
        answers, _ = ask(settings(server.base_url, max_backoff=0.6))
        waited = time.monotonic() - began
    assert answers[0].text == "there"
    assert waited >= 0.6


def test_waiting_grows_and_is_spread() -> None:
    endpoint = ChatEndpoint(settings("http://localhost/v1", backoff=1.0, max_backoff=5.0))
    for attempt, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (9, 5.0)):
        delays = {endpoint._delay(attempt, 0.0) for _ in range(50)}
        assert len(delays) > 10
        assert longest / 2 <= min(delays) and max(delays) <= longest


def test_thinking_that_a_server_parts_from_the_answer_is_put_back() -> None:
    body = completion("<answer>a</answer>", reasoning_content="why")
    assert read_completion(body).text == "<think>why</think><answer>a</answer>"
    assert read_completion(completion("b", reasoning="why")).text == "<think>why</think>b"
    assert read_completion(completion("c", reasoning_content=None)).text == "c"


def test_half_a_surrogate_pair_is_no_text() -> None:
    """JSON may hold one, such as of an emoji that was cut; a journal cannot."""
    assert read_completion(completion("so \ud83d")).text == "so ?"


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"text"', b"{}", b'{"choices": []}', b'{"choices": [{}]}', completion("x")[:-9],
     json.dumps({"choices": [{"message": {"content": ["x"]}}]}).encode(),
     completion("x").replace(b'"stop"', b'"abort"'), completion("x").replace(b": 10,", b": Infinity,"),
     b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", completion("x").replace(b": 10,", b": -1,"),
     completion("x").replace(b": 10,", b": true,"), completion("x").replace(b": 10,", b": " + b"9" * 5000 + b",")],
)  # fmt: skip
def test_a_body_that_is_no_completion_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        read_completion(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 0),
        ("attempts", 0),
        ("concurrency", 0),
        ("backoff", -1),
        ("max_backoff", -1),
        ("base_url", "localhost"),
        ("base_url", "http://localhost:80a0/v1"),
        ("base_url", "http://localhost:99999/v1"),
        ("base_url", "http://[::1/v1"),
        ("base_url", "http:///v1"),
    ],
)
def test_wrong_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        EndpointSettings(**{"model": "m", "base_url": "http://localhost/v1", field: value})


async def endless(writer, head: bytes) -> None:
    """A response that never ends, as far as the client lets it."""
    writer.write(head)
    while True:
        writer.write(b" " * 2**16)
        await writer.drain()


class EndlessServer(ChatServer):
    async def answer(self, body: bytes, reader, writer) -> None:
        self.requests.append(json.loads(body))
        await endless(writer, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")


def test_a_body_without_an_end_is_cut_off_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "LARGEST_BODY", 2**20)
    with EndlessServer(lambda request: "") as server:
        with pytest.raises(EndpointUnavailable, match=r"3 attempts; last: .*a body of more than 1048576 bytes"):
            ask(settings(server.base_url, timeout=60.0))
        assert len(server.requests) == 3


def test_a_compressed_body_that_was_not_asked_for_is_refused() -> None:
    """A few kilobytes may unpack to gigabytes."""
    squeezed = gzip.compress(completion("there"))
    answer = http_response(200, squeezed, "Content-Encoding: gzip\r\n")
    with ChatServer(lambda request: answer) as server, pytest.raises(EndpointUnavailable, match="gzip"):
        ask(settings(server.base_url))


# Secrets


@pytest.mark.parametrize(
    "field",
    [
        {"base_url": "http://user:PASSW0RD@host/v1"},
        {"base_url": "https://PASSW0RD@host/v1"},
        {"base_url": "http://host/v1?api_key=PASSW0RD"},
        {"extra_body": {"api_key": "PASSW0RD"}},
        {"extra_body": {"headers": {"Authorization": "Bearer PASSW0RD"}}},
        {"api_key_env": "sk-PASSW0RD-0123456789"},
        {"basic_auth_env": "user:PASSW0RD"},
    ],
)
def test_a_secret_among_the_settings_is_refused_and_not_repeated(field: dict) -> None:
    with pytest.raises(ValueError) as caught:
        EndpointSettings(**{"model": "m", "base_url": "http://localhost/v1"} | field)
    shown = str(caught.value)
    assert next(iter(field)) in shown
    assert "PASSW0RD" not in shown


def test_a_key_that_the_server_repeats_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "plain-secret")
    echo = b'{"error": {"message": "Incorrect API key provided: plain-secret, Bearer plain-secret"}}'
    for status, error in ((401, EndpointMisused), (400, RequestRefused), (500, EndpointUnavailable)):
        answer = http_response(status, echo)
        with (
            ChatServer(lambda request, answer=answer: answer) as server,
            pytest.raises(error, match="Incorrect API key") as caught,
        ):
            ask(settings(server.base_url))
        assert "plain-secret" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize("key", ["plain-secret\n", "plain\nsecret", "plain-sécret"])
def test_a_key_that_no_header_can_hold_is_told_at_once_and_not_repeated(key: str, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EndpointMisused, match="api_key_env='OPENAI_API_KEY'") as caught:
        ask(settings("http://localhost:9/v1"))
    assert "cret" not in str(caught.value)


def test_basic_authentication_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_LOGIN", "user:PASSW0RD")
    with ChatServer(lambda request: "there") as server:
        answers, _ = ask(settings(server.base_url, basic_auth_env="TEACHER_LOGIN"))
        assert answers[0].text == "there"
        (head,) = server.heads
    assert b"authorization: basic " + base64.b64encode(b"user:PASSW0RD").lower() in head.lower()
    monkeypatch.delenv("TEACHER_LOGIN")
    with pytest.raises(EndpointMisused, match="basic_auth_env='TEACHER_LOGIN'"):
        ask(settings(server.base_url, basic_auth_env="TEACHER_LOGIN"))
