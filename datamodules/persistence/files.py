"""Hashes of inputs, journals, and atomic writes, so that files stay valid if the process is killed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datamodules.persistence.user_error import UserError

REMEMBERED = 16 << 20  # bytes; hashes of larger files (weights) are cached
UNFINISHED = ".unfinished"  # suffix of the name of a partial file


class StorageError(UserError, OSError):
    """A write has failed. The message names the path, the reason and the free space."""


class DamagedFile(UserError, ValueError):
    """A file of the project is no JSON. The message names it, and what happens without it."""


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change whenever one of the JSON-like `parts` changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_sha256(file: Path) -> str:
    """Hash of a file's content.

    The hash of a large file is cached in the process until the file changes, because each step of a pipeline needs it.
    """
    state = file.stat()
    if state.st_size < REMEMBERED:
        return hash_file(file)
    # A copy with timestamps sets the modification time (mtime), but not the change time (ctime).
    return _remembered_sha256(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _remembered_sha256(file: Path, *state: int) -> str:
    """`state` is part of the cache key; it changes if the content may have changed."""
    return hash_file(file)


def hash_file(file: Path) -> str:
    """sha256 of the file's content, read now."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | Path, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path`, where the caller writes a draft (a file or a folder), and rename the draft to `path`.

    So `path` always has the complete old or the complete new content, even if the process is killed. After an
    error the draft is removed, and `path` stays as it was. The folder above `path` must exist.

    Args:
        path: the file or folder to write.
        shared: whether other processes or threads may write `path` at the same time. Then each has a draft name of its
            own. Otherwise the draft is `<path>.unfinished`, and a draft that a killed process left is removed first.
    """
    path = Path(path)
    own_name = f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    draft = path.with_name(own_name if shared else path.name + UNFINISHED)
    remove_draft(draft)
    try:
        yield draft
    except BaseException:
        remove_draft(draft)  # the disk may be full: make room again
        raise
    if draft.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a rename replaces a file, but not a folder that holds files
    os.replace(draft, path)


def write_atomic(path: str | Path, text: str) -> None:
    """Replace `path` by a file with `text`. The file is always completely old or completely new.

    Raises StorageError.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, shared=True) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; {} if the file does not exist. Raises DamagedFile."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}; without it, what it says is done is made again") from error


def append_text(path: str | Path, text: str) -> None:
    """Append `text` completely or not at all; it is on the disk when this returns.

    If writing fails (a full disk, a lost filesystem), the partial text is removed, so that no incomplete line is before
    later lines, and StorageError is raised.
    """
    path = Path(path)
    try:
        # after an error, a buffer would be written again when the file is closed
        with path.open("ab", buffering=0) as file:
            size, rest = file.seek(0, os.SEEK_END), text.encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise storage_error(error, path) from error


def make_folder(folder: Path) -> None:
    """Make a folder; its parent must exist, so that nothing is written to the mount point of a lost filesystem.

    Raises StorageError.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """`atomic_path` for a folder: yields an empty folder, which replaces `folder` at the end."""
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        yield draft


def storage_error(error: Exception, path: str | Path) -> StorageError:
    """The error for a failed write."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    return StorageError(number or 0, f"cannot be written: {reason or error}; {free_space(path)}", str(path))


def user_cache() -> Path:
    """The project's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multi-image-grounding"


def free_space(path: str | Path) -> str:
    """The free space on the filesystem of `path`, in words."""
    try:
        folder = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.is_dir())
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free in {folder}"
    except OSError as error:
        return f"free space unknown: {error}"


def remove_draft(path: Path) -> None:
    """Remove a file or folder to free its space. Does nothing if the filesystem is gone."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Journal:
    """A JSONL file to which results are appended, so that a repeated run reads them instead of computing them again.

    `key` identifies the inputs of the results and is stored in `<path>.key`. A journal with another key is deleted,
    unless it `is_ours`: another check has found that its records belong to these inputs. `records` are the records
    found in the file. An incomplete last line is removed.
    """

    def __init__(self, path: str | Path, key: str, is_ours: bool = False) -> None:
        self.path = Path(path)
        if read_json(_key_file(self.path)) != {"key": key}:
            # removed before the new key is written; otherwise a kill in between would keep old records under the new
            # key
            try:
                if not is_ours:
                    self.path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error, self.path) from error
            write_json(_key_file(self.path), {"key": key})
        self.records, sound = _sound_records(self.path)
        try:
            if self.path.is_file():
                os.truncate(self.path, sound)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def append(self, records: Iterable[Any]) -> None:
        """Write the records as one piece; they are on the disk when this returns."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        append_text(self.path, text)


def read_journal(path: Path, key: str) -> list[Any]:
    """The complete records of a journal that another process may be writing; [] if its key differs."""
    return _sound_records(path)[0] if read_json(_key_file(path)) == {"key": key} else []


def read_sound_lines(path: Path) -> list[Any]:
    """The records of a JSONL file before the first incomplete or damaged line; [] without the file."""
    return _sound_records(path)[0]


def _key_file(path: Path) -> Path:
    return path.with_name(path.name + ".key")


def _sound_records(path: Path) -> tuple[list[Any], int]:
    """The records before the first incomplete or damaged line, and their length in bytes."""
    records: list[Any] = []
    sound = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line))
        except ValueError:
            break
        sound += len(line)
    return records, sound
