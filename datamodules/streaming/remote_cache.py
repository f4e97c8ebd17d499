"""Remote shards on this machine: fetched once, verified by their manifest's sha256, held within a bound.

The cache is webdataset's stage `FileCache` with another way to get a file. webdataset's own names a file by the last
part of its URL and looks at its first bytes. Here a file is `<sha256>.tar`, so two shards of one name never collide,
and a file of another content is never used. All processes of a machine share the folder:

    <sha256>.tar              a whole shard
    <sha256>.<bytes>.part     one that is being fetched, or that a kill cut; the next attempt goes on behind its end
    <sha256>.lock             held while its shard is fetched; its time is that of the shard's last use
    lock                      held while room is made
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.cache import FileCache

from datamodules.persistence.files import StorageError, hash_file, remove_draft, storage_error
from datamodules.streaming.shard_content import PROCESS_BEGAN, State, content_sha256, file_state, remember
from datamodules.streaming.shard_sources import Shard
from datamodules.streaming.url_openers import TRIES, FetchError, open_url, read_some, retry

log = logging.getLogger(__name__)

USE_SECONDS = 1.0  # a shard's use is noted no more often than this
ROOM_SECONDS = 120.0  # the longest wait for room that other processes take at the moment
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class CacheSettings:
    """Where fetched shards lie, and how much of them.

    Args:
        folder: shared by the processes of a machine; by default ~/.cache/multi-image-grounding/shards.
        gib: the most that it holds, in GiB.
        sharers: processes on this machine that look ahead for shards at the same time; each may fill its part.
    """

    folder: str | None = None
    gib: float = 100.0
    sharers: int = 1

    @property
    def limit(self) -> int:
        """The most bytes."""
        return int(self.gib * 2**30)

    def path(self) -> Path:
        if self.folder:
            return Path(self.folder).expanduser()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "multi-image-grounding" / "shards"


class ShardCache(FileCache):
    """webdataset's stage that opens shards: `for opened in cache([{"url": location}]): opened["stream"]`.

    A path of this machine is opened as it is.

    Args:
        shards: all shards that are read through this cache.
        settings: folder and bound.
        since: a comparison of a cached shard with its sha256 counts if it was made at this time.time() or later.
        verify: False trusts a cached shard of the right length. A shard that is fetched is compared in any case.

    Raises:
        FetchError: a shard is larger than the cache may be.
    """

    def __init__(
        self, shards: list[Shard], settings: CacheSettings, since: float = PROCESS_BEGAN, verify: bool = True
    ) -> None:
        self.folder, self.limit = settings.path(), settings.limit
        super().__init__(str(self.folder), handler=self._is_gone)
        self.since, self.verify = since, verify
        self.shards: Mapping[str, Shard] = {shard.location: shard for shard in shards if shard.is_remote}
        self._known: dict[str, State] = {}  # by sha256: compared, and in this state since
        self._noted: dict[str, float] = {}  # by sha256: when a use was last noted
        self.needed: Callable[[], set[str]] = set  # locations that this process reads soon: they are removed last
        largest = max(self.shards.values(), key=lambda shard: shard.bytes, default=None)
        if largest is not None and largest.bytes > self.limit:
            size = f"{largest.bytes / 2**30:.2f} GiB"
            raise FetchError(f"data.cache_gib={settings.gib:g} is too small for {largest.location}, which has {size}")

    def get_file(self, url: str, tries: int = TRIES) -> str:
        """The path of the whole shard of this location. It is fetched if it is not here yet.

        Args:
            url: location of a shard; a path is returned as it is.
            tries: attempts in a row without progress (`retry`).

        Raises:
            FetchError: the shard cannot be fetched, differs from its manifest, or the cache cannot be written.
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
                        self._noted.pop(shard.sha256, None)  # what is new counts as used now, whatever was before
            except OSError as error:
                reason = error if isinstance(error, StorageError) else storage_error(error, path)
                raise FetchError(
                    f"{url} cannot be kept in the cache: {reason}.\n"
                    "Make room there, or give another folder (data.cache) or bound (data.cache_gib)"
                ) from error
        self._note_use(shard)
        return str(path)

    def _is_gone(self, error: Exception) -> bool:
        """For webdataset's loop: try again where another process has made room just before the file was opened."""
        if isinstance(error, FileNotFoundError) and Path(error.filename or "").parent == self.folder:
            return True
        raise error

    def _is_sound(self, path: Path, shard: Shard) -> bool:
        """Whether the cached file is whole and, unless it is trusted, of the right hash."""
        try:
            state = file_state(path.stat())
            if self._known.get(shard.sha256) == state:
                return True
            is_sound = state.size == shard.bytes
            is_sound = is_sound and (not self.verify or content_sha256(path, self.since) == shard.sha256)
        except OSError:  # usually it is not there; for any other reason, fetching it meets the same error
            return False
        if is_sound:
            self._known[shard.sha256] = state
        else:
            log.warning("%s of %s is damaged: it is fetched again", path, shard.location)
        return is_sound

    def _fetch(self, shard: Shard, path: Path, tries: int) -> None:
        """Download the rest of the shard, compare it, and give it its name."""
        # 1. Room. The name of the draft says how much it will take, so that other processes count it.
        part = path.with_name(f"{shard.sha256}.{shard.bytes}.part")
        path.unlink(missing_ok=True)  # a damaged one
        with self._lock("lock"):
            self._make_room(shard, part)
        # 2. Download, after the part that an earlier process may have left.
        was_there = part.stat().st_size > 0
        began = time.time()
        _download(shard, part, tries)
        # 3. Compare the whole with the manifest.
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
        # 4. The shard appears under its name only now.
        os.replace(part, path)
        remember(path, digest, began)
        self._known[shard.sha256] = file_state(path.stat())
        log.info("fetched %s: %.1f MB in %.1f s", shard.location, shard.bytes / 1e6, time.time() - began)

    def _make_room(self, shard: Shard, part: Path) -> None:
        """Remove shards, those longest unused first, until this one has room; then take the room by its draft."""
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
            with contextlib.suppress(OSError, ValueError):  # another process has removed or renamed it
                if kind == "tar" or kind.endswith(".part"):
                    size = path.stat().st_size if kind == "tar" else int(kind.partition(".")[0])
                    lock = path.with_name(f"{name}.lock")
                    used = (lock if lock.exists() else path).stat().st_mtime
                    found.append(_CachedFile(path, size, used, lock))
        return found

    def _remove(self, file: _CachedFile) -> bool:
        """Remove a shard, or what a kill left of one; not one that is being fetched. Who has it open reads on."""
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
            with contextlib.suppress(OSError):  # a cache that is only read
                os.utime(self.folder / f"{shard.sha256}.lock")

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """One process, and one thread of it, at a time. Raises BlockingIOError instead of waiting without `wait`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    bytes: int  # when it is whole
    used: float  # time of the last use
    lock: Path


def _download(shard: Shard, part: Path, tries: int) -> None:
    """Fetch what is missing of the shard, over as many connections as it takes."""

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
        remove_draft(part)  # which would keep a full disk full
        raise storage_error(error, part) from error
