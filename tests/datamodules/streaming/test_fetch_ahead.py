"""Shards are fetched before they are read, within a bound, and a failure is left to the reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.samples.rejections import Rejections
from datamodules.streaming import fetch_ahead
from datamodules.streaming.fetch_ahead import FetchAhead, Upcoming
from datamodules.streaming.remote_cache import CacheSettings
from datamodules.streaming.resumable_loader import BatchLoader
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.stream import ShardStream
from datamodules.streaming.url_openers import FetchError
from tests.datamodules.streaming.shard_server import ShardServer, status

SHARDS = [Upcoming(10 * k, f"shard{k}", 100) for k in range(8)]


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


def test_shards_are_fetched_in_order_as_far_as_the_bound_and_on_as_the_reader_goes_on() -> None:
    fetched: list[str] = []
    with FetchAhead(fetched.append, SHARDS, most_bytes=300) as ahead:
        wait_for(lambda: fetched == ["shard0", "shard1", "shard2"])
        time.sleep(0.2)
        assert len(fetched) == 3, "no more than the bound holds"
        ahead.reached(0)
        wait_for(lambda: len(fetched) == 4)
        ahead.reached(39)
        wait_for(lambda: len(fetched) == 7)
        ahead.reached(1000)
        wait_for(lambda: len(fetched) == 8)
    assert fetched == [shard.location for shard in SHARDS]


def test_one_shard_is_fetched_though_it_is_larger_than_the_bound() -> None:
    fetched: list[str] = []
    with FetchAhead(fetched.append, SHARDS, most_bytes=1):
        wait_for(lambda: fetched == ["shard0"])


def test_it_ends_with_its_context_and_with_the_last_shard() -> None:
    def running() -> bool:
        return any(thread.name == "fetch_ahead" for thread in threading.enumerate())

    with FetchAhead(lambda _: None, SHARDS, 100):
        assert running()
    wait_for(lambda: not running())
    with FetchAhead(lambda _: None, SHARDS, 10_000) as ahead:
        ahead.reached(1000)
        wait_for(lambda: not running())


def test_a_failure_is_tried_again_and_never_raised(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(fetch_ahead, "AGAIN_SECONDS", 0.01)
    tried: list[str] = []

    def fetch(location: str) -> None:
        tried.append(location)
        if len(tried) < 4:
            raise FetchError("the server is gone")

    with FetchAhead(fetch, SHARDS[:2], 1000):
        wait_for(lambda: tried == ["shard0"] * 4 + ["shard1"])
    assert "not fetched ahead: the server is gone" in caplog.text


def stream(url: str, cache: Path, **settings: object) -> ShardStream:
    reader = ShardReader(url, cache=CacheSettings(str(cache), 1.0))
    return ShardStream(
        reader, lambda loaded: loaded, 0, fetching_ahead=reader.fetching_ahead, shuffle_buffer=3, **settings
    )


def test_a_stream_fetches_what_it_needs_next_of_this_epoch_and_the_next(server: ShardServer, tmp_path: Path) -> None:
    slots = iter(stream(server.url, tmp_path / "cache", order="block").window(0, 6, 6))
    first = next(slots)
    assert first.value.sample.id.startswith("s")
    # The rest of this epoch needs some of the shards, the next one all.
    wait_for(lambda: sum(server.requests[f"shard-0000{k}.tar"] for k in range(4)) == 4)
    slots.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_cannot_be_had_ends_an_epoch_in_its_place(
    server: ShardServer, tmp_path: Path, num_workers: int
) -> None:
    walk = stream(server.url, tmp_path / "cache", order="block")
    shards = [number // 3 for number in walk.order(0)]
    bad = shards[-1]
    server.stays = True
    server.faults[f"shard-0000{bad}.tar"] = [status(404)]
    loader, given = BatchLoader(walk, 1, num_workers, Rejections()), 0
    with pytest.raises(FetchError, match=rf"shard-0000{bad}\.tar cannot be fetched: HTTP 404") as caught:
        for _ in loader:
            given += 1
    assert given == shards.index(bad), "every sample before it is given"
    assert len(str(caught.value).splitlines()) <= 5 and not loader.rejections


def test_a_shard_that_a_small_cache_has_lost_meanwhile_is_fetched_ahead_again(server: ShardServer, tmp_path) -> None:
    def upcoming(num_shards: float) -> list[str]:
        """Of two epochs, each of which reads the four shards one after the other; a cache for so many of them."""
        largest = max(shard.bytes for shard in ShardReader(server.url).shards)
        settings = CacheSettings(str(tmp_path), num_shards * largest / 2**30)
        epochs = [enumerate(range(12)), enumerate(range(12), 12)]
        return [Path(shard.location).name for shard in ShardReader(server.url, cache=settings)._upcoming(epochs)]

    names = [f"shard-0000{k}.tar" for k in range(4)]
    assert upcoming(1000) == names, "a large cache still holds them"
    assert upcoming(8) == names * 2
