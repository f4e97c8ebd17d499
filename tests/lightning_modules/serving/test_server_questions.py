"""Many questions to one server: results that arrive together with an error, and errors that arrive together."""

from __future__ import annotations

import asyncio
import gc

import pytest

from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings
from lightning_modules.serving.server_questions import ServerQuestions
from tests.chat_server import ChatServer

CHECK = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]


def test_errors_that_arrive_together_end_with_one_of_them_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    is_closed = []

    async def ask(endpoint: ChatEndpoint, number: int) -> int:
        await asyncio.sleep(60 if number == 3 else 0)
        if number == 0:
            return number
        raise ValueError(f"question {number}")

    async def ask_and_look(endpoint: ChatEndpoint, number: int) -> int:
        try:
            return await ask(endpoint, number)
        finally:
            is_closed.append(endpoint._client.is_closed())

    with ChatServer(lambda request: "there") as server:
        settings = EndpointSettings("m", server.base_url, concurrency=4)
        asked, found = ServerQuestions("endpoint", settings, "greedy", 7, CHECK, "a question"), []
        with pytest.raises(ValueError, match=r"question [12]$"):
            found.extend(asked.ask_all(range(4), ask_and_look))
    gc.collect()  # asyncio reports an error that nobody has read when its task is freed
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert found == [0]  # not lost
    assert is_closed == [False] * 4  # a question that still waits is ended before its endpoint is
