"""Journals and hashes: what they keep, and what they refuse."""

from __future__ import annotations

from pathlib import Path

from datamodules.artefacts import Journal, fingerprint, path_fingerprint, read_journal, write_json


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
