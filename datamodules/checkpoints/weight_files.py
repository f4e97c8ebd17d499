"""The safetensors files of a model folder: their names, whether they are complete, and their tensors.

Only the headers are read (a few kilobytes per file), with the library that later reads the weights. So a model of any
size is checked in milliseconds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from datamodules.persistence.message_text import listed

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Types of stored weights. Integers, booleans and 8-bit floats are quantised and need scales.
STORED = ("F64", "F32", "F16", "BF16")
# transformers prefers a file of this name: a checkpoint that several processes have written.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header of a file describes it. `dtype` is safetensors' name (F32, BF16, I8, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class BrokenFile(ValueError):
    """A file of a model folder cannot be used. The message names the file, the problem and the fix."""


def pointer_fault(file: Path) -> str | None:
    """The problem of a file that is empty or a Git LFS pointer; None for any other file."""
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return f"{file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    return None if start else f"{file.name} is empty: fetch it again"


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises BrokenFile."""
    if fault := pointer_fault(file):
        raise BrokenFile(fault)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{file.name} is not a JSON object ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{file.name} is not a JSON object but {type(value).__name__}: fetch it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files with the model's tensors: a single file, or the files that the index lists, sorted by name.

    Raises BrokenFile if there are no such files, if the index is damaged, or if a listed file is missing, outside the
    folder, or not safetensors.
    """
    if divided := sorted(file.name for file in folder.iterdir() if _DISTRIBUTED.fullmatch(file.name)):
        raise BrokenFile(f"{divided[0]} is part of a training checkpoint, which would be read instead: remove it")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        only = f" (found only {', '.join(pickled)}: pickled weights are not read, convert them)" if pickled else ""
        raise BrokenFile(f"{WEIGHTS} is missing{only}")
    names = _indexed_names(folder / INDEX)
    for name in names:
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
            raise BrokenFile(f"{INDEX} names {name!r}, which is no file of this folder: fetch the index again")
        if not name.endswith(".safetensors"):
            raise BrokenFile(f"{INDEX} names {name!r}: only .safetensors files are read, convert the weights")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise BrokenFile(f"{', '.join(absent)}, of {len(names)} files that {INDEX} lists, is missing: fetch it")
    return [folder / name for name in names]


def _indexed_names(index: Path) -> list[str]:
    table = json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise BrokenFile(f"{index.name} has no table weight_map from tensors to files: fetch it again")
    return sorted(set(table.values()))


def stored_tensors(file: Path) -> list[StoredTensor]:
    """All tensors of one safetensors file, from its header. Raises BrokenFile if the file is incomplete."""
    from safetensors import SafetensorError, safe_open

    if fault := pointer_fault(file):
        raise BrokenFile(fault)
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118
            return [StoredTensor(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except SafetensorError as error:
        raise BrokenFile(_damage(file, error)) from error


def _damage(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    needed = _whole_size(file)
    if needed is not None and size < needed:
        return f"{file.name} has {size:,} of {needed:,} bytes, its download or copy was cut short: fetch it again"
    return f"{file.name} is not a whole safetensors file ({error}): fetch it again"


def _whole_size(file: Path) -> int | None:
    """The number of bytes that the file must have according to its header; None if the header cannot be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return 8 + length if length < 1 << 27 else None
        try:
            entries = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None
    return 8 + length + max((end for end in ends if isinstance(end, int)), default=0)


def weight_faults(folder: Path, quantised: bool = False) -> list[str]:
    """Problems of a folder's weight files that their headers show.

    `quantised`: whether the model's configuration says that its weights are quantised.
    """
    try:
        files = weight_files(folder)
    except BrokenFile as error:
        return [str(error)]
    faults, home = [], {}
    for file in files:
        try:
            tensors = stored_tensors(file)
        except BrokenFile as error:
            faults.append(str(error))
            continue
        for tensor in tensors:
            if tensor.name in home:
                faults.append(f"{tensor.name} is in both {home[tensor.name]} and {file.name}: fetch them again")
            home[tensor.name] = file.name
        codes = [f"{t.name} ({t.dtype})" for t in tensors if t.dtype not in STORED and _is_weight(t.name)]
        if codes and not quantised:
            faults.append(f"{file.name} stores {listed(codes)} in a type that no weight has: fetch plain weights")
    return faults


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))
