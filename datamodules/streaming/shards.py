"""Shards: WebDataset tars with a manifest, written once and read by sample number.

A sample is `{key}.0.jpg {key}.1.png … {key}.json` in a tar, with key `{shard number}_{number in the shard}`. An image's
own name gives its member a plain extension and nothing else: a tar's names are short, and WebDataset takes all behind
the first dot for the extension.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.persistence.files import file_sha256
from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.manifest import MANIFEST, read_manifest, write_manifest
from datamodules.streaming.shard_content import PROCESS_BEGAN, State, content_sha256, file_state

Extent = tuple[int, int]  # where a member's bytes begin in the tar, and how many there are
Members = dict[int, dict[str, Extent]]  # {number in the shard: {"0": …, "1": …, "json": …}}
DUPLICATE: Extent = (-1, -1)  # of a member that is there twice: nothing says which one is meant
_EXTENSION = re.compile("[a-z0-9]{1,8}")


class ShardFile:
    """One shard: `with ShardFile(folder, number) as shard: shard.add(loaded)`.

    It appears under its name, `shard-{number}.tar`, when the context is left without an error and it holds a sample;
    `entry` is then what the manifest says of it, else None. The same samples give the same bytes.
    """

    def __init__(self, folder: str | Path, number: int) -> None:
        self.path = Path(folder) / f"shard-{number:05d}.tar"
        # With the process's number: a draft that another process left, or still writes, is not touched.
        self.draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self.number = number
        self.tasks: Counter[str] = Counter()
        self.tar: Any = None
        self.entry: dict[str, Any] | None = None

    def __enter__(self) -> ShardFile:
        return self

    def add(self, loaded: LoadedSample) -> None:
        sample = loaded.sample
        if len(loaded.images) != len(sample.images):
            raise ValueError(f"sample {sample.id!r} names {len(sample.images)} images, got {len(loaded.images)}")
        if self.tar is None:
            self.file = self.draft.open("wb")
            self.tar = tarfile.open(fileobj=self.file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        members = {
            f"{index}.{_extension(name)}": data
            for index, (name, data) in enumerate(zip(sample.images, loaded.images, strict=True))
        }
        members["json"] = json.dumps(sample.to_json(), ensure_ascii=False).encode()
        for extension in sorted(members):
            self._add_member(f"{self.number:05d}_{self.tasks.total():06d}.{extension}", members[extension])
        self.tasks[sample.task] += 1

    def _add_member(self, name: str, data: bytes) -> None:
        """As webdataset's TarWriter does, to the byte; importing that would load torch into every writing process."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o444
        info.uname = info.gname = "bigdata"
        self.tar.addfile(info, io.BytesIO(data))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.tar is None:
            return
        self.tar.close()
        self.file.close()
        if kind is not None:
            self.draft.unlink()
            return
        os.replace(self.draft, self.path)
        self.entry = {
            "name": self.path.name,
            "count": self.tasks.total(),
            "bytes": self.path.stat().st_size,
            "sha256": file_sha256(self.path),
            "tasks": dict(sorted(self.tasks.items())),
        }


def _extension(name: str) -> str:
    """ "jpg" of "a.JPG"; "img" of a name without an extension of a few letters and digits."""
    found = os.path.splitext(name)[1].lower().lstrip(".")
    return found if _EXTENSION.fullmatch(found) else "img"


class ShardWriter:
    """Writes samples to `shard-00000.tar` … in `folder`, and on leaving the context the manifest.

    A shard appears under its name when it is complete, the manifest when all are: a folder without one is unfinished.
    The same samples give the same bytes.
    """

    def __init__(self, folder: str | Path, max_samples: int = 1000) -> None:
        self.folder = Path(folder)
        self.max_samples = max_samples
        self.shards: list[dict[str, Any]] = []
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        if (self.folder / MANIFEST).exists():
            raise ValueError(f"{self.folder} already holds finished shards: remove them or choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard = ShardFile(self.folder, 0)

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, loaded: LoadedSample) -> None:
        self.shard.add(loaded)
        if self.shard.tasks.total() == self.max_samples:
            self._finish_shard()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.shard.__exit__(kind, *error)
            return
        self._finish_shard()
        write_manifest(self.folder, self.shards)

    def _finish_shard(self) -> None:
        self.shard.__exit__(None, None, None)
        if self.shard.entry:
            self.shards.append(self.shard.entry)
        self.shard = ShardFile(self.folder, len(self.shards))


def folder_list(folders: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Shard folders as a list, whether one or several were given."""
    return [folders] if isinstance(folders, str | Path) else list(folders)


class ShardReader:
    """Reads any sample of several folders of shards by its number, 0 to `count` - 1, in the order of writing.

    A shard that is missing, or not what its manifest says, is not trusted: each of its samples is an error. Its length
    is compared whenever it is read, its sha256 when it is first read, and again when the file has changed since. With
    `verify` false the sha256 is not compared. A comparison by another process counts too, if it was made at `since`
    (a time.time()) or later: by default, since this process began, so in a run every shard is hashed once. 0 trusts any
    as long as the file has not changed.
    """

    NUM_INDEXED_SHARDS = 64  # member tables kept in memory

    def __init__(
        self, folders: str | Path | Sequence[str | Path], verify: bool = True, since: float = PROCESS_BEGAN
    ) -> None:
        folders = folder_list(folders)
        manifests = [(Path(folder), read_manifest(folder)) for folder in folders]
        shards = [(folder / shard["name"], shard) for folder, manifest in manifests for shard in manifest["shards"]]
        self.paths = [path for path, _ in shards]
        self.starts = [0, *itertools.accumulate(shard["count"] for _, shard in shards)]
        self.count = self.starts[-1]
        if self.count == 0:
            raise ValueError(f"no samples in shards={[str(folder) for folder in folders]}")
        self.verify, self.since = verify, since
        self._wanted = [(shard["bytes"], shard["sha256"]) for _, shard in shards]
        self.fingerprint = hashlib.sha256("".join(digest for _, digest in self._wanted).encode()).hexdigest()[:16]
        self._faults: dict[int, tuple[State, str | None]] = {}  # by shard: of the file in this state
        self._tables: OrderedDict[int, tuple[State, Members]] = OrderedDict()

    def read(self, number: int) -> LoadedSample:
        """Raises SampleError: "manifest_mismatch", "unreadable_shard", "corrupt_member", "duplicate_member",
        "bad_json", "missing_image", or a Sample rule."""
        with self._opened(number) as (place, file, members):
            sample = _read_sample(place, file, members)
            names = [str(k) for k in range(len(sample.images))]
            if missing := [int(name) for name in names if name not in members]:
                raise SampleError(sample.id, "missing_image", f"images {missing} are not in the tar")
            return LoadedSample(sample, tuple(_read_member(place, file, members, name) for name in names))

    def find(self, ids: Collection[str]) -> dict[str, int]:
        """The number of each sample of `ids` that is there: its first, by id. Reads no images; skips bad samples."""
        found: dict[str, int] = {}
        for number in range(self.count if ids else 0):
            try:
                with self._opened(number) as (place, file, members):
                    name = _read_sample(place, file, members).id
            except SampleError:
                continue  # nothing was trained on it
            if name in ids:
                found.setdefault(name, number)
                if len(found) == len(ids):
                    break
        return found

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[str, BinaryIO, Mapping[str, Extent]]]:
        """A name for a sample whose own id cannot be read, its shard, and where the sample's members lie in that.

        A shard may go, be cut short or be replaced at any moment of a run: that is an error of each of its samples.
        """
        shard = bisect.bisect_right(self.starts, number) - 1
        index = number - self.starts[shard]
        path = self.paths[shard]
        place = f"{path.name}:{index}"
        try:
            with path.open("rb") as file:
                state = file_state(os.fstat(file.fileno()))
                if (fault := self._fault(shard, state)) is not None:
                    raise SampleError(place, "manifest_mismatch", fault)
                yield place, file, self._table(shard, state, file).get(index, {})
        except FileNotFoundError as error:
            fault = f"{path.name} is in the manifest but not in {path.parent}"
            raise SampleError(place, "manifest_mismatch", fault) from error
        except OSError as error:
            raise SampleError(place, "unreadable_shard", f"{path.name}: {error.strerror or error}") from error

    def _fault(self, shard: int, state: State) -> str | None:
        """How the shard is not what its manifest says; None where it is."""
        known = self._faults.get(shard)
        if known is None or known[0] != state:
            known = self._faults[shard] = state, self._compare(shard, state)
        return known[1]

    def _compare(self, shard: int, state: State) -> str | None:
        path, (size, digest) = self.paths[shard], self._wanted[shard]
        if state.size != size:
            return f"{path.name} has {state.size} bytes, the manifest says {size}"
        if self.verify and (actual := content_sha256(path, self.since)) != digest:
            return f"{path.name} has the sha256 {actual[:16]}…, the manifest says {digest[:16]}…"
        return None

    def _table(self, shard: int, state: State, file: BinaryIO) -> Members:
        # Several threads may read: each line leaves the tables whole, at worst without one that is then read again.
        known = self._tables.pop(shard, None)
        if known is None or known[0] != state:
            known = state, _member_table(file, state.size)
        self._tables[shard] = known  # as the newest
        if len(self._tables) > self.NUM_INDEXED_SHARDS:
            self._tables.popitem(last=False)
        return known[1]


def _member_table(file: BinaryIO, size: int) -> Members:
    """The members that the tar's undamaged headers name and that lie within the file's `size` bytes."""
    table: Members = {}
    try:
        # ignore_zeros goes on behind a damaged header, at the cost of that one member.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                index, name = key.rpartition("_")[2], extension.partition(".")[0]
                if not member.isreg() or not _is_number(index) or member.offset_data + member.size > size:
                    continue
                # "0.jpg" holds image 0: the extension is for people, decoding looks at the bytes.
                members = table.setdefault(int(index), {})
                members[name] = DUPLICATE if name in members else (member.offset_data, member.size)
    except (tarfile.TarError, OSError):
        pass  # each sample that is not in the table is counted when it is read
    return table


def _is_number(text: str) -> bool:
    """Whether it is a sample's number, as it is written here: Python takes other scripts' digits too."""
    return text.isascii() and text.isdecimal() and len(text) <= 12


def _read_sample(place: str, file: BinaryIO, members: Mapping[str, Extent]) -> Sample:
    if "json" not in members:
        raise SampleError(place, "corrupt_member", "the tar has no readable header for its .json")
    data = _read_member(place, file, members, "json")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(place, "bad_json", str(error)) from error
    try:
        return Sample.from_json(record)
    except SampleError as error:
        if error.sample_id != "unknown":
            raise
        raise SampleError(place, error.rule, error.detail) from error


def _read_member(place: str, file: BinaryIO, members: Mapping[str, Extent], name: str) -> bytes:
    """The bytes of the sample's member: all of them, of the only one of this name."""
    offset, size = members[name]
    if (offset, size) == DUPLICATE:
        raise SampleError(place, "duplicate_member", f"the tar holds member {name!r} of this sample twice")
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise SampleError(place, "manifest_mismatch", f"the shard ends inside member {name!r}: it was cut short")
    return data
