"""Requests run in an event loop of this thread, or of another one where this thread runs a loop already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from lightning_modules.serving.background_loop import event_loop


def in_a_notebook(function: Callable[[], None]) -> None:
    """Call `function` where an event loop runs, as a notebook runs its cells."""

    async def cell() -> None:
        function()

    asyncio.run(cell())


def directly(function: Callable[[], None]) -> None:
    function()


@pytest.mark.parametrize("call", [directly, in_a_notebook])
def test_one_loop_runs_everything_and_ends_what_is_left(call: Callable[[Callable[[], None]], None]) -> None:
    ended, threads = [], set(threading.enumerate())

    async def numbers() -> AsyncIterator[tuple[int, asyncio.AbstractEventLoop]]:
        waiting = asyncio.ensure_future(asyncio.sleep(60))
        try:
            for number in range(3):
                await asyncio.sleep(0)
                yield number, asyncio.get_running_loop()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            ended.append("generator")

    def use() -> None:
        with event_loop() as run:
            stream = numbers()
            found = [run(lambda: anext(stream)) for _ in range(2)]  # the third is never asked for
        assert [number for number, _ in found] == [0, 1]
        assert len({id(loop) for _, loop in found}) == 1

    call(use)
    assert ended == ["generator"]
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("call", [directly, in_a_notebook])
def test_an_error_reaches_the_caller(call: Callable[[Callable[[], None]], None]) -> None:
    async def fail() -> None:
        raise KeyError("gone")

    def use() -> None:
        with pytest.raises(KeyError, match="gone"), event_loop() as run:
            run(fail)

    call(use)
