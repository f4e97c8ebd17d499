"""Remote shards on this machine: fetched once, verified, bounded, whatever the server, the disk and others do."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from datamodules.persistence.files import hash_file
from datamodules.streaming import remote_cache, url_openers
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.remote_cache import CacheSettings, ShardCache
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import read_shards
from datamodules.streaming.url_openers import FetchError
from tests.datamodules.streaming.conftest import write_shards
from tests.datamodules.streaming.shard_server import ShardServer, cut, hang_up, other, stall, status, whole

FIRST = "shard-00000.tar"
ALL = [f"s{k}" for k in range(12)]


def settings(tmp_path: Path, gib: float = 1.0) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), gib)


def ids(url: str, cache: CacheSettings) -> list[str]:
    reader = ShardReader(url, cache=cache)
    return [reader.read(number).sample.id for number in range(reader.count)]


def held(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir() if path.suffix in (".tar", ".part")}


def test_every_shard_is_fetched_once_and_named_by_its_content(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    for _ in range(3):
        assert ids(server.url, settings(tmp_path)) == ALL
    assert {server.requests[f"shard-0000{k}.tar"] for k in range(4)} == {1}
    assert held(tmp_path) == {f"{shard['sha256']}.tar" for shard in read_manifest(folder)["shards"]}


def test_two_shards_of_one_name_do_not_collide(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    write_shards(folder / "b", 12, "t")
    cache = settings(tmp_path)
    assert ids(server.url, cache) == ALL
    assert ids(f"{server.url}/b", cache) == [f"t{k}" for k in range(12)]
    assert len(held(tmp_path)) == 8


@pytest.mark.parametrize(
    "faults",
    [
        *([cut(700)], [cut(700), cut(5), cut(1)], [cut(700), whole], [cut(0)], [hang_up, cut(900), status(500)]),
        [status(503), stall(3.0), cut(600)],
    ],
    ids=["cut", "cut thrice", "cut, then no ranges", "empty", "all sorts", "stall"],
)
def test_a_broken_download_goes_on_to_the_whole_shard(
    server: ShardServer, tmp_path: Path, faults: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(url_openers, "TIMEOUT", 0.5)
    server.faults[FIRST] = list(faults)
    assert ids(server.url, settings(tmp_path)) == ALL
    assert server.requests[FIRST] == len(faults) + (faults[-1] is not whole)


def test_a_cut_download_goes_on_where_it_ended(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    server.faults[FIRST] = [cut(700), cut(800)]
    ids(server.url, settings(tmp_path))
    assert [start for name, start, _ in server.asked if name == FIRST] == [0, 700, 1500]
    assert server.num_bytes < sum(path.stat().st_size for path in folder.iterdir()) + 100


def test_what_a_killed_process_left_is_gone_on_with(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    cache, content = settings(tmp_path), (folder / FIRST).read_bytes()
    (tmp_path / "cache").mkdir()
    part = tmp_path / "cache" / f"{hashlib.sha256(content).hexdigest()}.{len(content)}.part"
    part.write_bytes(content[:1000])
    assert ids(server.url, cache) == ALL
    assert [start for name, start, _ in server.asked if name == FIRST] == [1000]


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * 10**6], ids=["short", "too long"])
def test_what_is_left_of_another_content_is_fetched_again(
    server: ShardServer, folder: Path, tmp_path: Path, left: bytes
) -> None:
    content = (folder / FIRST).read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{hashlib.sha256(content).hexdigest()}.{len(content)}.part").write_bytes(left)
    assert ids(server.url, settings(tmp_path)) == ALL


def test_a_shard_that_is_not_its_manifests_is_named_and_not_kept(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    content = (folder / FIRST).read_bytes()
    server.stays = True
    server.faults[FIRST] = [other(content.replace(b"dog", b"cat"))]
    with pytest.raises(FetchError, match=r"shard-00000\.tar is not what its manifest says.*sha256") as caught:
        ids(server.url, settings(tmp_path))
    assert len(str(caught.value).splitlines()) <= 5
    assert held(tmp_path) == set()


def test_a_shard_that_stays_short_is_named(server: ShardServer, tmp_path: Path) -> None:
    server.stays = True
    server.faults[FIRST] = [other(b"<html>try again later</html>")]
    with pytest.raises(FetchError, match=r"shard-00000\.tar cannot be fetched, after 8 attempts: .*ended after 28 of"):
        ids(server.url, settings(tmp_path))


@pytest.mark.parametrize(("fault", "words"), [(status(404), "HTTP 404"), (status(403), "HTTP 403")])
def test_a_shard_that_is_refused_ends_the_reading(server: ShardServer, tmp_path: Path, fault, words: str) -> None:
    server.faults[FIRST] = [fault]
    with pytest.raises(FetchError, match=rf"{FIRST} cannot be fetched: {words}"):
        ids(server.url, settings(tmp_path))
    assert server.requests[FIRST] == 1
    assert ids(server.url, settings(tmp_path)) == ALL, "once it is there"


def test_a_server_that_dies_leaves_what_is_fetched_to_read(folder: Path, tmp_path: Path) -> None:
    with ShardServer(folder) as server:
        reader = ShardReader(server.url, cache=settings(tmp_path))
        first = reader.read(0)
    assert reader.read(0) == first and reader.read(2)
    with pytest.raises(FetchError, match=r"shard-00001\.tar cannot be fetched, after 8 attempts"):
        reader.read(3)


def test_a_damaged_shard_of_the_cache_is_fetched_again(server: ShardServer, tmp_path: Path, caplog) -> None:
    ids(server.url, settings(tmp_path))
    victim = sorted((tmp_path / "cache").glob("*.tar"))[0]
    data = victim.read_bytes()
    time.sleep(0.01)
    victim.write_bytes(data[:-1] + b"x")
    assert ids(server.url, CacheSettings(str(tmp_path / "cache"), 1.0)) == ALL
    assert hash_file(victim) == victim.stem and "is damaged" in caplog.text
    victim.write_bytes(data[:700])
    assert ids(server.url, settings(tmp_path)) == ALL


def test_a_shard_that_goes_from_the_cache_while_it_is_used_is_fetched_again(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(server.url, cache=settings(tmp_path))
    first = reader.read(0)
    shutil.rmtree(tmp_path / "cache")
    assert reader.read(0) == first
    monkeypatch.setattr("webdataset.cache.time.sleep", lambda _: None)  # its pause before the next look
    get_file, lost = ShardCache.get_file, []

    def lose(cache: ShardCache, url: str) -> str:
        path = get_file(cache, url)
        if not lost:
            lost.append(path)
            os.unlink(path)  # another process makes room between the look and the opening
        return path

    monkeypatch.setattr(ShardCache, "get_file", lose)
    assert reader.read(1).sample.id == "s1" and lost


def size_of(folder: Path) -> int:
    return max(shard["bytes"] for shard in read_manifest(folder)["shards"])


def test_the_cache_keeps_within_its_bound_and_drops_the_longest_unused(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_cache, "USE_SECONDS", 0.0)
    cache = settings(tmp_path, 2.5 * size_of(folder) / 2**30)
    reader = ShardReader(server.url, cache=cache)
    digests = [f"{shard['sha256']}.tar" for shard in read_manifest(folder)["shards"]]
    for number in (0, 3, 0, 6):  # shards 0, 1, 0, 2
        reader.read(number)
        time.sleep(0.02)
    assert held(tmp_path) == {digests[0], digests[2]}
    assert ids(server.url, cache) == ALL
    assert len(held(tmp_path)) == 2


def test_files_of_the_user_in_the_folder_are_neither_counted_nor_removed(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    own = [tmp_path / "cache" / name for name in ("coco.tar", "shard-00000.tar", "film.100.part")]
    own[0].parent.mkdir()
    for path in own:
        path.write_bytes(bytes(10**6))
        os.utime(path, (0, 0))
    assert ids(server.url, settings(tmp_path, 1.5 * size_of(folder) / 2**30)) == ALL
    assert all(path.is_file() for path in own) and len(held(tmp_path)) == 1 + len(own)


def test_a_bound_below_one_shard_is_told_before_anything_is_fetched(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match=r"data\.cache_gib=.* is too small for http.*shard-0000"):
        ShardReader(server.url, cache=settings(tmp_path, 0.5 * size_of(folder) / 2**30))
    assert not (tmp_path / "cache").exists()


def test_what_kills_have_left_makes_room_and_what_is_being_fetched_does_not(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_cache, "ROOM_SECONDS", 0.3)
    cache = settings(tmp_path, 1.5 * size_of(folder) / 2**30)
    (tmp_path / "cache").mkdir()
    left = tmp_path / "cache" / f"{'0' * 64}.{size_of(folder)}.part"
    left.write_bytes(b"x")
    reader = ShardReader(server.url, cache=cache)
    with reader.cache._lock(f"{'0' * 64}.lock"), pytest.raises(FetchError, match="other processes are fetching"):
        reader.read(0)
    reader.read(0)
    assert not left.exists()


def read_in_process(url: str, cache: CacheSettings) -> list[str]:
    os.environ["no_proxy"] = "*"
    return ids(url, cache)


def test_processes_of_a_machine_share_one_download(folder: Path, tmp_path: Path) -> None:
    with ShardServer(folder, rate=2e6) as server, multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(read_in_process, [(server.url, settings(tmp_path))] * 4)
        assert found == [ALL] * 4
        assert {server.requests[f"shard-0000{k}.tar"] for k in range(4)} == {1}


def test_a_full_disk_is_told_with_place_and_cure_and_keeps_nothing(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path: Path, mode: str = "r", **more):
        file = opened(path, mode, **more)
        return Full(file) if path.suffix == ".part" else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(FetchError, match=r"(?s)shard-00000\.tar.*No space left.*MiB free.*data\.cache_gib") as caught:
        ids(server.url, settings(tmp_path))
    assert len(str(caught.value).splitlines()) <= 5
    assert held(tmp_path) == set() and server.requests[FIRST] == 1


def test_a_folder_that_cannot_be_written_is_told_and_what_it_holds_is_read(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ShardReader(server.url, cache=settings(tmp_path)).read(0)
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    opened, touched = Path.open, os.utime

    def refuse(path: Path, mode: str = "r", **more):
        if mode[0] in "wa" and (tmp_path / "cache") in path.parents:
            raise read_only
        return opened(path, mode, **more)

    def refuse_time(path: object, *more: object, **most: object) -> None:
        if str(tmp_path) in str(path):
            raise read_only
        touched(path, *more, **most)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "utime", refuse_time)
    reader = ShardReader(server.url, cache=settings(tmp_path))
    assert reader.read(0).sample.id == "s0"
    with pytest.raises(FetchError, match=r"(?s)shard-00001\.tar cannot be kept.*Read-only file system.*data\.cache"):
        reader.read(3)


def test_a_folder_that_is_a_file_is_told(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(FetchError, match="cannot be kept in the cache"):
        ids(server.url, settings(tmp_path))


def test_local_shards_need_no_cache(folder: Path, tmp_path: Path) -> None:
    assert ids(str(folder), settings(tmp_path)) == ALL
    assert not (tmp_path / "cache").exists()


def test_without_verification_the_length_is_compared_and_what_is_fetched_all_the_same(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    shards = read_shards(server.url)
    cache = ShardCache(shards, settings(tmp_path), verify=False)
    path = Path(cache.get_file(shards[0].location))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = ShardCache(shards, settings(tmp_path), verify=False)
    assert again.get_file(shards[0].location) == str(path) and server.requests[FIRST] == 1
    record = json.loads((folder / "manifest.json").read_text())
    assert record["shards"][0]["sha256"] == path.stem
    server.stays, server.faults["shard-00001.tar"] = True, [other(bytes(shards[1].bytes))]
    with pytest.raises(FetchError, match="is not what its manifest says"):
        again.get_file(shards[1].location)
