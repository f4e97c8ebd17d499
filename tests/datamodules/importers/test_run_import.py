from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from datamodules.importers import run_import
from datamodules.importers.reading.coco_annotations import Entry, convert
from datamodules.importers.run_import import PARTS, Settings, Workers, forget_parts, import_part
from datamodules.samples.sample import Sample, SampleError
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.shard_reader import ShardReader
from tests.datamodules.importers.published import jpeg


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    """30 questions over 5 images; every 7th has a box without area, the last an image that is not there."""
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    boxes = [[1, 2, 0 if number % 7 == 0 else 9, 9] for number in range(30)]
    questions = [Entry(f"q{k}", "rec", f"{k % 5}.jpg", (64, 48), box, "cat") for k, box in enumerate(boxes)]
    return [*questions[:-1], questions[-1]._replace(image="gone.jpg")]


def run(folder: Path, entries: Sequence[Entry], processes: int = 1, **settings: object) -> run_import.Tally:
    chosen = Settings(**{"records_per_shard": 4, "max_rejected": 0.5} | settings)
    with Workers(processes) as workers:
        return import_part(folder, entries, partial(convert, "test"), folder.parent, chosen, workers, "part")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def ids(folder: Path) -> list[str]:
    reader = ShardReader(folder)
    return [reader.read(number).sample.id for number in range(reader.count)]


def interrupted(calls: int, entries: Sequence[Entry]) -> Iterator[Sample | SampleError]:
    """As `convert`, but it breaks off in the shard that holds question `calls`."""
    for entry, sample in zip(entries, convert("test", entries), strict=True):
        if entry.id == f"q{calls}":
            raise KeyboardInterrupt
        yield sample


def test_all_records_are_imported_in_order_and_the_dirty_ones_counted(tmp_path: Path, entries: list[Entry]) -> None:
    tally = run(tmp_path / "a", entries)
    assert ids(tmp_path / "a") == [entry.id for k, entry in enumerate(entries[:-1]) if k % 7]
    assert dict(tally.rejected) == {"degenerate_box": 5, "missing_image": 1}
    assert tally.examples["missing_image"] == [f"q29: {tmp_path / 'gone.jpg'}"]
    assert len(tally.examples["degenerate_box"]) == 3
    assert "24 samples, 6 rejected" in str(tally) and "degenerate_box 5: q0:" in str(tally)
    loaded = ShardReader(tmp_path / "a").read(0)
    assert loaded.images == (jpeg(1),)


def test_the_files_are_the_same_whatever_the_number_of_processes(tmp_path: Path, entries: list[Entry]) -> None:
    for name, processes in (("a", 1), ("b", 2)):
        run(tmp_path / name, entries, processes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("count", [None, 9])
@pytest.mark.parametrize("broken", [0, 3, 11, 17, 28])
def test_an_interrupted_import_goes_on_to_the_same_files(
    tmp_path: Path, entries: list[Entry], count: int | None, broken: int
) -> None:
    run(tmp_path / "whole", entries, count=count)
    settings = Settings(count=count, records_per_shard=4, max_rejected=0.5)
    folder = tmp_path / "part"
    stop = partial(interrupted, broken)
    try:
        with Workers(1) as workers:
            import_part(folder, entries, stop, tmp_path, settings, workers, "part")
    except KeyboardInterrupt:
        assert not (folder / "manifest.json").exists()
    (folder / "shard-00001.tar.12345.partial").write_text("left by a kill")
    (folder / "shard-00099.tar").write_text("begun beyond what was needed")
    run(folder, entries, count=count)
    forget_parts(folder)
    forget_parts(tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_finished_shard_is_not_made_again_and_a_damaged_one_is(tmp_path: Path, entries: list[Entry]) -> None:
    folder = tmp_path / "a"
    run(folder, entries)
    before = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    damaged = folder / "shard-00002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / PARTS / "00004.json").unlink()  # as if the kill had come between shard and note
    run(folder, entries)
    again = {path.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert again == {"shard-00002.tar", "shard-00004.tar"}
    assert contents(folder) == before


@pytest.mark.parametrize("count", [1, 4, 9, 23, 24])
def test_a_count_is_met_exactly_by_a_draw_that_the_seed_decides(
    tmp_path: Path, entries: list[Entry], count: int
) -> None:
    for name, processes, seed in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1)):
        tally = run(tmp_path / name, entries, processes, count=count, seed=seed)
        assert tally.samples == count == read_manifest(tmp_path / name)["count"]
        forget_parts(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    found = ids(tmp_path / "a")
    assert len(set(found)) == count and found != ids(tmp_path / "c")
    if count < 24:  # a smaller draw is the beginning of a larger one
        run(tmp_path / "d", entries, count=24)
        assert ids(tmp_path / "d")[:count] == found


def test_fewer_samples_than_wanted_is_an_error(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(ValueError, match="count=25, but only 24 usable samples"):
        run(tmp_path / "a", entries, count=25)
    assert not (tmp_path / "a/manifest.json").exists()


def test_too_many_rejected_samples_stop_the_import_early(tmp_path: Path, entries: list[Entry], monkeypatch) -> None:
    with pytest.raises(
        ValueError, match=r"6 of 30 samples rejected, more than max_rejected=0\.1(?s:.*)degenerate_box 5"
    ):
        run(tmp_path / "a", entries, max_rejected=0.1)
    monkeypatch.setattr(run_import, "MIN_JUDGED", 4)
    with pytest.raises(ValueError, match="1 of 4 samples rejected"):
        run(tmp_path / "b", entries, max_rejected=0.1)
    assert len(list((tmp_path / "b").glob("*.tar"))) == 1


def test_a_shard_whose_records_are_all_dirty_is_left_out(tmp_path: Path, entries: list[Entry]) -> None:
    dirty = [entry._replace(phrase=" ") for entry in entries[:4]]
    run(tmp_path / "a", dirty + entries[4:])
    shards = read_manifest(tmp_path / "a")["shards"]
    assert [shard["name"] for shard in shards][:2] == ["shard-00001.tar", "shard-00002.tar"]
    assert ids(tmp_path / "a")[0] == "q4"
    note = json.loads((tmp_path / "a" / PARTS / "00000.json").read_text())
    assert note["shard"] is None and note["rejected"] == {"empty_phrase": 4}


def slow_after_the_first(entries: Sequence[Entry]) -> Iterator[Sample | SampleError]:
    """As `convert`, but shards that do not begin with q1 take a while."""
    if entries[0].id != "q1":
        time.sleep(0.5)
    yield from convert("test", entries)


def test_shards_in_flight_when_the_count_is_met_leave_nothing_behind(tmp_path: Path, entries: list[Entry]) -> None:
    sound = [entry for k, entry in enumerate(entries[:-1]) if k % 7]
    order = list(range(len(sound)))
    random.Random(0).shuffle(order)
    sound[order[0]], sound[0] = sound[0], sound[order[0]]  # q1 is drawn first
    settings = Settings(count=2, records_per_shard=2)
    with Workers(2) as workers:
        import_part(tmp_path / "a", sound, slow_after_the_first, tmp_path, settings, workers, "part")
        time.sleep(1.0)
        assert [path.name for path in (tmp_path / "a").glob("shard-*")] == ["shard-00000.tar"]
