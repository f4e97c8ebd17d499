"""A hash of what lies at a path: files, a shard folder, or a model folder, by content."""

from __future__ import annotations

from pathlib import Path

from datamodules.persistence.files import file_sha256, fingerprint
from datamodules.streaming.shard_content import deviations


def path_fingerprint(path: str | Path) -> str:
    """Hash of a file, a shard folder or a model folder by content, of anything else (a Hub name) by name.

    For a shard folder the manifest is hashed, which holds every shard's hash, and the shards that differ from it.
    """
    path, differing = Path(path), []
    if path.is_file():
        files = [path]
    elif (path / "manifest.json").is_file():
        files, differing = [path / "manifest.json"], deviations(path)
    else:
        files = sorted([*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*.jinja")])
    return fingerprint([*((file.name, file_sha256(file)[:16]) for file in files), *differing] or str(path))
