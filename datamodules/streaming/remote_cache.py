"""A local cache of remote shards: each is downloaded once, verified by the sha256 in its manifest, and the total size
is limited.

The cache replaces webdataset's stage `FileCache`, which names a file by the last part of its URL and checks only its
first bytes. Here a file is named `<sha256>.tar`, so two shards with the same name never collide, and a file with other
content is never used. All processes on a machine share the folder:

    <sha256>.tar              a complete shard
    <sha256>.<bytes>.part     a partial download; the next attempt continues at its end
    <sha256>.lock             locked during the download; its mtime is the time of the shard's last use
    lock                      locked while shards are removed
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.cache import FileCache

from datamodules.persistence.files import StorageError, hash_file, remove_draft, storage_error, user_cache
from datamodules.streaming.shard_content import PROCESS_BEGAN, State, content_sha256, file_state, remember
from datamodules.streaming.shard_sources import Shard
from datamodules.streaming.url_openers import TRIES, FetchError, open_url, read_some, retry

log = logging.getLogger(__name__)

USE_SECONDS = 1.0  # smallest time between two updates of a shard's last use
ROOM_SECONDS = 120.0  # longest time to wait for space that other processes use
POLL_SECONDS = 0.5
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CacheSettings:
    """The folder of downloaded shards, and its largest size.

    Args:
        folder: shared by the processes of a machine; by default ~/.cache/multi-image-grounding/shards.
        gib: largest size of the shards that were downloaded to it, in GiB.
        sharers: number of processes on this machine that download ahead; each may use an equal part.
    """

    folder: str | None = None
    gib: float = 100.0
    sharers: int = 1

    @property
    def limit(self) -> int:
        """Largest size of the downloaded shards, in bytes."""
        return int(self.gib * 2**30)

    def path(self) -> Path:
        if self.folder:
            return Path(self.folder).expanduser()
        return user_cache() / "shards"


class ShardCache(FileCache):
    """webdataset's stage that opens shards: `for opened in cache([{"url": location}]): opened["stream"]`.

    A local path is opened directly.

    Args:
        shards: all shards that are read through this cache.
        settings: folder and largest size.
        since: a check of a cached shard against its sha256 is valid if it was made at or after this time
            (`time.time()`).
        verify: if False, a cached shard of the right length is not checked. A downloaded shard is always checked.

    Raises:
        FetchError: a shard is larger than the whole cache.
    """

    def __init__(
        self, shards: list[Shard], settings: CacheSettings, since: float = PROCESS_BEGAN, verify: bool = True
    ) -> None:
        self.folder, self.limit = settings.path(), settings.limit
        super().__init__(str(self.folder), handler=self._is_gone)
        self.since, self.verify = since, verify
        self.shards: Mapping[str, Shard] = {shard.location: shard for shard in shards if shard.is_remote}
        self._known: dict[str, State] = {}  # sha256 -> state of the file when it was checked
        self._noted: dict[str, float] = {}  # sha256 -> time at which a use was last recorded
        # locations that this process reads soon; their shards are removed last
        self.needed: Callable[[], set[str]] = set
        largest = max(self.shards.values(), key=lambda shard: shard.bytes, default=None)
        if largest is not None and largest.bytes > self.limit:
            size = f"{largest.bytes / 2**30:.2f} GiB"
            raise FetchError(f"data.cache_gib={settings.gib:g} is too small for {largest.location}, which has {size}")

    def get_file(self, url: str, tries: int = TRIES) -> str:
        """The path of the complete shard at this location. The shard is downloaded if it is not in the cache.

        Args:
            url: location of a shard; a local path is returned unchanged.
            tries: attempts in a row without progress (`retry`).

        Raises:
            FetchError: the shard cannot be downloaded, it differs from its manifest, or the cache cannot be written.
        """
        shard = self.shards.get(url)
        if shard is None:
            return url
        path = self.folder / f"{shard.sha256}.tar"
        if not self._is_sound(path, shard):
            try:
                with self._lock(f"{shard.sha256}.lock"):  # other processes wait here, and then find the shard
                    if not self._is_sound(path, shard):
                        self._fetch(shard, path, tries)
                        # a new file counts as used now, independent of older records
                        self._noted.pop(shard.sha256, None)
            except OSError as error:
                reason = error if isinstance(error, StorageError) else storage_error(error, path)
                raise FetchError(
                    f"{url} cannot be kept in the cache: {reason}.\n"
                    "Make room there, or give another folder (data.cache) or bound (data.cache_gib)"
                ) from error
        self._note_use(shard)
        return str(path)

    def _is_gone(self, error: Exception) -> bool:
        """Iterate for webdataset. If another process removes the file just before it is opened, try again."""
        if isinstance(error, FileNotFoundError) and Path(error.filename or "").parent == self.folder:
            return True
        raise error

    def _is_sound(self, path: Path, shard: Shard) -> bool:
        """Whether the cached file has the right length and, unless checks are off, the right hash."""
        try:
            state = file_state(path.stat())
            if self._known.get(shard.sha256) == state:
                return True
            is_sound = state.size == shard.bytes
            is_sound = is_sound and (not self.verify or content_sha256(path, self.since) == shard.sha256)
        except OSError:  # usually the file does not exist; any other error will occur again in the download
            return False
        if is_sound:
            self._known[shard.sha256] = state
        else:
            log.warning("%s of %s is damaged: it is fetched again", path, shard.location)
        return is_sound

    def _fetch(self, shard: Shard, path: Path, tries: int) -> None:
        """Download the rest of the shard, check it, and give it its final name."""
        # 1. Reserve space. The name of the partial file contains its final size, so that other processes count it.
        part = path.with_name(f"{shard.sha256}.{shard.bytes}.part")
        path.unlink(missing_ok=True)  # a damaged one
        with self._lock("lock"):
            self._make_room(shard, part)
        # 2. Download, after the part that an earlier process may have left.
        was_there = part.stat().st_size > 0
        began = time.time()
        _download(shard, part, tries)
        # 3. Compare the complete file with the manifest.
        if (digest := hash_file(part)) != shard.sha256 and was_there:
            log.warning("%s: what an earlier attempt left is damaged: it is fetched again", shard.location)
            os.truncate(part, 0)
            _download(shard, part, tries)
            digest = hash_file(part)
        if digest != shard.sha256:
            part.unlink()
            raise FetchError(
                f"{shard.location} is not what its manifest says: it has the sha256 {digest[:16]}…, the manifest says"
                f" {shard.sha256[:16]}….\nCopy the folder of shards to the server again, whole"
            )
        # 4. Only now the shard gets its final name.
        os.replace(part, path)
        remember(path, digest, began)
        self._known[shard.sha256] = file_state(path.stat())
        log.info("fetched %s: %.1f MB in %.1f s", shard.location, shard.bytes / 1e6, time.time() - began)

    def _make_room(self, shard: Shard, part: Path) -> None:
        """Remove the least recently used shards until this one fits; then reserve its space with the partial file."""
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            needed = {self.shards[location].sha256 for location in self.needed()}
            files = [file for file in self._files() if file.path != part]
            excess = sum(file.bytes for file in files) + shard.bytes - self.limit
            for file in sorted(files, key=lambda file: (file.path.stem in needed, file.used)):
                if excess > 0 and self._remove(file):
                    excess -= file.bytes
            if excess <= 0:
                part.touch()
                return
            if time.monotonic() > deadline:
                raise FetchError(
                    f"no room for {shard.location} in {self.folder}: other processes are fetching shards there.\n"
                    f"Raise data.cache_gib={self.limit / 2**30:g}, or write smaller shards"
                )
            time.sleep(POLL_SECONDS)

    def _files(self) -> list[_CachedFile]:
        found = []
        for path in self.folder.iterdir():
            name, _, kind = path.name.partition(".")
            if not SHA256.fullmatch(name):  # the user keeps other files in this folder
                continue
            with contextlib.suppress(OSError, ValueError):  # another process has removed or renamed it
                if kind == "tar" or kind.endswith(".part"):
                    size = path.stat().st_size if kind == "tar" else int(kind.partition(".")[0])
                    lock = path.with_name(f"{name}.lock")
                    used = (lock if lock.exists() else path).stat().st_mtime
                    found.append(_CachedFile(path, size, used, lock))
        return found

    def _remove(self, file: _CachedFile) -> bool:
        """Remove a shard or partial file, unless it is being downloaded. Processes that have it open can still read."""
        if file.path.suffix == ".part":
            try:
                with self._lock(file.lock.name, wait=False):
                    file.path.unlink(missing_ok=True)
                    return True
            except BlockingIOError:
                return False
        file.path.unlink(missing_ok=True)
        return True

    def _note_use(self, shard: Shard) -> None:
        if (now := time.monotonic()) - self._noted.get(shard.sha256, -USE_SECONDS) >= USE_SECONDS:
            self._noted[shard.sha256] = now
            with contextlib.suppress(OSError):  # the cache may be read-only
                os.utime(self.folder / f"{shard.sha256}.lock")

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Lock for one thread of one process at a time. Without `wait`, raises BlockingIOError instead of waiting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                yield
            finally:
                # unlock explicitly, because a process that was forked meanwhile has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    bytes: int  # size of the complete file
    used: float  # time of the last use
    lock: Path


def _download(shard: Shard, part: Path, tries: int) -> None:
    """Download the rest of the shard. After each broken connection, a new one continues."""

    def have() -> int:
        return part.stat().st_size

    def attempt() -> None:
        missing = shard.bytes - have()
        with open_url(shard.location, start=have()) as stream:
            while missing > 0 and (data := read_some(stream)):
                _append(part, data[:missing])
                missing -= len(data)
        if missing > 0:
            raise ConnectionError(f"it ended after {have()} of {shard.bytes} bytes")

    if have() < shard.bytes:
        retry(shard.location, attempt, have, tries)


def _append(part: Path, data: bytes) -> None:
    try:
        with part.open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
    except OSError as error:
        remove_draft(part)  # it would keep the full disk full
        raise storage_error(error, part) from error
