"""Download remote shards before they are read, in a thread that follows the order of reading."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from datamodules.streaming.url_openers import FetchError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # time between two checks of the reading position while there is no room for further downloads
LOOK_SECONDS = 5.0  # time between two checks of the shards that are downloaded but not yet read
AGAIN_SECONDS = 30.0  # time before a failed download is tried again; a reader that needs the shard downloads it itself


class Upcoming(NamedTuple):
    """A shard, and the position in the order of reading at which it is first needed."""

    place: int
    location: str
    bytes: int


class FetchAhead:
    """`with FetchAhead(fetch, upcoming, most_bytes) as ahead`: downloads shards in advance.

    The reader reports its position with `ahead.reached(place)`. An error of a download is not raised here. The reader
    needs the same shard and raises its own error.

    Args:
        fetch: downloads the shard at a location; the shard is on this machine when it returns.
        upcoming: yields the shards in the order of their first need; the thread reads it one by one.
        most_bytes: largest number of bytes of shards that are downloaded but not yet read. At least one shard is
            downloaded.
    """

    def __init__(self, fetch: Callable[[str], object], upcoming: Iterable[Upcoming], most_bytes: int) -> None:
        self._fetch, self._upcoming, self._most_bytes = fetch, iter(upcoming), most_bytes
        self._place = -1
        self._stop = threading.Event()
        self._waiting: deque[Upcoming] = deque()  # downloaded, not yet read

    def __enter__(self) -> FetchAhead:
        # A daemon thread that is never joined, so that the end of an epoch or of the run does not wait for a download.
        # Its lock ends with the process, and the partial download stays.
        threading.Thread(target=self._run, name="fetch_ahead", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def reached(self, place: int) -> None:
        """Report the position of the reader. Shards that are first needed here or earlier count as read."""
        self._place = place

    def waiting(self) -> set[str]:
        """Locations of the shards that are downloaded but not yet read. The cache removes them last."""
        return {shard.location for shard in tuple(self._waiting)}  # copied first, because the thread changes it

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
                # this check counts as a use, so that the cache does not remove shards that are needed soon
                for shard in waiting:
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
