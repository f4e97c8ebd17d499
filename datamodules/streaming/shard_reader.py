"""Shards read by sample number, through webdataset's stages.

A shard is opened by webdataset's cache (`remote_cache`). Where its members lie in it is read once, so any sample can be
read without those before it: its part of the tar goes through webdataset's tar expansion and grouping, as the whole tar
would.
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
from datamodules.streaming.shard_sources import Sources, read_shards, source_list
from datamodules.streaming.url_openers import FetchError

BLOCK = tarfile.BLOCKSIZE
TRIES_AHEAD = 2  # attempts to fetch a shard that nobody waits for yet
LONG_UNUSED = 1000  # samples between two needs of a shard, after which it may have left a large cache
JSON = -1  # in the place of an image's number
# What tarfile raises for a header that is none, or for a name that begins as a compressed file does.
DAMAGES = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class Extent(NamedTuple):
    """A member in the tar, with its headers."""

    name: str  # "json", or the number of an image
    start: int
    end: int  # of its bytes; the tar fills its last block up with zeros


class TarIndex:
    """Where the members of a tar lie, by the number of their sample in the shard.

    32 bytes a member: drawing from a buffer of 10,000 samples reads from a hundred and more shards at a time, and a tar
    whose index was dropped is read anew, header by header.
    """

    def __init__(self, members: Iterable[tuple[int, Extent]]) -> None:
        rows = sorted(members, key=lambda member: member[0])  # stable: those of a sample in the order of the tar
        self._samples = array("q", (sample for sample, _ in rows))
        self._images = array("q", (JSON if extent.name == "json" else int(extent.name) for _, extent in rows))
        self._starts = array("q", (extent.start for _, extent in rows))
        self._ends = array("q", (extent.end for _, extent in rows))

    def find(self, sample: int) -> list[Extent]:
        """The members of a sample, in the order of the tar; [] where there are none."""
        rows = range(bisect.bisect_left(self._samples, sample), bisect.bisect_right(self._samples, sample))
        names = ["json" if self._images[row] == JSON else str(self._images[row]) for row in rows]
        return [Extent(name, self._starts[row], self._ends[row]) for name, row in zip(names, rows, strict=True)]


class ShardReader:
    """Reads any sample of several sources of shards by its number, 0 to `count` - 1, in the order of writing.

    A shard of this machine that is missing, or not what its manifest says, is not trusted: each of its samples is an
    error. Its length is compared whenever it is read, its sha256 when it is first read, and again when the file has
    changed since. A remote shard that cannot be fetched or is not what its manifest says ends the reading (FetchError).

    Args:
        sources: `data.shards` (`shard_sources`); weights are without meaning here.
        verify: False leaves the comparison of the sha256 out.
        since: a comparison by another process counts too, if it was made at this time.time() or later. By default
            since this process began, so in a run every shard is hashed once; 0 trusts any while the file is the same.
        cache: where remote shards are kept.
    """

    NUM_INDEXED_SHARDS = 512  # indices kept in memory: 40 KB for a shard of 300 samples

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
        self.paths = [Path(shard.name if shard.is_remote else shard.location) for shard in self.shards]
        self.starts = [0, *itertools.accumulate(shard.count for shard in self.shards)]
        self.count = self.starts[-1]
        if self.count == 0:
            raise ValueError(f"no samples in shards={[str(source) for source in source_list(sources)]}")
        self.verify, self.since = verify, since
        cache = cache or CacheSettings()
        self.cache = ShardCache(self.shards, cache, since, verify)
        self.most_bytes_ahead = cache.limit // (2 * cache.sharers)  # the rest is for those that are being read
        self.fingerprint = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]
        self._faults: dict[int, tuple[State, str | None]] = {}  # by shard: of the file in this state
        self._tables: OrderedDict[int, tuple[State, TarIndex]] = OrderedDict()

    @property
    def has_remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(shard.is_remote for shard in self.shards)

    def read(self, number: int) -> LoadedSample:
        """The sample of this number with the bytes of its images.

        Raises:
            SampleError: "manifest_mismatch", "unreadable_shard", "corrupt_member", "duplicate_member", "bad_json",
                "missing_image", or a rule of Sample.
            FetchError: a remote shard cannot be fetched.
        """
        with self._opened(number) as (place, file, extents):
            members = _expand(place, file, extents)
        sample = _parse_sample(place, members)
        names = [str(k) for k in range(len(sample.images))]
        if missing := [int(name) for name in names if name not in members]:
            raise SampleError(sample.id, "missing_image", f"images {missing} are not in the tar")
        return LoadedSample(sample, tuple(members[name] for name in names))

    def find(self, ids: Collection[str]) -> dict[str, int]:
        """The number of each sample of `ids` that is there: its first, by id. Reads no images; skips bad samples."""
        found: dict[str, int] = {}
        for number in range(self.count if ids else 0):
            try:
                with self._opened(number) as (place, file, extents):
                    records = [extent for extent in extents if extent.name == "json"]
                    name = _parse_sample(place, _expand(place, file, records)).id
            except SampleError:
                continue  # nothing was trained on it
            if name in ids:
                found.setdefault(name, number)
                if len(found) == len(ids):
                    break
        return found

    def fetching_ahead(self, walks: Iterable[Iterable[tuple[int, int]]]) -> FetchAhead:
        """Fetches remote shards in the order in which they are read, as a context.

        Args:
            walks: of each epoch, (place, sample number) in the order of reading; places go on over the epochs.
        """
        # It gives up soon, and tries again later: whoever needs the shard now waits behind it.
        fetch = partial(self.cache.get_file, tries=TRIES_AHEAD)
        ahead = FetchAhead(fetch, self._upcoming(walks), self.most_bytes_ahead)
        self.cache.needed = ahead.waiting
        return ahead

    def _upcoming(self, walks: Iterable[Iterable[tuple[int, int]]]) -> Iterator[Upcoming]:
        # A small cache loses a shard sooner: while samples are read that fill half of the part for shards being read.
        sample_bytes = sum(shard.bytes for shard in self.shards) / self.count
        unused = min(LONG_UNUSED, max(1, int(self.most_bytes_ahead / 2 / sample_bytes)))
        last: dict[int, int] = {}  # by shard: the place at which it was last needed
        for place, number in itertools.chain.from_iterable(walks):
            index = bisect.bisect_right(self.starts, number) - 1
            shard = self.shards[index]
            if shard.is_remote and place - last.get(index, -unused) >= unused:
                yield Upcoming(place, shard.location, shard.bytes)
            last[index] = place

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[str, BinaryIO, Sequence[Extent]]]:
        """A name for a sample whose own id cannot be read, its shard, and where the sample's members lie in that.

        A shard may go, be cut short or be replaced at any moment of a run: that is an error of each of its samples.
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
        """How a shard of this machine is not what its manifest says, or None. The cache compares the others."""
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
        # Several threads may read: each line leaves the tables whole, at worst without one that is then read again.
        known = self._tables.pop(shard, None)
        if known is None or known[0] != state:
            known = state, TarIndex(_members(file, state.size))
        self._tables[shard] = known  # as the newest
        if len(self._tables) > self.NUM_INDEXED_SHARDS:
            self._tables.popitem(last=False)
        return known[1]


def _members(file: BinaryIO, size: int) -> Iterator[tuple[int, Extent]]:
    """(number of the sample, member) of each undamaged header whose member lies within the file's `size` bytes."""
    try:
        # ignore_zeros goes on behind a damaged header, at the cost of that one member.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                index, name = key.rpartition("_")[2], extension.partition(".")[0]
                end = member.offset_data + member.size
                if not member.isreg() or not _is_number(index) or end > size:
                    continue
                # "0.jpg" holds image 0: the extension is for people, decoding looks at the bytes.
                if name == "json" or (_is_number(name) and name == str(int(name))):
                    yield int(index), Extent(name, member.offset, end)
    except (tarfile.TarError, OSError):
        return  # each sample that is not in the index is counted when it is read


def _is_number(text: str) -> bool:
    """Whether it is a sample's number, as it is written here: Python takes other scripts' digits too."""
    return text.isascii() and text.isdecimal() and len(text) <= 12


def _expand(place: str, file: BinaryIO, extents: Sequence[Extent]) -> dict[str, bytes]:
    """The members of one sample, {"0": …, "1": …, "json": …}, by webdataset's tar expansion and grouping."""
    names = [extent.name for extent in extents]
    if twice := [name for name in names if names.count(name) > 1]:  # nothing says which one is meant
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
    """Headers and bytes of a member, up to the end of its last block."""
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
