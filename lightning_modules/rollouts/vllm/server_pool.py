"""Spread requests over several servers.

If a server fails, its open requests move to the others. It is used again once its health check passes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from datamodules.persistence.user_error import UserError
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointMisused, EndpointSettings, EndpointUnavailable

J = TypeVar("J")
R = TypeVar("R")
# Number of consecutive rejections although `prepare` found no problem. Then the request itself is wrong, and retrying
# stops.
MAX_CONSECUTIVE_REJECTIONS = 3
# number of failures of one job over a longer time than `patience`; then the job is the problem, not the servers
MAX_JOB_RETRIES = 3
log = logging.getLogger(__name__)


class ServersLost(UserError, RuntimeError):
    """No server has answered for `patience` seconds."""


@dataclass
class _Server:
    endpoint: ChatEndpoint
    healthy: asyncio.Event = field(default_factory=asyncio.Event)
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    dead_since: float | None = None
    misuses: int = 0

    @property
    def url(self) -> str:
        return str(self.endpoint.settings.base_url)

    def suspect(self) -> None:
        self.healthy.clear()
        self.suspected.set()


class ServerPool:
    """A pool of servers.

    `prepare(endpoint)` brings a server into the state that jobs need, or raises EndpointUnavailable. It is called
    before a server gets its first job of a `run`, and after every failure.

    patience: seconds without any server until ServersLost is raised. pause: seconds between two checks of a dead
    server. look: time limit in seconds of one `prepare`; it must be longer than a working server needs. A pool belongs
    to one event loop.
    """

    def __init__(
        self,
        settings: Sequence[EndpointSettings],
        prepare: Callable[[ChatEndpoint], Awaitable[None]],
        patience: float,
        pause: float,
        look: float,
    ) -> None:
        self.prepare, self.patience, self.pause, self.look = prepare, patience, pause, look
        self._servers = [_Server(ChatEndpoint(each)) for each in settings]
        self._began = time.monotonic()  # before this time, no server was checked

    async def close(self) -> None:
        for server in self._servers:
            await server.endpoint.__aexit__()

    async def run(self, jobs: Sequence[J], ask: Callable[[ChatEndpoint, J], Awaitable[R]]) -> list[R]:
        """The answers to all jobs, in their order. Each job goes to the server that is free first.

        If `ask` raises EndpointUnavailable or EndpointMisused, the server is marked as suspect and the job returns to
        the queue. Any other error ends the run. Raises ServersLost; EndpointMisused if `prepare` raises it or cannot
        fix it; and EndpointUnavailable if a job fails again and again although there are servers.
        """
        if not jobs:
            return []
        waiting: asyncio.Queue[tuple[int, J]] = asyncio.Queue()
        for numbered in enumerate(jobs):
            waiting.put_nowait(numbered)
        results: dict[int, R] = {}
        losses: defaultdict[int, list[float]] = defaultdict(list)  # job -> times at which it was lost
        finished = asyncio.Event()

        async def work(server: _Server) -> None:
            while True:
                await server.healthy.wait()
                number, job = await waiting.get()
                if not server.healthy.is_set():  # the server failed while it waited for a job
                    waiting.put_nowait((number, job))
                    continue
                try:
                    results[number] = await ask(server.endpoint, job)
                except (EndpointUnavailable, EndpointMisused) as error:
                    waiting.put_nowait((number, job))
                    lost = losses[number]
                    lost.append(time.monotonic())
                    if len(lost) >= MAX_JOB_RETRIES and lost[-1] - lost[0] > self.patience:
                        raise
                    _note(server, error)
                    continue
                server.misuses = 0
                if len(results) == len(jobs):
                    finished.set()

        await self._until(finished, work, len(jobs))
        return [results[number] for number in range(len(jobs))]

    async def prepare_all(self) -> None:
        """Prepare every server that answers now. Raises ServersLost if there is none.

        The others are prepared when they get work.

        Servers that were dead before are also prepared later, so that nothing waits for a machine that is gone.
        """
        self._began = time.monotonic()
        if any(await self._look(server for server in self._servers if server.dead_since is None)):
            return
        while not any(await self.look_once()):
            await asyncio.sleep(self.pause)

    async def look_once(self) -> list[bool]:
        """Prepare every server that answers now; returns for each whether it was prepared."""
        return await self._look(self._servers)

    async def visit_all(self, visit: Callable[[ChatEndpoint], Awaitable[None]], seconds: float) -> None:
        """Visit every server that answers within `seconds`.

        The first other error is raised after all visits, so that an error of one server does not prevent the visits of
        others.
        """

        async def visit_one(endpoint: ChatEndpoint) -> None:
            async with asyncio.timeout(seconds):
                await visit(endpoint)

        visits = (visit_one(server.endpoint) for server in self._servers)
        for fault in await asyncio.gather(*visits, return_exceptions=True):
            if fault is not None and not isinstance(fault, EndpointUnavailable | TimeoutError):
                raise fault

    async def _look(self, servers: Iterable[_Server]) -> list[bool]:
        return await asyncio.gather(*(self._prepared(server) for server in servers))

    async def _until(self, finished: asyncio.Event, work: Callable[[_Server], Awaitable[None]], num_jobs: int) -> None:
        """Run the workers of every server, and the task that prepares it again, until `finished`."""
        for server in self._servers:
            server.suspect()
        self._began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._heal(server)) for server in self._servers]
                for server in self._servers:
                    workers = min(server.endpoint.settings.concurrency, num_jobs)
                    tasks += [group.create_task(work(server)) for _ in range(workers)]
                await finished.wait()
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as failed:  # all have the same message
            raise failed.exceptions[0] from None

    async def _heal(self, server: _Server) -> None:
        """Prepare the server whenever it is suspect, until this succeeds."""
        while True:
            await server.suspected.wait()
            if await self._prepared(server):
                server.suspected.clear()
                server.healthy.set()
            else:
                await asyncio.sleep(self.pause)

    async def _prepared(self, server: _Server) -> bool:
        """Whether the server could be prepared. Raises ServersLost after `patience` seconds without any server."""
        try:
            async with asyncio.timeout(self.look):
                await self.prepare(server.endpoint)
        except (EndpointUnavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = EndpointUnavailable(f"{server.url} is not ready after look={self.look:g} s")
            if server.dead_since is None:
                log.warning("server %s does not answer: %s", server.url, error)
                server.dead_since = time.monotonic()
            self._check_patience(error)
            return False
        if server.dead_since is not None:
            log.warning("server %s is back after %.0f s", server.url, time.monotonic() - server.dead_since)
            server.dead_since = None
        return True

    def _check_patience(self, error: Exception) -> None:
        since = [server.dead_since for server in self._servers]
        if None not in since and time.monotonic() - max(self._began, *since) > self.patience:
            urls = ", ".join(server.url for server in self._servers)
            raise ServersLost(
                f"none of the servers {urls} has answered for patience={self.patience:g} s. Start one; the same "
                f"command goes on from the last checkpoint. The last error: {error}"
            ) from error


def _note(server: _Server, error: Exception) -> None:
    """Mark the server as suspect. Raises the error if preparing has failed to fix it too often."""
    # otherwise the error belongs to the same failure
    if isinstance(error, EndpointMisused) and server.healthy.is_set():
        server.misuses += 1
        if server.misuses >= MAX_CONSECUTIVE_REJECTIONS:
            raise error
    log.warning("server %s lost a request: %s", server.url, error)
    server.suspect()
