"""Write shards with webdataset: tar files and a manifest. Each file is complete or absent.

A sample is `{key}.0.jpg {key}.1.png … {key}.json` in a tar, with key `{shard number}_{number in the shard}`. Only a
plain extension is taken from the image's own name, because names in a tar must be short, and WebDataset treats
everything after the first dot as the extension.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from datamodules.persistence.files import file_sha256
from datamodules.samples.sample import LoadedSample
from datamodules.streaming.manifest import MANIFEST, write_manifest

_EXTENSION = re.compile("[a-z0-9]{1,8}")


class ShardFile:
    """One shard: `with ShardFile(folder, number) as shard: shard.add(loaded)`.

    If the context ends without an error and there is at least one sample, the file gets its final name
    `shard-{number}.tar`, and `entry` is its entry in the manifest. Otherwise `entry` is None. The same samples give the
    same bytes.
    """

    def __init__(self, folder: str | Path, number: int) -> None:
        self.path = Path(folder) / f"shard-{number:05d}.tar"
        # The name contains the process id, so that the partial file of another process is not touched.
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
            from webdataset import TarWriter  # imports torch, which commands that write nothing do not need

            self.file = self.draft.open("wb")
            # no times, so that the same samples give the same bytes
            self.tar = TarWriter(self.file, encoder=False, mtime=0)
        members = {
            f"{index}.{_extension(name)}": data
            for index, (name, data) in enumerate(zip(sample.images, loaded.images, strict=True))
        }
        members["json"] = json.dumps(sample.to_json(), ensure_ascii=False).encode()
        self.tar.write({"__key__": f"{self.number:05d}_{self.tasks.total():06d}"} | members)
        self.tasks[sample.task] += 1

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
    """Writes samples to `shard-00000.tar` … in `folder`, and the manifest at the end of the context.

    A shard gets its final name when it is complete. The manifest is written last, so a folder without it is unfinished.
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
