"""Remote shards fetched before they are read, by a thread that follows the order of reading."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from datamodules.streaming.url_openers import FetchError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between two looks at the place of reading, where all that has room is fetched
LOOK_SECONDS = 5.0  # between two looks at the shards that wait
AGAIN_SECONDS = 30.0  # before a shard that cannot be fetched is tried again; whoever needs it fetches it himself


class Upcoming(NamedTuple):
    """A shard, and the place in the order of reading at which it is first needed."""

    place: int
    location: str
    bytes: int


class FetchAhead:
    """`with FetchAhead(fetch, upcoming, most_bytes) as ahead`: shards are fetched while `ahead.reached(place)` goes on.

    An error of a fetch is not raised here: the reader meets the same shard, and its own error, in its place.

    Args:
        fetch: has a shard, by its location, on this machine when it returns.
        upcoming: the shards in the order of their first need; asked for one after the other, by the thread.
        most_bytes: of shards that are fetched and not yet reached. One is fetched in any case.
    """

    def __init__(self, fetch: Callable[[str], object], upcoming: Iterable[Upcoming], most_bytes: int) -> None:
        self._fetch, self._upcoming, self._most_bytes = fetch, iter(upcoming), most_bytes
        self._place = -1
        self._stop = threading.Event()
        self._waiting: deque[Upcoming] = deque()  # fetched, not yet reached

    def __enter__(self) -> FetchAhead:
        # A daemon, and never waited for: the end of a run, or of an epoch, does not wait for a download. Its lock goes
        # with the process, and what it has fetched stays.
        threading.Thread(target=self._run, name="fetch_ahead", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def reached(self, place: int) -> None:
        """The reader is at this place: shards first needed here or before count as read."""
        self._place = place

    def waiting(self) -> set[str]:
        """Locations of the shards that are fetched and not yet reached: the last ones that should make room."""
        return {shard.location for shard in tuple(self._waiting)}  # copied at once: the thread changes it

    def _run(self) -> None:
        waiting, following = self._waiting, next(self._upcoming, None)
        looked = time.monotonic()
        while not self._stop.is_set() and (following is not None or waiting):
            while waiting and waiting[0].place <= self._place:
                waiting.popleft()
            held = sum(shard.bytes for shard in waiting)
            if following is not None and (not waiting or held + following.bytes <= self._most_bytes):
                if self._has(following):
                    waiting.append(following)
                    following = next(self._upcoming, None)
            elif time.monotonic() - looked > LOOK_SECONDS:
                for shard in waiting:  # a look counts as a use: what is needed soon is not the first to make room
                    self._has(shard)
                looked = time.monotonic()
            else:
                self._stop.wait(POLL_SECONDS)

    def _has(self, shard: Upcoming) -> bool:
        try:
            self._fetch(shard.location)
        except FetchError as error:
            log.warning("not fetched ahead: %s", error)
            self._stop.wait(AGAIN_SECONDS)
            return False
        return True
