"""The manifest of a folder of shards: the list of its tar files, and their content.

    {"version": 1, "count": 2000, "shards": [
        {"name": "shard-00000.tar", "count": 1000, "bytes": 219340800, "sha256": "9f…", "tasks": {"diff": 1000}}, …]}

The file may be damaged or come from an untrusted source, so every field is checked before it is used. Names must be
relative file names; they cannot lead out of the manifest's folder, to another host, or to a command.
"""

from __future__ import annotations

import functools
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from datamodules.persistence.files import write_atomic
from datamodules.persistence.strict_json import parse_strictly
from datamodules.streaming.url_openers import Refused, open_url, read_some, retry, scheme_of

MANIFEST = "manifest.json"
VERSION = 1
MOST = 2**53  # largest count or size; every JSON parser represents it exactly
LARGEST = 1 << 28  # largest size of a downloaded manifest in bytes, enough for half a million shards
TRIES = 3  # attempts to download a manifest; few, because the user is waiting
CURE = "Write these shards again, or copy the whole folder again from where it is sound"

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_SHA256 = re.compile("[0-9a-f]{64}")


def write_manifest(folder: str | Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Write the manifest of a finished folder. An entry is a `ShardFile.entry`; its name may include a subfolder."""
    manifest = {"version": VERSION, "count": sum(shard["count"] for shard in shards), "shards": list(shards)}
    write_atomic(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked manifest of a folder, or of a URL that stands for a folder (`in_folder`).

    {"version", "count", "shards": [{"name", "count", "bytes", "sha256", "tasks": {task: count}}]}

    Raises:
        ValueError: there is no manifest, or it is invalid. The message names the file, the field, the value and the
            fix.
        FetchError: the manifest cannot be downloaded.
    """
    path = in_folder(folder, MANIFEST)
    try:
        data = manifest_bytes(folder)
        manifest = None if data is None else parse_strictly(data.decode())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a manifest: {_reason(error)}. {CURE}") from error
    if data is None:
        raise ValueError(f"no {MANIFEST} in {folder}: not a folder of shards, or one whose writing was interrupted")
    _Check(path).manifest(manifest)
    return manifest


def manifest_bytes(folder: str | Path) -> bytes | None:
    """The unchecked manifest; None if there is no such file."""
    if is_remote(folder):
        return _fetched(in_folder(folder, MANIFEST))
    path = Path(in_folder(folder, MANIFEST))
    return path.read_bytes() if path.is_file() else None


@functools.lru_cache(maxsize=64)
def _fetched(url: str) -> bytes:
    """Download a manifest. It is cached, so all readers of a process get the same one."""

    def attempt() -> bytes:
        parts, size = [], 0
        with open_url(url) as stream:
            while data := read_some(stream):
                parts.append(data)
                size += len(data)
                if size > LARGEST:
                    raise Refused(f"it is longer than {LARGEST} bytes")
        return b"".join(parts)

    return retry(url, attempt, tries=TRIES)


def is_remote(location: str | Path) -> bool:
    """Whether it is a URL or a command, and not a local path."""
    return isinstance(location, str) and scheme_of(location) not in (None, "file")


def in_folder(folder: str | Path, name: str) -> str:
    """The location of a file in a folder: a path, a URL, or a command in which {} is replaced by the name."""
    folder = str(folder)
    scheme = scheme_of(folder)
    if scheme == "pipe":
        # The name comes from a manifest, which may be untrusted, and is passed to a shell.
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(f"{_brief(name)} cannot be fetched by a command: a shell may read it as more than a name")
        return folder.replace("{}", name)
    if scheme in ("http", "https"):
        return f"{folder.rstrip('/')}/{urllib.parse.quote(name)}"
    if scheme is not None and scheme != "file":
        return f"{folder.rstrip('/')}/{name}"
    return str(local_path(folder) / name)


def local_path(location: str | Path) -> Path:
    """The path in file:///…, or the path itself."""
    text = str(location)
    is_url = scheme_of(text) == "file"
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(text).path) if is_url else text)


def name_fault(name: object) -> str | None:
    """The reason why a shard must not have this name; None for a file in or below the manifest's folder."""
    if not isinstance(name, str):
        return "is no text"
    parts = name.split("/")
    try:
        too_long = len(name) > 1024 or any(len(part.encode()) > 255 for part in parts)
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    if too_long:
        return "is longer than a file's name can be"
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00-\x1f:]", name):
        return "is no plain name of a file in the manifest's folder or below it"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deep"
    return getattr(error, "strerror", None) or f"{error!s:.200}"


class _Check:
    """Checks one manifest; every error is a ValueError that names the file and the field."""

    def __init__(self, path: str) -> None:
        self.path = path

    def manifest(self, value: Any) -> None:
        self.require(isinstance(value, dict), "the whole", value, "an object")
        for field in ("version", "count", "shards"):
            self.require(field in value, field, None, "there")
        self.require(value["version"] == VERSION and _is_count(value["version"]), "version", value["version"], VERSION)
        self.count(value["count"], "count")
        self.require(isinstance(value["shards"], list), "shards", value["shards"], "a list")
        seen: dict[str, int] = {}
        for index, shard in enumerate(value["shards"]):
            self.shard(shard, f"shards[{index}]")
            first = seen.setdefault(shard["name"], index)
            if first != index:
                self.fail(f"shards[{index}].name={_brief(shard['name'])} is that of shards[{first}] too")
        held = sum(shard["count"] for shard in value["shards"])
        if held != value["count"]:
            self.fail(f"count={value['count']}, but its shards hold {held}")

    def shard(self, value: Any, where: str) -> None:
        self.require(isinstance(value, dict), where, value, "an object")
        for field in ("name", "count", "bytes", "sha256", "tasks"):
            self.require(field in value, f"{where}.{field}", None, "there")
        if fault := name_fault(value["name"]):
            self.fail(f"{where}.name={_brief(value['name'])} {fault}")
        self.count(value["count"], f"{where}.count")
        self.count(value["bytes"], f"{where}.bytes")
        is_hash = isinstance(value["sha256"], str) and _SHA256.fullmatch(value["sha256"]) is not None
        self.require(is_hash, f"{where}.sha256", value["sha256"], "a hash of 64 hexadecimal digits")
        self.require(isinstance(value["tasks"], dict), f"{where}.tasks", value["tasks"], "an object")
        for task, count in value["tasks"].items():
            self.count(count, f"{where}.tasks[{_brief(task)}]")
        if sum(value["tasks"].values()) != value["count"]:
            self.fail(f"{where}: count={value['count']}, but its tasks hold {sum(value['tasks'].values())}")

    def count(self, value: Any, where: str) -> None:
        self.require(_is_count(value), where, value, f"a whole number from 0 to {MOST}")

    def require(self, is_so: bool, where: str, value: Any, wanted: object) -> None:
        if not is_so:
            self.fail(f"{where} is {'absent' if value is None else _brief(value)}, not {wanted}")

    def fail(self, fault: str) -> NoReturn:
        raise ValueError(f"{self.path} is inconsistent: {fault}. {CURE}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _brief(value: Any) -> str:
    """A short repr on one line; Python refuses to print integers of more than 4,300 digits, or very deep nesting."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        return f"an unprintable {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
