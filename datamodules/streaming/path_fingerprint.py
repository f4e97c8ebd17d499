"""A hash of what lies at a path: files, a shard folder, or a model folder, by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datamodules.persistence.files import file_sha256, fingerprint
from datamodules.streaming.manifest import MANIFEST, is_remote, local_path, manifest_bytes
from datamodules.streaming.shard_content import deviations
from datamodules.streaming.shard_sources import is_brace_list, read_shards


def path_fingerprint(path: str | Path) -> str:
    """Hash of a file, a source of shards or a model folder by content, of anything else (a Hub name) by name.

    For shards the manifest is hashed, which holds every shard's hash, and those that differ from it. A remote folder
    has the hash of a copy of it on this machine.

    Raises ValueError and FetchError, as `read_shards`, where a remote manifest cannot be read.
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
    return fingerprint([*((file.name, file_sha256(file)[:16]) for file in files), *differing] or str(path))
