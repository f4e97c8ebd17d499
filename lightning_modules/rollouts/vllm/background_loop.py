"""An event loop in a thread of its own: requests to servers go on while the caller computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines one after the other, in the order in which they were submitted."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()  # its waiters get it in their order
        self._tasks: set[asyncio.Task[Any]] = set()  # submitted, and not ended
        # a daemon, so that a process that ends in any other way than by `close` does not wait for it
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-requests", daemon=True)
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

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel everything that runs or waits, run `last`, and end the thread."""

        async def end() -> None:
            # Each task ends the tasks that it has begun. Cancelled from here, one that has not run yet would leave a
            # coroutine behind that nobody awaits.
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await last()
            await self._loop.shutdown_default_executor()

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
