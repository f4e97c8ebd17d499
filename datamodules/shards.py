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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.artefacts import file_sha256, write_atomic
from datamodules.samples import LoadedSample, Sample, SampleError

MANIFEST = "manifest.json"
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
    """ "jpg" of "a.JPG"; "img" of a name without any, or with one that is more than a few letters and digits."""
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


def write_manifest(folder: str | Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Declare the folder's shards finished. An entry is a `ShardFile.entry`; its name may lead into a subfolder."""
    manifest = {"version": 1, "count": sum(shard["count"] for shard in shards), "shards": list(shards)}
    write_atomic(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """{"version", "count", "shards": [{"name", "count", "bytes", "sha256", "tasks": {task: count}}]}.

    Raises ValueError if the folder has none, or one that cannot be right.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"no {MANIFEST} in {folder}: not a folder of shards, or one whose writing was interrupted")
    try:
        manifest = json.loads(path.read_text())
        counted = sum(shard["count"] for shard in manifest["shards"])
        complete = all({"name", "bytes", "sha256", "tasks"} <= shard.keys() for shard in manifest["shards"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest: {error!r}") from error
    if not complete or counted != manifest.get("count"):
        raise ValueError(f"{path} is inconsistent: count={manifest.get('count')}, its shards hold {counted}")
    return manifest


def folder_list(folders: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Shard folders as a list, whether one or several were given."""
    return [folders] if isinstance(folders, str | Path) else list(folders)


class ShardReader:
    """Reads any sample of several folders of shards by its number, 0 to `count` - 1, in the order of writing.

    A shard that is missing or not as long as its manifest says is not trusted: each of its samples is an error.
    """

    NUM_INDEXED_SHARDS = 64  # member tables kept in memory

    def __init__(self, folders: str | Path | Sequence[str | Path]) -> None:
        folders = folder_list(folders)
        manifests = [(Path(folder), read_manifest(folder)) for folder in folders]
        shards = [(folder / shard["name"], shard) for folder, manifest in manifests for shard in manifest["shards"]]
        self.paths = [path for path, _ in shards]
        self.starts = [0, *itertools.accumulate(shard["count"] for _, shard in shards)]
        self.count = self.starts[-1]
        if self.count == 0:
            raise ValueError(f"no samples in shards={[str(folder) for folder in folders]}")
        self.faults = [_size_fault(path, shard["bytes"]) for path, shard in shards]
        digests = "".join(shard["sha256"] for _, shard in shards)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()[:16]
        self._tables: OrderedDict[int, dict[int, dict[str, tuple[int, int]]]] = OrderedDict()

    def read(self, number: int) -> LoadedSample:
        """Raises SampleError: "manifest_mismatch", "corrupt_member", "bad_json", "missing_image", or a Sample rule."""
        sample, path, members = self._read(number)
        # "0.jpg" holds image 0: the extension is for people, decoding looks at the bytes.
        found = {name.split(".")[0]: extent for name, extent in members.items()}
        missing = [k for k in range(len(sample.images)) if str(k) not in found]
        if missing:
            raise SampleError(sample.id, "missing_image", f"images {missing} are not in the tar")
        with path.open("rb") as file:
            return LoadedSample(sample, tuple(_read_at(file, found[str(k)]) for k in range(len(sample.images))))

    def find(self, ids: Collection[str]) -> dict[str, int]:
        """The number of each sample of `ids` that is there: its first, by id. Reads no images; skips bad samples."""
        found: dict[str, int] = {}
        for number in range(self.count if ids else 0):
            try:
                name = self._read(number)[0].id
            except SampleError:
                continue  # nothing was trained on it
            if name in ids:
                found.setdefault(name, number)
                if len(found) == len(ids):
                    break
        return found

    def _read(self, number: int) -> tuple[Sample, Path, dict[str, tuple[int, int]]]:
        """A sample without its images, its shard, and where its members lie in that."""
        shard = bisect.bisect_right(self.starts, number) - 1
        index = number - self.starts[shard]
        place = f"{self.paths[shard].name}:{index}"  # the name of a sample whose own id cannot be read
        if (fault := self.faults[shard]) is not None:
            raise SampleError(place, "manifest_mismatch", fault)
        members = self._table(shard).get(index, {})
        if "json" not in members:
            raise SampleError(place, "corrupt_member", "the tar has no readable header for its .json")
        with self.paths[shard].open("rb") as file:
            return _parse_sample(place, _read_at(file, members["json"])), self.paths[shard], members

    def _table(self, shard: int) -> dict[int, dict[str, tuple[int, int]]]:
        # Several threads may read: each line leaves the tables whole, at worst without one that is then read again.
        table = self._tables.pop(shard, None)
        if table is None:
            table = _member_table(self.paths[shard])
        self._tables[shard] = table  # as the newest
        if len(self._tables) > self.NUM_INDEXED_SHARDS:
            self._tables.popitem(last=False)
        return table


def _member_table(path: Path) -> dict[int, dict[str, tuple[int, int]]]:
    """{number in the shard: {"0.jpg": (offset, size), …, "json": …}} of what the tar's sound headers name."""
    table: dict[int, dict[str, tuple[int, int]]] = {}
    try:
        # ignore_zeros goes on behind a damaged header, at the cost of that one member.
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                index = key.rpartition("_")[2]
                if member.isreg() and index.isdecimal():
                    table.setdefault(int(index), {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError):
        pass  # each sample that is not in the table is counted when it is read
    return table


def _parse_sample(place: str, data: bytes) -> Sample:
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


def _read_at(file: Any, extent: tuple[int, int]) -> bytes:
    file.seek(extent[0])
    return file.read(extent[1])


def _size_fault(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is in the manifest but not in {path.parent}"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, the manifest says {size}"
    return None
