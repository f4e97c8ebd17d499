"""Hash the content of a path: a file, a folder of shards, or a model folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datamodules.persistence.files import file_sha256, fingerprint
from datamodules.streaming.manifest import MANIFEST, is_remote, local_path, manifest_bytes
from datamodules.streaming.shard_content import deviations
from datamodules.streaming.shard_sources import is_brace_list, read_shards


def path_fingerprint(path: str | Path) -> str:
    """Hash of the content of a file, a source of shards, a model folder or another folder, such as one of images.

    For any other name (a Hub name), the name is hashed.

    For shards, the manifest is hashed, because it contains the hash of every shard; shards that differ from it are
    added. A remote folder and a local copy of it have the same hash. Of another folder, the names and sizes of all
    files below it are hashed, because reading every image would take too long.

    Raises ValueError and FetchError, as `read_shards` does, if a remote manifest cannot be read.
    """
    if is_brace_list(path):
        entries = [(shard.name, shard.sha256[:16]) for shard in read_shards(path)]
        return fingerprint([*entries, *deviations(path)])
    if is_remote(path):
        content = hashlib.sha256(manifest_bytes(path) or b"").hexdigest()
        return fingerprint([(MANIFEST, content[:16])])
    path, differing = local_path(path), []
    if path.is_file():
        files = [path]
    elif (path / MANIFEST).is_file():
        files, differing = [path / MANIFEST], deviations(path)
    else:
        files = sorted([*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*.jinja")])
        if not files and path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.is_file())
            return fingerprint([(str(file.relative_to(path)), file.stat().st_size) for file in below])
    return fingerprint([*((file.name, file_sha256(file)[:16]) for file in files), *differing] or str(path))
