"""Shards are what they were: a changed one is noticed by readers and by a run's key, and each is hashed once."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from datamodules.persistence.files import hash_file
from datamodules.samples.sample import SampleError
from datamodules.streaming import shard_content
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from tests.datamodules.encoding.tiny_processor import declare, make_sample

NUM_SAMPLES = 6


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples, long there."""
    folder = tmp_path / "shards"
    with ShardWriter(folder, max_samples=2) as writer:
        for index in range(NUM_SAMPLES):
            writer.add(make_sample(f"s{index}", ((14, 14), (28, 14))))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard was read to be hashed. No shard counts as written a moment ago."""
    found: Counter[str] = Counter()

    def count(path: Path) -> str:
        found[path.name] += 1
        return hash_file(path)

    monkeypatch.setattr(shard_content, "hash_file", count)
    monkeypatch.setattr(shard_content, "RACY_SECONDS", -3600.0)
    return found


def change_label(shard: Path) -> None:
    """Another label of the same length, at the same size; the time of the last write is put back."""
    before = shard.stat()
    data = shard.read_bytes()
    time.sleep(0.01)  # a tick of the filesystem's clock
    with shard.open("r+b") as file:  # in place: the same inode
        file.write(data.replace(b'"label": "dog"', b'"label": "cat"'))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == len(data) and shard.read_bytes() != data


def outcomes(reader: ShardReader) -> list[str]:
    """The id of each sample, or the rule that it breaks."""

    def one(number: int) -> str:
        try:
            return reader.read(number).sample.id
        except SampleError as error:
            return error.rule

    return [one(number) for number in range(reader.count)]


def test_a_changed_shard_of_equal_size_is_rejected_and_changes_the_key(shards: Path) -> None:
    key = path_fingerprint(shards)
    change_label(shards / "shard-00001.tar")
    assert outcomes(ShardReader(shards)) == ["s0", "s1", "manifest_mismatch", "manifest_mismatch", "s4", "s5"]
    with pytest.raises(SampleError, match=r"has the sha256 .*the manifest says"):
        ShardReader(shards).read(2)
    assert outcomes(ShardReader(shards, verify=False)) == [f"s{k}" for k in range(NUM_SAMPLES)]
    assert path_fingerprint(shards) != key


def test_a_change_behind_a_remembered_hash_is_noticed(shards: Path, hashed: Counter[str]) -> None:
    key = path_fingerprint(shards)
    assert path_fingerprint(shards) == key and set(hashed.values()) == {1}
    change_label(shards / "shard-00001.tar")
    assert path_fingerprint(shards) != key
    assert hashed == {"shard-00000.tar": 1, "shard-00001.tar": 2, "shard-00002.tar": 1}


def test_the_key_knows_absent_and_cut_shards(shards: Path) -> None:
    keys = [path_fingerprint(shards)]
    (shards / "shard-00002.tar").rename(shards / "away")
    keys.append(path_fingerprint(shards))
    (shards / "away").rename(shards / "shard-00002.tar")
    assert path_fingerprint(shards) == keys[0]
    os.truncate(shards / "shard-00000.tar", 1024)
    keys.append(path_fingerprint(shards))
    assert len(set(keys)) == 3


def test_a_copied_folder_is_hashed_again_and_has_the_same_key(shards: Path, hashed: Counter[str]) -> None:
    key = path_fingerprint(shards)
    shutil.copytree(shards, shards.with_name("copy"))
    assert path_fingerprint(shards.with_name("copy")) == key and set(hashed.values()) == {2}
    shards.rename(shards.with_name("moved"))
    assert path_fingerprint(shards.with_name("moved")) == key and set(hashed.values()) == {2}, "a moved one is the same"


def test_a_run_hashes_every_shard_once_in_all_its_processes(shards: Path, hashed: Counter[str]) -> None:
    began = time.time()
    for _ in range(3):  # readers of one run
        assert outcomes(ShardReader(shards, since=began)) == [f"s{k}" for k in range(NUM_SAMPLES)]
    assert set(hashed.values()) == {1}
    outcomes(ShardReader(shards, since=0))
    assert set(hashed.values()) == {1}, "to look at, any comparison will do"
    outcomes(ShardReader(shards, since=time.time()))
    assert set(hashed.values()) == {2}, "another run compares anew"
    outcomes(ShardReader(shards, verify=False, since=time.time()))
    assert set(hashed.values()) == {2}


def test_a_hash_of_a_file_written_a_moment_ago_is_not_remembered(shards: Path) -> None:
    shard_content.content_sha256(shards / "shard-00000.tar")
    assert not (shards / ".content").exists()


@pytest.mark.parametrize("record", ["", "[]", "{", '{"sha256": 5}', '{"state": 1, "read": "x"}'])
def test_a_damaged_record_is_replaced(shards: Path, hashed: Counter[str], record: str) -> None:
    key = path_fingerprint(shards)
    file = shards / ".content" / "shard-00000.tar.json"
    file.write_text(record)
    assert path_fingerprint(shards) == key and hashed["shard-00000.tar"] == 2
    assert json.loads(file.read_text())["sha256"] == hash_file(shards / "shard-00000.tar")


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache(
    shards: Path, hashed: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_content.os, "access", lambda *_: False)
    key = path_fingerprint(shards)
    assert path_fingerprint(shards) == key and set(hashed.values()) == {1}
    assert not (shards / ".content").exists()


def test_shards_that_go_shrink_or_change_in_a_run_are_counted(shards: Path) -> None:
    reader = ShardReader(shards)
    assert outcomes(reader) == [f"s{k}" for k in range(NUM_SAMPLES)]
    (shards / "shard-00000.tar").unlink()
    os.truncate(shards / "shard-00001.tar", 700)
    change_label(shards / "shard-00002.tar")
    assert outcomes(reader) == ["manifest_mismatch"] * NUM_SAMPLES
    assert reader.find({"s0", "s5"}) == {}


def test_a_shard_that_ends_while_it_is_read_is_counted(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(shards)
    first = reader.read(0)
    state = shard_content.file_state((shards / "shard-00000.tar").stat())
    os.truncate(shards / "shard-00000.tar", 700)  # behind the look at its state
    monkeypatch.setattr("datamodules.streaming.shard_reader.file_state", lambda _: state)
    with pytest.raises(SampleError, match=r"manifest_mismatch.*cut short"):
        reader.read(0)
    assert first.images


def test_a_shard_that_cannot_be_read_is_counted(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, since: float) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("datamodules.streaming.shard_reader.content_sha256", fail)
    with pytest.raises(SampleError, match=r"unreadable_shard: shard-00000\.tar: Input/output error"):
        ShardReader(shards).read(0)


@pytest.mark.parametrize("name", ["00000_000001.json", "00000_000001.0.png", "00000_000001.0.jpg", "x_1.json"])
def test_a_member_that_is_there_twice_costs_its_sample(shards: Path, name: str) -> None:
    with tarfile.open(shards / "shard-00000.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    declare(shards)
    assert outcomes(ShardReader(shards))[:3] == ["s0", "duplicate_member", "s2"]


def test_a_header_that_claims_more_than_the_file_holds_costs_its_sample(shards: Path) -> None:
    path = shards / "shard-00000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("00000_000001.json")
    member.size = 2**60
    with path.open("r+b") as file:
        file.seek(member.offset)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
    declare(shards)
    assert outcomes(ShardReader(shards))[:3] == ["s0", "corrupt_member", "s2"]
