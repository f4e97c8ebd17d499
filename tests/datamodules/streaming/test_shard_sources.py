"""What may stand in data.shards, and which shards it names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from datamodules.samples.sample import SampleError
from datamodules.streaming import manifest
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_content import deviations
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import mixing_weights, read_shards, source_faults, source_list
from datamodules.streaming.url_openers import FetchError
from experiments.runs import preflight
from tests.datamodules.streaming.conftest import write_shards
from tests.datamodules.streaming.shard_server import ShardServer, status
from tests.datamodules.streaming.test_manifest import damages

ALL = [f"s{k}" for k in range(12)]


def ids(sources: object, **settings: object) -> list[str]:
    reader = ShardReader(sources, **settings)
    return [reader.read(number).sample.id for number in range(reader.count)]


def test_one_folder_is_read_alike_wherever_it_lies(folder: Path, server: ShardServer) -> None:
    for source in (
        folder,
        str(folder),
        f"file://{folder}",
        f"{folder}/shard-{{00000..00003}}.tar",
        server.url,
        f"{server.url}/",
        f"{server.url}/shard-{{00000..00003}}.tar",
        f"pipe:cat {folder}/{{}}",
        f"pipe:cat {folder}/shard-{{00000..00003}}.tar | cat",
        f"pipe:cat '{folder}/shard-{{00000..00003}}.tar'",
    ):
        assert ids(source) == ALL, source
        assert ShardReader(source).fingerprint == ShardReader(folder).fingerprint


def test_a_brace_list_takes_what_it_names_in_its_order(folder: Path, server: ShardServer) -> None:
    for place in (str(folder), server.url):
        assert ids(f"{place}/shard-{{00002,00000}}.tar") == [*ALL[6:9], *ALL[:3]]
        assert ids(f"{place}/shard-00001.tar") == ALL[3:6]
    write_shards(folder.with_name("other"), 2, "o")
    assert ids(f"{folder.parent}/{{other,served}}") == ["o0", "o1", *ALL]
    assert ids([f"{folder.parent}/other", f"{server.url}/shard-00003.tar"]) == ["o0", "o1", *ALL[9:]]


def test_braces_in_the_name_of_a_folder_are_no_list(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("a{1,2}"))
    assert ids(folder.with_name("a{1,2}")) == ALL


def test_a_shard_that_no_manifest_names_is_an_error(folder: Path, server: ShardServer) -> None:
    for place in (str(folder), server.url):
        with pytest.raises(
            ValueError, match=r"2 shards of .* are not in the manifest of .*: shard-00004\.tar, shard-00005"
        ):
            read_shards(f"{place}/shard-{{00003..00005}}.tar")


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ([], "names no folder"),
        ({}, "names no folder"),
        (["a", "a"], "'a' is there twice"),
        ({"a": 0.0}, "weight 0.0 of 'a' is not above 0"),
        ({"a": -1.0}, "weight -1.0 of 'a'"),
        ({"a": math.nan, "b": math.inf}, "weight nan of 'a'"),
        ("ftp://host/a", "ftp:// is none of http, https, s3, gs, hf"),
        ("ais://bucket/a", "ais:// is none of"),
        ("https://host/a?x=1", "neither ? nor #"),
        ("pipe:cat /a", "neither {} nor a .tar"),
    ],
)
def test_a_source_that_cannot_be_meant_is_named(sources: object, fault: str) -> None:
    assert any(fault in found for found in source_faults(sources)), source_faults(sources)


def test_all_faults_of_a_mixture_are_named_at_once() -> None:
    assert len(source_faults({"ftp://a": -1.0, "sftp://b": 2.0, "pipe:id": 0.0})) == 5


@pytest.mark.parametrize("source", ["a{0..99999999}.tar", "a{1..2000}{1..2000}.tar", "a{0..3.tar"])
def test_a_brace_list_that_is_too_long_or_broken_is_told_at_once(source: str) -> None:
    with pytest.raises(ValueError, match=r"more than 1,000,000 shards|Unbalanced|no manifest"):
        read_shards(source)


def test_weights_are_scaled_to_one() -> None:
    assert mixing_weights({"a": 7, "b": 2, "c": 1}) == [0.7, 0.2, 0.1]
    assert mixing_weights("a") is None and mixing_weights(["a", "b"]) is None
    assert source_list({"a": 7, "b": 2}) == ["a", "b"] and source_list("a") == ["a"]


def test_a_remote_folder_without_a_manifest_is_named(server: ShardServer, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for source in (server.url, f"{server.url}/shard-00000.tar"):
        with pytest.raises(FetchError, match=r"manifest\.json cannot be fetched: HTTP 404"):
            read_shards(source)
        (fault,) = preflight.shard_problems(source)
        assert fault.startswith(f"data.shards={source!r}") and len(fault.splitlines()) <= 5


def test_a_manifest_is_fetched_once_in_a_process_and_tried_again(server: ShardServer) -> None:
    server.faults["manifest.json"] = [status(500)] * 2
    for _ in range(3):
        assert len(read_shards(server.url)) == 4
    assert server.requests["manifest.json"] == 3


def test_an_endless_manifest_is_given_up(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "LARGEST", 100)
    with pytest.raises(FetchError, match="longer than 100 bytes"):
        read_shards(server.url)


def test_every_damaged_manifest_of_a_server_is_one_clear_error(server: ShardServer, folder: Path) -> None:
    file, kinds = write_shards(folder / "small", 4, max_samples=2) / "manifest.json", 0
    for kind, content in damages(file.read_bytes()):
        file.write_bytes(content)
        manifest._fetched.cache_clear()
        with pytest.raises(ValueError) as caught:
            read_manifest(f"{server.url}/small")
        assert f"{server.url}/small/manifest.json" in str(caught.value) and "\n" not in str(caught.value), kind
        kinds += 1
    assert kinds >= 150


HOSTILE = (
    *("pipe:touch ran", "/etc/passwd", "../up.tar", "a/../../up.tar", "http://127.0.0.1:1/a.tar", "//host/a.tar"),
    *("file:///etc/passwd", "s3://bucket/a.tar", "a\\..\\b.tar", "", "."),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_manifest_leads_nowhere_else(server: ShardServer, folder: Path, name: str) -> None:
    rename_first(folder, name)
    for source in (str(folder), server.url, f"pipe:cat {folder}/{{}}"):
        with pytest.raises(ValueError, match="is no plain name of a file"):
            read_shards(source)


@pytest.mark.parametrize(
    "name", ["%2e%2e/up.tar", "a?b.tar", "a#b.tar", "a b.tar", "@host.tar", "ü.tar", "$(touch ran)"]
)
def test_a_name_is_no_more_than_a_name_to_a_server_and_never_comes_to_a_shell(
    server: ShardServer, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "shard-00000.tar").rename(folder / name)
    rename_first(folder, name)
    assert ids(server.url) == ALL
    assert server.requests[name] == 1
    with pytest.raises(ValueError, match="cannot be fetched by a command"):
        read_shards(f"pipe:cat {folder}/{{}}")
    assert not (folder / "ran").exists()


def rename_first(folder: Path, name: str) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    record["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(record))


def test_a_remote_folder_has_the_key_of_its_copy(server: ShardServer, folder: Path) -> None:
    assert path_fingerprint(server.url) == path_fingerprint(folder) == path_fingerprint(f"file://{folder}")
    part = f"{folder}/shard-{{00001..00002}}.tar"
    assert path_fingerprint(part) == path_fingerprint(f"{server.url}/shard-{{00001..00002}}.tar")
    assert path_fingerprint(part) != path_fingerprint(folder)
    data = (folder / "shard-00001.tar").read_bytes()
    (folder / "shard-00001.tar").write_bytes(data.replace(b'"label": "dog"', b'"label": "cat"'))
    assert path_fingerprint(part) != path_fingerprint(f"{server.url}/shard-{{00001..00002}}.tar")
    assert [name for name, _ in deviations(part)] == ["shard-00001.tar"] and deviations(server.url) == []


def test_local_shards_of_a_brace_list_are_compared_as_those_of_a_folder(folder: Path) -> None:
    data = (folder / "shard-00001.tar").read_bytes()
    (folder / "shard-00001.tar").write_bytes(data.replace(b'"label": "dog"', b'"label": "cat"'))
    reader = ShardReader(f"{folder}/shard-{{00000..00001}}.tar")
    assert reader.read(0).sample.id == "s0"
    with pytest.raises(SampleError, match="manifest_mismatch"):
        reader.read(3)


def test_the_fingerprint_of_a_folder_of_images_changes_with_any_file_below_it(tmp_path: Path) -> None:
    (tmp_path / "images/region").mkdir(parents=True)
    (tmp_path / "images/region/a.jpg").write_bytes(b"123")
    seen = [path_fingerprint(tmp_path / "images")]
    (tmp_path / "images/region/a.jpg").write_bytes(b"1234")
    seen.append(path_fingerprint(tmp_path / "images"))
    (tmp_path / "images/region/a.jpg").rename(tmp_path / "images/a.jpg")
    seen.append(path_fingerprint(tmp_path / "images"))
    (tmp_path / "images/b.jpg").write_bytes(b"")
    seen.append(path_fingerprint(tmp_path / "images"))
    assert len(set(seen)) == 4 and path_fingerprint(tmp_path / "images") == seen[-1]
