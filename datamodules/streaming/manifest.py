"""The manifest of a folder of shards: its tars, and their content.

    {"version": 1, "count": 2000, "shards": [
        {"name": "shard-00000.tar", "count": 1000, "bytes": 219340800, "sha256": "9f…", "tasks": {"diff": 1000}}, …]}

Anybody may have written or damaged the file: every field is checked before any is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from datamodules.persistence.files import write_atomic
from datamodules.persistence.strict_json import refuse_constant, unique_keys

MANIFEST = "manifest.json"
VERSION = 1
MOST = 2**53  # of any count or size: no shard is larger, and every JSON reader holds such a number exactly
CURE = "Write these shards again, or copy the whole folder again from where it is sound"

_SHA256 = re.compile("[0-9a-f]{64}")


def write_manifest(folder: str | Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Declare the folder's shards finished. An entry is a `ShardFile.entry`; its name may lead into a subfolder."""
    manifest = {"version": VERSION, "count": sum(shard["count"] for shard in shards), "shards": list(shards)}
    write_atomic(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """{"version", "count", "shards": [{"name", "count", "bytes", "sha256", "tasks": {task: count}}]}.

    Raises ValueError, which names the file, the place in it, the value and the cure, if the folder has no manifest or a
    manifest that cannot be right.
    """
    path = Path(folder) / MANIFEST
    try:
        is_there = path.is_file()
        manifest = _parse(path.read_bytes()) if is_there else None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a manifest: {_reason(error)}. {CURE}") from error
    if not is_there:
        raise ValueError(f"no {MANIFEST} in {folder}: not a folder of shards, or one whose writing was interrupted")
    _Check(path).manifest(manifest)
    return manifest


def name_fault(name: object) -> str | None:
    """Why a shard may not have this name; None for the name of a file in the manifest's folder or below it."""
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


def _parse(data: bytes) -> Any:
    """Strict JSON: neither NaN nor Infinity, and no key twice in an object, of which a reader would take the last."""
    return json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deep"
    return getattr(error, "strerror", None) or f"{error!s:.200}"


class _Check:
    """Checks one manifest; every failure is a ValueError that names the file and the place."""

    def __init__(self, path: Path) -> None:
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
    """A short repr on one line; Python refuses to print integers of more than 4,300 digits, or nested without end."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        return f"an unprintable {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
