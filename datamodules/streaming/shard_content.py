"""The content of shards: hashes, remembered beside the shards, and differences from the manifest.

A shard is hashed when its hash is first needed. <folder>/.content/<shard>.json then holds the hash, the file's state
(inode, size, times of the last write and the last change) and the time of reading. The shard is not read again while
its state is the same: 140 GB are hashed once, not at each start. A copied folder has other states and the same hashes.
Where the folder cannot be written, the record lies in ~/.cache/multi-image-grounding/content.
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

from datamodules.persistence.files import fingerprint, hash_file, read_json, write_json
from datamodules.streaming.shard_sources import Shard, read_shards

log = logging.getLogger(__name__)

RECORDS = ".content"
PROCESS_BEGAN = time.time()  # forked workers have the main process's: a later hash is one of this run
# A file that was written this shortly before it was hashed may be written once more within the same tick of its
# filesystem's clock, and show the same times: its hash is used and not remembered (as git does with its index).
RACY_SECONDS = 2.0
NUM_THREADS = 4  # sha256 takes about 1.5 GB/s of one core; more threads than that wait for the disk
WORTH_SAYING = 1 << 30  # bytes; reading more takes seconds, and the log gives the reason


class State(NamedTuple):
    """Changes whenever the content may have changed. A copy with its times kept has another inode and change time."""

    inode: int
    size: int
    written: int  # ns
    changed: int  # ns


def file_state(found: os.stat_result) -> State:
    """The state of a file, of its `os.stat`."""
    return State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def content_sha256(path: Path, since: float = 0.0) -> str:
    """The file's sha256: as remembered, where it was hashed at `since` (a time.time()) or later and has the same state.

    Raises OSError where it cannot be read.
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
    """Note that the file, which nobody else writes, has had this hash since `since` (a time.time())."""
    try:
        state = file_state(path.stat())
        write_json(_record_file(path), {"sha256": digest, "state": list(state), "read": since})
    except OSError as error:
        log.warning("the hash of %s is not remembered: %s", path, error)


def deviations(source: str | Path) -> list[tuple[str, str]]:
    """(name, difference) of each shard here that differs from its manifest: "absent", its size, or its hash.

    A damaged manifest gives []: the reader of the shards refuses it. So do remote shards: they are compared when they
    are fetched. Shards of the right size whose hash is not remembered are hashed first, by one process at a time.
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
    """The shards of this machine that the source's manifest names; none where it is damaged."""
    try:
        return [shard for shard in read_shards(source) if not shard.is_remote]
    except ValueError:
        return []


def _remembered(path: Path, state: State, since: float) -> str | None:
    try:
        record: Any = read_json(_record_file(path))
    except (ValueError, OSError):  # damaged: the shard is hashed again, and the record replaced
        return None
    if not isinstance(record, dict) or record.get("state") != list(state):
        return None
    is_new_enough = isinstance(record.get("read"), int | float) and record["read"] >= since
    return record["sha256"] if is_new_enough and isinstance(record.get("sha256"), str) else None


def _record_folder(folder: Path) -> Path:
    """Beside the shards; where nothing can be written there, in the user's cache."""
    if os.access(folder, os.W_OK):
        return folder / RECORDS
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "multi-image-grounding" / "content" / fingerprint(str(folder.resolve()))


def _record_file(path: Path) -> Path:
    return _record_folder(path.parent) / f"{path.name}.json"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """All ranks of a run ask for the same hashes at its start: one reads the shards, the others then find its records.

    Where no lock can be had (a full disk, a filesystem without them), each reads for itself.
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
