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

from lightning_modules.serving.openai_client import ChatEndpoint, EndpointMisused, EndpointSettings, EndpointUnavailable

J = TypeVar("J")
R = TypeVar("R")
# Consecutive rejections although `prepare` found nothing wrong: the request itself is wrong, so stop retrying.
MAX_CONSECUTIVE_REJECTIONS = 3
MAX_JOB_RETRIES = 3  # failures of one job, over longer than `patience`: the job is at fault, not the servers
log = logging.getLogger(__name__)


class ServersLost(RuntimeError):
    """No server has answered for as long as was to be waited."""


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
    """`prepare(endpoint)` brings a server into the state that jobs need, and raises EndpointUnavailable as long as it
    cannot. It is called before a server gets its first job of a `run`, and after every failure.

    patience: seconds without any server until ServersLost; pause: seconds between two looks at a dead one; look:
    seconds that one `prepare` may take, which is longer than any server that works needs. A pool belongs to one event
    loop.
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
        self._began = time.monotonic()  # before that nobody has looked at the servers

    async def close(self) -> None:
        for server in self._servers:
            await server.endpoint.__aexit__()

    async def run(self, jobs: Sequence[J], ask: Callable[[ChatEndpoint, J], Awaitable[R]]) -> list[R]:
        """The answers to all jobs, in their order. Each job goes to the server that is free first.

        `ask` raising EndpointUnavailable or EndpointMisused puts the server under suspicion and the job back; any other
        error ends the run. Raises ServersLost, EndpointMisused where `prepare` does or cannot mend it, and
        EndpointUnavailable for a job that is lost over and over, though there are servers.
        """
        if not jobs:
            return []
        waiting: asyncio.Queue[tuple[int, J]] = asyncio.Queue()
        for numbered in enumerate(jobs):
            waiting.put_nowait(numbered)
        results: dict[int, R] = {}
        losses: defaultdict[int, list[float]] = defaultdict(list)  # when each job was lost
        finished = asyncio.Event()

        async def work(server: _Server) -> None:
            while True:
                await server.healthy.wait()
                number, job = await waiting.get()
                if not server.healthy.is_set():  # while it waited for a job
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
        """Prepare every server that answers now: one at least, or ServersLost. The others follow when they get work.

        So do those that were dead before: nobody waits for a machine that is gone for good.
        """
        self._began = time.monotonic()
        if any(await self._look(server for server in self._servers if server.dead_since is None)):
            return
        while not any(await self.look_once()):
            await asyncio.sleep(self.pause)

    async def look_once(self) -> list[bool]:
        """Prepare every server that answers now; whether each did."""
        return await self._look(self._servers)

    async def visit_all(self, visit: Callable[[ChatEndpoint], Awaitable[None]], seconds: float) -> None:
        """Visit every server that answers within `seconds`. Raises the first other error when all are through: a fault
        of one keeps none from its visit."""

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
        """Run the workers of every server, and who heals it, until `finished`."""
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
        except ExceptionGroup as failed:  # each would say the same
            raise failed.exceptions[0] from None

    async def _heal(self, server: _Server) -> None:
        """Prepare the server whenever it is under suspicion, until that works."""
        while True:
            await server.suspected.wait()
            if await self._prepared(server):
                server.suspected.clear()
                server.healthy.set()
            else:
                await asyncio.sleep(self.pause)

    async def _prepared(self, server: _Server) -> bool:
        """Whether the server could be prepared. Raises ServersLost when none could for as long as was to be waited."""
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
    """Put the server under suspicion. Raises the error where preparing has not helped so often that it cannot."""
    if isinstance(error, EndpointMisused) and server.healthy.is_set():  # else it is of the same failure
        server.misuses += 1
        if server.misuses >= MAX_CONSECUTIVE_REJECTIONS:
            raise error
    log.warning("server %s lost a request: %s", server.url, error)
    server.suspect()
