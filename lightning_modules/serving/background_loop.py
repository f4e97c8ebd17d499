"""Event loops for requests to servers.

asyncio runs at most one loop in a thread. In a notebook, or in an asynchronous handler, the caller's thread runs one
already. There requests need a thread of their own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Run(Protocol):
    """Calls `what`, runs its coroutine to the end, and returns the result."""

    def __call__(self, what: Callable[[], Awaitable[T]]) -> T: ...


@contextmanager
def event_loop() -> Iterator[Run]:
    """Yields a `Run`; all its coroutines run in one event loop, which ends with the context, and they with it.

    The loop is in this thread, or in a thread of its own if this thread runs a loop already.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # no loop runs in this thread

        async def awaited(what: Callable[[], Awaitable[T]]) -> T:
            return await what()

        with asyncio.Runner() as runner:
            yield lambda what: runner.run(awaited(what))
        return
    loop = BackgroundLoop()
    try:
        yield lambda what: loop.submit(what).result()
    finally:
        loop.close()


class BackgroundLoop:
    """Runs coroutines in a thread of its own, one after the other, in the order in which they were submitted.

    So requests go on while the caller computes.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()  # its waiters get it in their order
        self._tasks: set[asyncio.Task[Any]] = set()  # submitted, and not ended
        # a daemon, so that a process that ends in any other way than by `close` does not wait for it
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def submit(self, what: Callable[[], Awaitable[T]]) -> Future[T]:
        """Begin `what` as soon as everything that was submitted before has ended."""

        async def in_turn() -> T:
            task = asyncio.current_task()
            self._tasks.add(task)
            try:
                async with self._turn:
                    return await what()
            finally:
                self._tasks.discard(task)

        return asyncio.run_coroutine_threadsafe(in_turn(), self._loop)

    def close(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel everything that runs or waits, run `last`, and end the thread."""

        async def end() -> None:
            # Each task ends the tasks that it has begun. Cancelled from here, one that has not run yet would leave a
            # coroutine behind that nobody awaits.
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.shutdown_asyncgens()  # a generator that nobody reads to its end
            if last is not None:
                await last()
            await self._loop.shutdown_default_executor()

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
