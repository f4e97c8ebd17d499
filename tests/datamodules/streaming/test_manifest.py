"""Damaged manifests: whatever stands in the file, the reader says in one sentence which file, where, and what to do."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.streaming.manifest import CURE, read_manifest
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from experiments.runs import preflight
from tests.datamodules.encoding.tiny_processor import make_sample

NUM_RANDOM = 40
DIGEST = "0" * 64
VALUES: tuple[Any, ...] = (None, True, 5, -1, 1.5, 2**70, "text", "", [], {}, [[]])
NAMES = (
    "/etc/passwd", "../up.tar", "a/../../b.tar", "a//b.tar", "./a.tar", "a/", "..", "n" * 5000, "ü" * 200, "a\0b.tar",
    "a\nb.tar", "a\\b.tar", "C:a.tar", "\ud800.tar",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    with ShardWriter(folder, max_samples=2) as writer:
        for index in range(4):
            writer.add(make_sample(f"s{index}", ((14, 14), (28, 14))))
    return folder


def changed(manifest: dict, place: tuple[Any, ...], value: Any) -> bytes:
    """The manifest with another value at this place; without the field where the value is `...`."""
    found = copy.deepcopy(manifest)
    inner: Any = found
    for part in place[:-1]:
        inner = inner[part]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return json.dumps(found).encode()


def damages(text: bytes) -> Iterator[tuple[str, bytes]]:
    """(kind, content) of manifests that cannot be right."""
    manifest = json.loads(text)
    first = ("shards", 0)
    fields = [("version",), ("count",), ("shards",), first, *((*first, name) for name in manifest["shards"][0])]
    for place in fields:
        name = ".".join(map(str, place))
        sound_value = manifest
        for part in place:
            sound_value = sound_value[part]
        wrong = [value for value in VALUES if type(value) is not type(sound_value) or value in (-1, 2**70, "")]
        for value in [*wrong, ...] if place != first else wrong:
            yield f"{name}={value!r:.20}", changed(manifest, place, value)
    for name in NAMES:
        yield f"name {name!r:.20}", changed(manifest, (*first, "name"), name)
    yield "a name twice", changed(manifest, (*first, "name"), manifest["shards"][1]["name"])
    yield "sha256 in capitals", changed(manifest, (*first, "sha256"), "A" * 64)
    yield "sha256 too short", changed(manifest, (*first, "sha256"), "a" * 63)
    yield "a task's count", changed(manifest, (*first, "tasks"), {"common_object": -2, "diff": 4})
    yield "tasks that hold more", changed(manifest, (*first, "tasks"), {"common_object": 3})
    yield "a count that is not the sum", changed(manifest, ("count",), 5)
    yield "another version", changed(manifest, ("version",), 2)
    yield "a key twice", text.replace(b'"count": 4', b'"count": 4, "count": 4', 1)
    yield "NaN", text.replace(b'"count": 4', b'"count": NaN', 1)
    yield "Infinity", text.replace(b'"count": 4', b'"count": Infinity', 1)
    yield "5,000 digits", text.replace(b'"count": 4', b'"count": ' + b"9" * 5000, 1)
    yield "nested without end", b"[" * 1_000_000
    yield "objects without end", b'{"shards":' * 1_000_000
    yield "nested in a field", text.replace(b'"version": 1', b'"version": ' + b"[" * 100_000 + b"]" * 100_000, 1)
    yield from (("empty", b""), ("zeros", b"\0" * 64), ("a list", b"[]"), ("a word", b"null"))
    yield "binary", random.Random(0).randbytes(500)
    yield "UTF-16", text.decode().encode("utf-16")
    yield "a mark at its start", b"\xef\xbb\xbf" + text
    yield "something behind its end", text + b"}"
    for k in range(1, 6):
        yield f"cut at {k}/6", text[: len(text) * k // 6]
    rng = random.Random(0)
    for number in range(NUM_RANDOM):  # a character of JSON's own made another one: never JSON of the same meaning
        place = rng.choice([k for k, byte in enumerate(text) if byte in b'{}[]:,"'])
        yield f"random {number}", text[:place] + b"\xff" + text[place + 1 :]


def test_every_damaged_manifest_is_one_clear_error(sound: Path, tmp_path: Path) -> None:
    file, kinds = tmp_path / "manifest.json", 0
    for kind, content in damages((sound / "manifest.json").read_bytes()):
        file.write_bytes(content)
        for read in (read_manifest, ShardReader):
            with pytest.raises(ValueError) as caught:
                read(tmp_path)
            message = str(caught.value)
            assert type(caught.value) is ValueError, kind
            assert str(file) in message and message.endswith(CURE), (kind, message)
            assert "\n" not in message and len(message) < 600, kind
        assert len(preflight.shard_problems(str(tmp_path))) == 1, kind
        path_fingerprint(tmp_path)  # of a run's inputs: whoever reads the shards refuses them
        kinds += 1
    assert kinds >= 150


def test_the_place_and_the_value_are_named(sound: Path, tmp_path: Path) -> None:
    manifest = json.loads((sound / "manifest.json").read_bytes())
    for place, value, words in (
        (("shards", 1, "count"), -1, "shards[1].count is -1, not a whole number"),
        (("shards", 1, "sha256"), 5, "shards[1].sha256 is 5, not a hash"),
        (("shards", 0, "name"), "../a", "shards[0].name='../a' is no plain name"),
        (("shards", 1, "name"), "shard-00000.tar", "shards[1].name='shard-00000.tar' is that of shards[0] too"),
    ):
        (tmp_path / "manifest.json").write_bytes(changed(manifest, place, value))
        with pytest.raises(ValueError) as caught:
            read_manifest(tmp_path)
        assert words in str(caught.value)


def test_a_manifest_that_cannot_be_read_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest: Permission denied"):
        read_manifest(tmp_path)


def test_a_name_may_lead_into_a_subfolder_and_fields_of_others_are_left_alone(sound: Path, tmp_path: Path) -> None:
    manifest = json.loads((sound / "manifest.json").read_bytes())
    (tmp_path / "part").symlink_to(sound)
    for shard in manifest["shards"]:
        shard |= {"name": f"part/{shard['name']}", "made_by": "another tool"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert ShardReader(tmp_path).read(3).sample.id == "s3"
