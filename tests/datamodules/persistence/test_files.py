"""Journals and hashes: what they keep, and what they refuse."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datamodules.persistence import files
from datamodules.persistence.files import (
    DamagedFile,
    Journal,
    StorageError,
    atomic_path,
    fingerprint,
    read_journal,
    read_json,
    whole_folder,
    write_atomic,
    write_json,
)
from datamodules.persistence.user_error import UserError
from datamodules.streaming.path_fingerprint import path_fingerprint
from tests.conftest import SmallDisk


def test_a_journal_is_read_again_with_the_same_key_only(tmp_path: Path) -> None:
    path = tmp_path / "deep/journal.jsonl"
    Journal(path, "a").append([{"n": 1}, {"n": 2}])
    Journal(path, "a").append([{"n": 3}])
    assert Journal(path, "a").records == read_journal(path, "a") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert read_journal(path, "b") == []
    assert Journal(path, "b").records == []
    assert not path.exists()


def test_a_line_cut_short_by_a_kill_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "a").append([{"n": 1}])
    with path.open("a") as file:
        file.write('{"n": 2')
    assert read_journal(path, "a") == [{"n": 1}]
    journal = Journal(path, "a")
    journal.append([{"n": 3}])
    assert Journal(path, "a").records == [{"n": 1}, {"n": 3}]


def test_hashes_follow_content(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    before = path_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"2")
    assert path_fingerprint(folder) != before
    assert path_fingerprint("owner/name") != path_fingerprint("owner/other")
    write_json(folder / "manifest.json", {"shards": []})
    known = path_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"3")
    assert path_fingerprint(folder) == known


def test_a_full_disk_cuts_no_line_of_a_journal(small_disk: SmallDisk) -> None:
    path = small_disk.root / "journal.jsonl"
    journal = Journal(path, "key")
    journal.append([{"n": 0}])
    small_disk.fill()
    with pytest.raises(OSError, match=r"No space left.*0\.0 MiB free") as caught:
        journal.append([{"n": 1, "text": "x" * 20_000}])
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert read_journal(path, "key") == [{"n": 0}]
    small_disk.make_room()
    journal.append([{"n": 2}])
    assert read_journal(path, "key") == [{"n": 0}, {"n": 2}], "the same journal goes on"


def test_a_full_disk_leaves_the_old_file_and_no_draft(small_disk: SmallDisk) -> None:
    path = small_disk.root / "done.json"
    write_json(path, {"old": True})
    small_disk.fill()
    with pytest.raises(OSError, match="No space left"):
        write_json(path, ["new"] * 20_000)
    assert read_json(path) == {"old": True}
    assert {file.name for file in small_disk.root.iterdir()} == {"done.json", "ballast"}


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with whole_folder(tmp_path / "model") as draft:
            (draft / name).write_text(name)
            if name == "bad":
                raise RuntimeError("killed")

    write("first")
    with pytest.raises(RuntimeError, match="killed"):
        write("bad")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]
    write("second")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "second"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_draft_replaces_the_old_content_or_goes(tmp_path: Path, shared: bool, content: str) -> None:
    def write(text: str, error: type[BaseException] | None = None) -> None:
        with atomic_path(tmp_path / "model", shared) as draft:
            assert draft.parent == tmp_path, "a rename between two filesystems would be a copy"
            if content == "folder":
                draft.mkdir()
            (draft / text if content == "folder" else draft).write_text(text)
            if error is not None:
                raise error

    write("first")
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            write("bad", error)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write("second")
    (written,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written.read_text() == "second"


def test_a_kill_leaves_the_old_content_and_the_next_writer_removes_the_draft(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    if (child := os.fork()) == 0:
        with atomic_path(path) as draft:
            draft.mkdir()
            (draft / "half").write_text("new")
            os._exit(9)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.glob("*.unfinished/*")] == ["half"]
    with atomic_path(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["model"]


def test_writers_that_share_a_path_have_drafts_of_their_own(tmp_path: Path) -> None:
    path, both = tmp_path / "feature", threading.Barrier(2)

    def write(text: str) -> None:
        with atomic_path(path, shared=True) as draft:
            draft.write_text(text)
            both.wait()
            assert draft.read_text() == text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, ["a", "b"])) == [None, None]
    assert path.read_text() in "ab" and [file.name for file in tmp_path.iterdir()] == ["feature"]


@pytest.mark.parametrize("damage", [b"", b'{"key": "a', b"\xff\xfe\x00"])
def test_a_damaged_marker_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "done.json").write_bytes(damage)
    with pytest.raises(DamagedFile, match=r"done\.json is damaged"):
        read_json(tmp_path / "done.json")
    assert issubclass(DamagedFile, UserError), "a command prints it without a traceback"


def test_a_folder_that_cannot_be_made_is_told_as_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written.*taken/folder/result\.json"):
        write_json(tmp_path / "taken/folder/result.json", {})
    Journal(tmp_path / "journal.jsonl", "a").append([1])

    def refuse(path: Path, length: int) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "truncate", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        Journal(tmp_path / "journal.jsonl", "a")


def test_large_files_are_hashed_once_until_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REMEMBERED", 4)
    file, read = tmp_path / "model.safetensors", []
    monkeypatch.setattr(files, "hash_file", lambda path: read.append(path) or path.read_text())
    file.write_text("first")
    files.file_sha256(file)
    assert files.file_sha256(file) == "first" and len(read) == 1
    write_atomic(file, "other")
    assert files.file_sha256(file) == "other" and len(read) == 2
    os.utime(file, ns=(1, 1))  # written in its place
    assert files.file_sha256(file) == "other" and len(read) == 3
    time.sleep(0.05)  # the clock of a filesystem has coarse ticks; reading weights takes longer
    file.write_text("third")
    os.utime(file, ns=(1, 1))  # as rsync and cp --preserve do
    assert files.file_sha256(file) == "third"
