"""Hashes of shards, which are stored beside the shards, and their differences from the manifest.

A shard is hashed when its hash is first needed. <folder>/.content/<shard>.json then stores the hash, the state of the
file (inode, size, mtime and ctime) and the time of reading. While the state is the same, the shard is not read again,
because hashing hundreds of gigabytes at each start would take too long. If the folder cannot be written, the record is
in ~/.cache/multi-image-grounding/content.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.persistence.files import fingerprint, hash_file, read_json, user_cache, write_json
from datamodules.streaming.shard_sources import Shard, read_shards

log = logging.getLogger(__name__)

RECORDS = ".content"
PROCESS_BEGAN = time.time()  # forked workers inherit it, so a hash that is later than this was computed in this run
# A file that was written very shortly before it was hashed may be changed again within the resolution of the
# filesystem's clock, with the same times. Its hash is used but not stored (git's index has the same rule).
RACY_SECONDS = 2.0
NUM_THREADS = 4  # one core hashes about 1.5 GB/s with sha256, so with more threads the disk is the limit
WORTH_SAYING = 1 << 30  # bytes; reading more than this takes seconds, so a log message gives the reason


class State(NamedTuple):
    """The state of a file, which changes whenever the content may have changed.

    Even a copy with the same mtime has another inode and ctime.
    """

    inode: int
    size: int
    written: int  # ns
    changed: int  # ns


def file_state(found: os.stat_result) -> State:
    """The state of a file from its `os.stat`."""
    return State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def content_sha256(path: Path, since: float = 0.0) -> str:
    """The sha256 of a file.

    A stored hash is used if it was computed at or after `since` (a `time.time()`) and the state of the file is the
    same. Raises OSError if the file cannot be read.
    """
    state = file_state(path.stat())
    if (known := _remembered(path, state, since)) is not None:
        return known
    began = time.time()
    digest = hash_file(path)
    is_settled = max(state.written, state.changed) / 1e9 < began - RACY_SECONDS
    if is_settled and file_state(path.stat()) == state:
        try:
            write_json(_record_file(path), {"sha256": digest, "state": list(state), "read": began})
        except OSError as error:
            log.warning("the hash of %s is not remembered: %s", path, error)
    return digest


def remember(path: Path, digest: str, since: float) -> None:
    """Store the hash of a file that no other process writes; it is valid since `since` (a `time.time()`)."""
    try:
        state = file_state(path.stat())
        write_json(_record_file(path), {"sha256": digest, "state": list(state), "read": since})
    except OSError as error:
        log.warning("the hash of %s is not remembered: %s", path, error)


def deviations(source: str | Path) -> list[tuple[str, str]]:
    """(name, difference) for each local shard that differs from its manifest; the difference is "absent", its size or
    its hash.

    A damaged manifest gives [], because `ShardReader` refuses it later. Remote shards give [] too, because they are
    compared after the download. Shards with the right size and without a stored hash are hashed first, by one process
    at a time.
    """
    found, unknown = {}, []
    for shard in _local_shards(source):
        try:
            state = file_state(Path(shard.location).stat())
        except OSError as error:
            found[shard.name] = f"absent ({error.strerror})"
            continue
        if state.size != shard.bytes:
            found[shard.name] = f"{state.size} bytes"
        elif (known := _remembered(Path(shard.location), state, 0.0)) is None:
            unknown.append(shard)
        elif known != shard.sha256:
            found[shard.name] = known[:16]
    if unknown:
        found |= _hash_unknown(source, unknown)
    return sorted(found.items())


def _hash_unknown(source: str | Path, unknown: Sequence[Shard]) -> dict[str, str]:
    total = sum(shard.bytes for shard in unknown)
    if total > WORTH_SAYING:
        log.warning("%s: reading %d shards once, %.0f GB, to know what they hold", source, len(unknown), total / 1e9)
    found = {}
    paths = [Path(shard.location) for shard in unknown]
    with _one_at_a_time(paths[0].parent), ThreadPoolExecutor(NUM_THREADS) as threads:
        for shard, actual in zip(unknown, threads.map(_hash_or_reason, paths), strict=True):
            if actual != shard.sha256[:16]:
                found[shard.name] = actual
    return found


def _hash_or_reason(path: Path) -> str:
    try:
        return content_sha256(path)[:16]  # another process may have read it while this one waited
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _local_shards(source: str | Path) -> list[Shard]:
    """The local shards in the source's manifest; none if the manifest is damaged."""
    try:
        return [shard for shard in read_shards(source) if not shard.is_remote]
    except ValueError:
        return []


def _remembered(path: Path, state: State, since: float) -> str | None:
    try:
        record: Any = read_json(_record_file(path))
    except (ValueError, OSError):  # the record is damaged, so the shard is hashed again and the record is replaced
        return None
    if not isinstance(record, dict) or record.get("state") != list(state):
        return None
    is_new_enough = isinstance(record.get("read"), int | float) and record["read"] >= since
    return record["sha256"] if is_new_enough and isinstance(record.get("sha256"), str) else None


def _record_folder(folder: Path) -> Path:
    """The path of the record: beside the shards, or in the user's cache folder if nothing can be written there."""
    if os.access(folder, os.W_OK):
        return folder / RECORDS
    return user_cache() / "content" / fingerprint(str(folder.resolve()))


def _record_file(path: Path) -> Path:
    return _record_folder(path.parent) / f"{path.name}.json"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """A lock for hashing: one rank reads the shards, and the others then find its records.

    All ranks of a run need the same hashes at its start. If no lock is possible (a full disk, a filesystem without
    locks), each rank reads the shards itself.
    """
    records = _record_folder(folder)
    try:
        records.mkdir(parents=True, exist_ok=True)
        lock = (records / "lock").open("w")
    except OSError as error:
        log.warning("%s: each process hashes the shards for itself: %s", folder, error)
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: each process hashes the shards for itself: %s", folder, error)
        yield
