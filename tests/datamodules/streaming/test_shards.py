from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.samples.sample import ImagePart, LoadedSample, SampleError, TextPart
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from tests.datamodules.encoding.tiny_processor import declare, make_sample


def write(folder: Path, num_samples: int, max_samples: int = 4) -> list[LoadedSample]:
    samples = [make_sample(f"s{index}", ((14, 14), (28, 14))) for index in range(num_samples)]
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for sample in samples:
            writer.add(sample)
    return samples


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rewrite_tar(folder: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Rebuild the first shard with `change(name, data)` (None drops the member), and its entry in the manifest."""
    path = folder / "shard-00000.tar"
    with tarfile.open(path) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            data = change(name, data)
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    declare(folder)


def read_all(folder: Path, **settings: bool) -> tuple[list[str], dict[str, list[str]]]:
    """Ids of the samples that can be read, in order, and those of the others by the rule they break."""
    reader, ids, broken = ShardReader(folder, **settings), [], defaultdict(list)
    for number in range(reader.count):
        try:
            ids.append(reader.read(number).sample.id)
        except SampleError as error:
            broken[error.rule].append(error.sample_id)
    return ids, dict(broken)


def test_what_is_written_is_read_back_in_order_and_at_random(tmp_path: Path) -> None:
    samples = write(tmp_path, 10)
    reader = ShardReader([tmp_path])
    assert [reader.read(number) for number in range(reader.count)] == samples
    assert [reader.read(number) for number in (9, 0, 4, 3)] == [samples[number] for number in (9, 0, 4, 3)]


def test_several_folders_are_read_as_one(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 3), write(tmp_path / "b", 5)
    reader = ShardReader([tmp_path / "a", str(tmp_path / "b")])
    assert [reader.read(number) for number in range(reader.count)] == first + second


@pytest.mark.parametrize("again", ["{}/", "file://{}", "{}/shard-00001.tar"])
def test_a_shard_that_two_sources_hold_is_refused(tmp_path: Path, again: str) -> None:
    write(tmp_path / "a", 6)
    with pytest.raises(ValueError, match=r"two sources of shards hold .*a/shard-0000\d\.tar: each of its samples"):
        ShardReader([str(tmp_path / "a"), again.format(tmp_path / "a")])


def test_few_member_tables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardReader, "NUM_INDEXED_SHARDS", 2)
    samples = write(tmp_path, 8, max_samples=1)
    reader = ShardReader(tmp_path)
    assert [reader.read(number) for number in (*range(8), 0)] == [*samples, samples[0]]
    assert len(reader._tables) == 2


def test_manifest_describes_the_shards(tmp_path: Path) -> None:
    write(tmp_path, 10)
    manifest = read_manifest(tmp_path)
    assert manifest["count"] == 10
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["shards"][2]["tasks"] == {"common_object": 2}
    for shard in manifest["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", 5)
    write(tmp_path / "b", 5)
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = write(tmp_path, 3)
    with (tmp_path / "shard-00000.tar").open("rb") as stream:
        records = list(group_by_keys(tar_file_expander([{"url": "shard-00000.tar", "stream": stream}])))
    assert [record["__key__"] for record in records] == ["00000_000000", "00000_000001", "00000_000002"]
    assert [record["1.png"] for record in records] == [sample.images[1] for sample in samples]
    assert json.loads(records[1]["json"]) == samples[1].sample.to_json()


def test_image_names_of_any_kind_make_plain_members(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    names = ("a.b.JPG", "photo.jpg_size_" + "k" * 110, "x.p n", "nul.\0", "none", "ü.ßß", "a/b.c/d")
    loaded = make_sample("s")
    parts = (*(ImagePart(k) for k in range(len(names))), TextPart("Where?"))
    sample = replace(loaded.sample, images=names, messages=parts)
    with ShardWriter(tmp_path) as writer:
        writer.add(LoadedSample(sample, tuple(name.encode() for name in names)))
    with (tmp_path / "shard-00000.tar").open("rb") as stream:
        (record,) = group_by_keys(tar_file_expander([{"url": "shard-00000.tar", "stream": stream}]))
    members = {name for name in record if name[0].isdigit()}
    assert members == {"0.jpg", *(f"{k}.img" for k in range(1, len(names)))}
    read = ShardReader(tmp_path).read(0)
    assert read.sample == sample and read.images == tuple(name.encode() for name in names)


def test_a_shard_is_what_webdataset_would_write_to_the_byte(tmp_path: Path) -> None:
    from webdataset import TarWriter

    samples = write(tmp_path, 3)
    with (tmp_path / "reference.tar").open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for index, loaded in enumerate(samples):
            images = {f"{k}.png": data for k, data in enumerate(loaded.images)}
            text = json.dumps(loaded.sample.to_json(), ensure_ascii=False).encode()
            writer.write({"__key__": f"00000_{index:06d}", **images, "json": text})
    assert (tmp_path / "shard-00000.tar").read_bytes() == (tmp_path / "reference.tar").read_bytes()


def test_interrupted_writing_leaves_no_manifest_and_can_be_repeated(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, max_samples=2) as writer:
        for index in range(3):
            writer.add(make_sample(f"s{index}"))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.tar"]
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        ShardReader(tmp_path)
    samples = write(tmp_path, 3)
    assert read_all(tmp_path) == ([sample.sample.id for sample in samples], {})


def test_finished_shards_are_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="already holds"):
        ShardWriter(tmp_path)


def test_writer_refuses_a_sample_without_all_its_images(tmp_path: Path) -> None:
    loaded = make_sample("a")
    with pytest.raises(ValueError, match="names 2 images, got 1"), ShardWriter(tmp_path) as writer:
        writer.add(LoadedSample(loaded.sample, loaded.images[:1]))


@pytest.mark.parametrize("text", ["", "[]", '{"count": 1}', '{"count": 2, "shards": [{"name": "a", "count": 2}]}'])
def test_unusable_manifest_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is"):
        read_manifest(tmp_path)


def test_empty_lists_of_shards_are_a_clear_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path):
        pass
    for folders in ([], [tmp_path], tmp_path):
        with pytest.raises(ValueError, match="no samples in shards="):
            ShardReader(folders)


def test_damaged_header_costs_one_sample(tmp_path: Path) -> None:
    write(tmp_path, 8)
    path = tmp_path / "shard-00000.tar"
    sound = members(path)
    for name in ("00000_000001.0.png", "00000_000002.json"):
        overwrite(path, sound[name].offset + 20, b"\xff" * 200)
    declare(tmp_path)
    ids, rules = read_all(tmp_path)
    assert ids == ["s0", "s3", "s4", "s5", "s6", "s7"]
    assert rules == {"missing_image": ["s1"], "corrupt_member": ["shard-00000.tar:2"]}


def test_damaged_json_costs_one_sample(tmp_path: Path) -> None:
    write(tmp_path, 4)
    path = tmp_path / "shard-00000.tar"
    overwrite(path, members(path)["00000_000003.json"].offset_data, b"\x00\xfe")
    declare(tmp_path)
    assert read_all(tmp_path) == (["s0", "s1", "s2"], {"bad_json": ["shard-00000.tar:3"]})


def test_samples_that_break_a_rule_are_named(tmp_path: Path) -> None:
    write(tmp_path, 4)

    def change(name: str, data: bytes) -> bytes | None:
        if name == "00000_000000.json":
            return json.dumps(json.loads(data) | {"colour": "red"}).encode()
        if name == "00000_000001.json":
            return b"[1, 2]"
        return None if name == "00000_000002.1.png" else data

    rewrite_tar(tmp_path, change)
    ids, rules = read_all(tmp_path)
    assert ids == ["s3"]
    assert rules == {"unknown_field": ["s0"], "field_type": ["shard-00000.tar:1"], "missing_image": ["s2"]}


def test_shard_that_is_not_the_manifests_is_not_trusted(tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:-600])
    (tmp_path / "shard-00002.tar").unlink()
    ids, rules = read_all(tmp_path)
    assert ids == ["s4", "s5", "s6", "s7"]
    assert {rule: len(names) for rule, names in rules.items()} == {"manifest_mismatch": 6}
    reader = ShardReader(tmp_path)
    for number, fault in ((0, "bytes, the manifest says"), (8, "in the manifest but not in")):
        with pytest.raises(SampleError, match=fault):
            reader.read(number)


def test_samples_are_found_by_id_over_folders_and_bad_ones_are_passed_over(tmp_path: Path) -> None:
    samples = write(tmp_path / "a", 6)
    with ShardWriter(tmp_path / "b") as writer:
        writer.add(make_sample("other"))
        writer.add(make_sample("s1"))
    rewrite_tar(tmp_path / "a", lambda name, data: None if name == "00000_000002.json" else data)
    reader = ShardReader([tmp_path / "a", tmp_path / "b"])
    assert reader.find({"s0", "s1", "s2", "s5", "other", "nowhere"}) == {"s0": 0, "s1": 1, "s5": 5, "other": 6}
    assert reader.read(reader.find({"s5"})["s5"]).images == samples[5].images
    assert reader.find(set()) == {}
