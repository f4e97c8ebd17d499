"""Read samples from shards by their number, with webdataset's stages.

A shard is opened by webdataset's cache (`remote_cache`). The positions of its members are read once. Then any sample
can be read without reading the samples before it: only its part of the tar is passed to webdataset's tar expansion and
grouping.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import lzma
import os
import tarfile
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import group_by_keys, tar_file_expander

from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.fetch_ahead import FetchAhead, Upcoming
from datamodules.streaming.remote_cache import CacheSettings, ShardCache
from datamodules.streaming.shard_content import PROCESS_BEGAN, State, content_sha256, file_state
from datamodules.streaming.shard_sources import Sources, read_shards, repeated_shard, source_list
from datamodules.streaming.url_openers import FetchError

BLOCK = tarfile.BLOCKSIZE
TRIES_AHEAD = 2  # attempts to download a shard in advance
LONG_UNUSED = 1000  # if a shard was not needed for this number of samples, it may have been removed from a large cache
JSON = -1  # number of the JSON member, in place of an image's number
# Errors of tarfile for a damaged header, or for a name that begins like a compressed file.
DAMAGES = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class Extent(NamedTuple):
    """A member in the tar, with its headers."""

    name: str  # "json", or the number of an image
    start: int
    end: int  # end of its bytes; the tar pads the last block with zeros


class TarIndex:
    """The positions of a tar's members, indexed by the number of their sample in the shard.

    An index needs 32 bytes per member. It must be small, because a buffer of 10,000 samples reads from more than a
    hundred shards at a time, and building an index again means reading all headers of the tar.
    """

    def __init__(self, members: Iterable[tuple[int, Extent]]) -> None:
        # a stable sort keeps the members of a sample in the order of the tar
        rows = sorted(members, key=lambda member: member[0])
        self._samples = array("q", (sample for sample, _ in rows))
        self._images = array("q", (JSON if extent.name == "json" else int(extent.name) for _, extent in rows))
        self._starts = array("q", (extent.start for _, extent in rows))
        self._ends = array("q", (extent.end for _, extent in rows))

    def find(self, sample: int) -> list[Extent]:
        """The members of a sample, in the order of the tar; [] if there are none."""
        rows = range(bisect.bisect_left(self._samples, sample), bisect.bisect_right(self._samples, sample))
        names = ["json" if self._images[row] == JSON else str(self._images[row]) for row in rows]
        return [Extent(name, self._starts[row], self._ends[row]) for name, row in zip(names, rows, strict=True)]


class ShardReader:
    """Reads any sample of several sources of shards by its number, 0 to `count` - 1, in the order of writing.

    If a local shard is missing or differs from its manifest, each of its samples is an error. Its length is checked at
    each reading. Its sha256 is checked at the first reading, and again after the file has changed. If a remote shard
    cannot be downloaded or differs from its manifest, FetchError ends the reading.

    Args:
        sources: `data.shards` (see `shard_sources`); weights are ignored here.
        verify: if False, the sha256 is not checked.
        since: a check by another process is valid too, if it was made at or after this time (`time.time()`). The
            default is the start of this process, so every shard is hashed once per run. 0 accepts any earlier check
            while the file is unchanged.
        cache: settings of the cache for remote shards.
    """

    NUM_INDEXED_SHARDS = 512  # number of indices in memory; the index of a shard with 300 samples has 40 KB

    def __init__(
        self,
        sources: Sources,
        verify: bool = True,
        since: float = PROCESS_BEGAN,
        cache: CacheSettings | None = None,
    ) -> None:
        by_source = [read_shards(source) for source in source_list(sources)]
        self.shards = list(itertools.chain.from_iterable(by_source))
        self.spans = [len(shards) for shards in by_source]
        if fault := repeated_shard(self.shards):
            raise ValueError(fault)
        self.paths = [Path(shard.name if shard.is_remote else shard.location) for shard in self.shards]
        self.starts = [0, *itertools.accumulate(shard.count for shard in self.shards)]
        self.count = self.starts[-1]
        if self.count == 0:
            raise ValueError(f"no samples in shards={[str(source) for source in source_list(sources)]}")
        self.verify, self.since = verify, since
        cache = cache or CacheSettings()
        self.cache = ShardCache(self.shards, cache, since, verify)
        self.most_bytes_ahead = cache.limit // (2 * cache.sharers)  # the rest is for shards that are being read
        self.fingerprint = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]
        self._faults: dict[int, tuple[State, str | None]] = {}  # shard -> (state of the file, its problem or None)
        self._tables: OrderedDict[int, tuple[State, TarIndex]] = OrderedDict()

    @property
    def has_remote(self) -> bool:
        """Whether any shard is remote."""
        return any(shard.is_remote for shard in self.shards)

    def read(self, number: int) -> LoadedSample:
        """The sample of this number with the bytes of its images.

        Raises:
            SampleError: "manifest_mismatch", "unreadable_shard", "corrupt_member", "duplicate_member", "bad_json",
                "missing_image", or a rule of Sample.
            FetchError: a remote shard cannot be downloaded.
        """
        with self._opened(number) as (place, file, extents):
            members = _expand(place, file, extents)
        sample = _parse_sample(place, members)
        names = [str(k) for k in range(len(sample.images))]
        if missing := [int(name) for name in names if name not in members]:
            raise SampleError(sample.id, "missing_image", f"images {missing} are not in the tar")
        return LoadedSample(sample, tuple(members[name] for name in names))

    def find(self, ids: Collection[str]) -> dict[str, int]:
        """Maps the ids in `ids` that exist to the number of their first sample.

        Reads no images, and skips damaged samples.
        """
        found: dict[str, int] = {}
        for number in range(self.count if ids else 0):
            try:
                with self._opened(number) as (place, file, extents):
                    records = [extent for extent in extents if extent.name == "json"]
                    name = _parse_sample(place, _expand(place, file, records)).id
            except SampleError:
                continue  # a damaged sample was not used in training
            if name in ids:
                found.setdefault(name, number)
                if len(found) == len(ids):
                    break
        return found

    def fetching_ahead(self, walks: Iterable[Iterable[tuple[int, int]]]) -> FetchAhead:
        """A context in which remote shards are downloaded in the order in which they are read.

        Args:
            walks: for each epoch, (position, sample number) in the order of reading; positions continue over epochs.
        """
        # Few attempts, because a reader that needs the shard now must wait for them. They are repeated later.
        fetch = partial(self.cache.get_file, tries=TRIES_AHEAD)
        ahead = FetchAhead(fetch, self._upcoming(walks), self.most_bytes_ahead)
        self.cache.needed = ahead.waiting
        return ahead

    def _upcoming(self, walks: Iterable[Iterable[tuple[int, int]]]) -> Iterator[Upcoming]:
        # A small cache removes shards earlier: after reading samples that fill half of the space for shards being read.
        sample_bytes = sum(shard.bytes for shard in self.shards) / self.count
        unused = min(LONG_UNUSED, max(1, int(self.most_bytes_ahead / 2 / sample_bytes)))
        last: dict[int, int] = {}  # shard -> position at which it was last needed
        for place, number in itertools.chain.from_iterable(walks):
            index = bisect.bisect_right(self.starts, number) - 1
            shard = self.shards[index]
            if shard.is_remote and place - last.get(index, -unused) >= unused:
                yield Upcoming(place, shard.location, shard.bytes)
            last[index] = place

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[str, BinaryIO, Sequence[Extent]]]:
        """Returns a name for the sample (its own id may be unreadable), its shard, and the positions of its members.

        A shard may be removed, truncated or replaced during a run. This is an error of each of its samples.
        """
        shard = bisect.bisect_right(self.starts, number) - 1
        index = number - self.starts[shard]
        path = self.paths[shard]
        place = f"{path.name}:{index}"
        try:
            opened = next(self.cache([{"url": self.shards[shard].location}]), None)
            if opened is None:
                raise FetchError(f"{path.name} leaves the cache before it can be read: raise data.cache_gib")
            with opened["stream"] as file:
                state = file_state(os.fstat(file.fileno()))
                if (fault := self._fault(shard, state)) is not None:
                    raise SampleError(place, "manifest_mismatch", fault)
                yield place, file, self._table(shard, state, file).find(index)
        except FileNotFoundError as error:
            fault = f"{path.name} is in the manifest but not in {path.parent}"
            raise SampleError(place, "manifest_mismatch", fault) from error
        except OSError as error:
            raise SampleError(place, "unreadable_shard", f"{path.name}: {error.strerror or error}") from error

    def _fault(self, shard: int, state: State) -> str | None:
        """How a local shard differs from its manifest, or None. The cache checks remote shards."""
        if self.shards[shard].is_remote:
            return None
        known = self._faults.get(shard)
        if known is None or known[0] != state:
            known = self._faults[shard] = state, self._compare(shard, state)
        return known[1]

    def _compare(self, shard: int, state: State) -> str | None:
        path, wanted = self.paths[shard], self.shards[shard]
        if state.size != wanted.bytes:
            return f"{path.name} has {state.size} bytes, the manifest says {wanted.bytes}"
        if self.verify and (actual := content_sha256(path, self.since)) != wanted.sha256:
            return f"{path.name} has the sha256 {actual[:16]}…, the manifest says {wanted.sha256[:16]}…"
        return None

    def _table(self, shard: int, state: State, file: BinaryIO) -> TarIndex:
        # Several threads may read. After each line the tables are valid; in the worst case one is missing and is read
        # again.
        known = self._tables.pop(shard, None)
        if known is None or known[0] != state:
            known = state, TarIndex(_members(file, state.size))
        self._tables[shard] = known  # at the end, as the most recently used
        if len(self._tables) > self.NUM_INDEXED_SHARDS:
            self._tables.popitem(last=False)
        return known[1]


def _members(file: BinaryIO, size: int) -> Iterator[tuple[int, Extent]]:
    """Yields (number of the sample, member) for each intact header whose member is inside the file's `size` bytes."""
    try:
        # With ignore_zeros, tarfile continues after a damaged header, so only that member is lost.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                index, name = key.rpartition("_")[2], extension.partition(".")[0]
                end = member.offset_data + member.size
                if not member.isreg() or not _is_number(index) or end > size:
                    continue
                # "0.jpg" contains image 0. The extension is not used; the decoder checks the bytes.
                if name == "json" or (_is_number(name) and name == str(int(name))):
                    yield int(index), Extent(name, member.offset, end)
    except (tarfile.TarError, OSError):
        return  # samples that are not in the index are counted when they are read


def _is_number(text: str) -> bool:
    """Whether the text is a sample's number in ASCII digits; Python's check also accepts digits of other scripts."""
    return text.isascii() and text.isdecimal() and len(text) <= 12


def _expand(place: str, file: BinaryIO, extents: Sequence[Extent]) -> dict[str, bytes]:
    """The members of one sample, {"0": …, "1": …, "json": …}, by webdataset's tar expansion and grouping."""
    names = [extent.name for extent in extents]
    if twice := [name for name in names if names.count(name) > 1]:  # repeated names are ambiguous
        raise SampleError(place, "duplicate_member", f"the tar holds member {twice[0]!r} of this sample twice")
    part = io.BytesIO(b"".join(_read_extent(place, file, extent) for extent in extents))
    try:
        groups = list(group_by_keys(tar_file_expander([{"url": place, "stream": part}])))
    except DAMAGES as error:
        raise SampleError(place, "corrupt_member", f"{type(error).__name__}: {error!s:.200}") from error
    return {
        name.partition(".")[0]: data for group in groups for name, data in group.items() if not name.startswith("__")
    }


def _read_extent(place: str, file: BinaryIO, extent: Extent) -> bytes:
    """The headers and bytes of a member, including the padding of its last block."""
    file.seek(extent.start)
    data = file.read(extent.end - extent.start)
    if len(data) < extent.end - extent.start:
        fault = f"the shard ends inside member {extent.name!r}: it was cut short"
        raise SampleError(place, "manifest_mismatch", fault)
    return data + bytes(-len(data) % BLOCK)


def _parse_sample(place: str, members: dict[str, bytes]) -> Sample:
    if "json" not in members:
        raise SampleError(place, "corrupt_member", "the tar has no readable header for its .json")
    try:
        record = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError(place, "bad_json", str(error)) from error
    try:
        return Sample.from_json(record)
    except SampleError as error:
        if error.sample_id != "unknown":
            raise
        raise SampleError(place, error.rule, error.detail) from error
