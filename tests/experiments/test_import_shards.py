from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from datamodules.benchmarks.odinw import SETS
from datamodules.importers.parts import Part
from datamodules.importers.reading.source import Scan
from datamodules.importers.registry import PUBLISHED
from datamodules.persistence.files import read_json
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.shard_reader import ShardReader
from experiments import import_shards
from tests.datamodules.importers import published

ROOT = Path(__file__).resolve().parents[2]
MIXTURE = """
parts:
  - {name: common, source: mgrounding, root: mg, subsets: [common_object], count: 2}
  - {name: groups, source: mgrounding, root: mg, subsets: [group_grounding, diff]}
  - {name: single, source: refcoco, root: rc, count: 1}
  - {name: odinw, source: odinw, root: od}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with all four sources."""
    root = tmp_path / "data"
    published.write_mgrounding(root / "mg", [published.mgrounding_record(k, k % 8) for k in range(40)])
    published.write_refcoco(root / "rc")
    published.write_odinw(root / "od")
    published.write_v3det(root / "v3")
    return root


def run(**settings: object) -> None:
    import_shards.main([f"--{name}={value}" for name, value in {"processes": 1, **settings}.items()])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def samples(folder: Path) -> list:
    reader = ShardReader(folder)
    return [reader.read(number).sample for number in range(reader.count)]


@pytest.mark.parametrize(
    ("source", "below", "parts"),
    [
        (
            "mgrounding",
            "mg",
            {
                "common_object": 5,
                "diff": 5,
                "free_form": 5,
                "group_grounding": 10,
                "object_tracking": 5,
                "refer_grounding": 5,
                "region": 5,
            },
        ),
        ("refcoco", "rc", {"refcoco_unc/train": 2}),
        ("odinw", "od", {"WildfireSmoke/train": 2}),
        ("v3det", "v3", {"train": 2}),
    ],
)
def test_each_source_becomes_a_folder_of_shards(data: Path, tmp_path: Path, capsys, source, below, parts) -> None:
    out = tmp_path / "out"
    run(source=source, root=data / below, out=out)
    assert {name: ShardReader(out / name).count for name in parts} == parts
    assert len(samples(out)) == sum(parts.values())
    report = read_json(out / "import.json")
    assert {name: tally["samples"] for name, tally in report["parts"].items()} == parts
    assert report["sources"][source]["first"] and report["sources"][source]["keys"]
    printed = capsys.readouterr().out
    assert "first of" in printed and "0 rejected" in printed
    before = contents(out)
    run(source=source, root=data / below, out=out)
    assert "already imported" in capsys.readouterr().out
    assert contents(out) == before


def test_every_source_is_tested_here() -> None:
    assert set(PUBLISHED) == {"mgrounding", "refcoco", "odinw", "v3det"}


def test_a_mixture_draws_its_shares_and_multiplies_them_by_the_surplus(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "mixture.yaml"
    config.write_text(MIXTURE)
    run(config=config, root=data, out=tmp_path / "out")
    parts = read_json(tmp_path / "out/import.json")["parts"]
    assert {name: tally["samples"] for name, tally in parts.items()} == {
        "common": 2,
        "groups": 15,
        "single": 1,
        "odinw": 2,
    }
    names = [shard["name"] for shard in read_manifest(tmp_path / "out")["shards"]]
    assert names == [f"{name}/shard-00000.tar" for name in parts]
    run(config=config, root=data, out=tmp_path / "more", surplus=1.5)
    assert ShardReader(tmp_path / "more/common").count == 3
    assert ShardReader(tmp_path / "more/single").count == 2


def test_other_settings_move_only_what_they_change_aside(data: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "mixture.yaml", tmp_path / "out"
    config.write_text(MIXTURE)
    run(config=config, root=data, out=out)
    made = (out / "groups/shard-00000.tar").stat().st_mtime_ns
    config.write_text(MIXTURE.replace("count: 2", "count: 3"))
    run(config=config, root=data, out=out)
    assert ShardReader(out).count == 21
    assert (out / "groups/shard-00000.tar").stat().st_mtime_ns == made
    assert [ShardReader(path).count for path in out.glob("common.*")] == [2]


def test_changed_annotations_are_imported_anew(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source="mgrounding", root=data / "mg", out=out)
    published.write_mgrounding(data / "mg", [published.mgrounding_record(k, 1) for k in range(3)])
    run(source="mgrounding", root=data / "mg", out=out)
    assert ShardReader(out).count == 3


def test_subsets_are_chosen_by_patterns_and_training_splits_are_the_default(data: Path, tmp_path: Path) -> None:
    run(source="refcoco", root=data / "rc", out=tmp_path / "val", subsets='["*/val"]')
    assert [sample.id for sample in samples(tmp_path / "val")] == ["refcoco_unc/1/2", "refcoco_unc/1/3"]
    with pytest.raises(SystemExit, match=r"subsets=\['\*/test'\] match none of refcoco_unc/train, refcoco_unc/val"):
        run(source="refcoco", root=data / "rc", out=tmp_path / "test", subsets='["*/val", "*/test"]')


def test_a_surprise_stops_before_anything_is_written_unless_it_is_allowed(data: Path, tmp_path: Path) -> None:
    record = published.mgrounding_record(0) | {"hint": "x"}
    published.write_mgrounding(data / "mg", [record])
    with pytest.raises(SystemExit, match="unknown field 'hint'"):
        run(source="mgrounding", root=data / "mg", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(source="mgrounding", root=data / "mg", out=tmp_path / "out", allow='["hint"]')
    assert ShardReader(tmp_path / "out").count == 2


def test_training_sets_are_rid_of_answers_of_several_boxes(data: Path, tmp_path: Path) -> None:
    settings = {"source": "mgrounding", "root": data / "mg", "one_box": "true", "max_rejected": 1}
    run(out=tmp_path / "out", subsets='["object_tracking", "diff"]', **settings)
    assert {sample.task for sample in samples(tmp_path / "out")} == {"diff"}
    tallies = read_json(tmp_path / "out/import.json")["parts"]
    assert tallies["object_tracking"]["rejected"] == {"several_answers": 5}


def test_a_scan_writes_nothing(data: Path, tmp_path: Path, capsys) -> None:
    run(source="odinw", root=data / "od", out=tmp_path / "out", scan_only="true")
    assert "several_boxes 1" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(source="odinw", root=tmp_path / "gone", count=0, surplus=0.5, records_per_shard=0)
    for fault in ("root=", "count=0", "surplus=0.5", "records_per_shard=0"):
        assert fault in str(caught.value)
    with pytest.raises(SystemExit, match="source='imagenet' is none of mgrounding"):
        run(source="imagenet", root=tmp_path)
    with pytest.raises(SystemExit, match="exactly one of the two"):
        run(root=tmp_path)


def test_a_folder_that_was_not_made_here_is_not_touched(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="files that no import has written"):
        run(source="odinw", root=data / "od", out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for leftover processes in /proc")
def test_an_import_that_is_killed_again_and_again_ends_with_the_same_files(tmp_path: Path) -> None:
    records = [published.mgrounding_record(number, kind=number % 2) for number in range(3000)]
    root = published.write_mgrounding(tmp_path / "data", records)
    command = [sys.executable, "-m", "experiments.import_shards", "--source=mgrounding", f"--root={root}"]
    command += ["--processes=2", "--records_per_shard=100", '--subsets=["common_object"]', "--count=1234"]
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    sessions: list[int] = []
    while not (out / "done.json").exists():
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, f"--out={out}"], cwd=ROOT, start_new_session=True, **quiet)
        done = len(list(out.glob("common_object/*.tar")))
        while process.poll() is None and (len(sessions) == 4 or len(list(out.glob("common_object/*.tar"))) < done + 2):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)  # this process alone: its workers must end by themselves
            sessions.append(process.pid)
        assert process.wait() in (0, -signal.SIGKILL)
    assert len(sessions) >= 3
    assert contents(out) == contents(tmp_path / "whole")
    deadline = time.monotonic() + 20
    while left := [session for session in sessions if session in running_sessions()]:
        assert time.monotonic() < deadline, f"workers have outlived their parents {left}"
        time.sleep(0.1)


def running_sessions() -> set[int]:
    """Session ids of all processes that run; zombies have ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended between the two looks
            continue
        if state != "Z":
            found.add(int(session))
    return found


def test_a_pattern_with_a_mark_leaves_subsets_out(data: Path, tmp_path: Path) -> None:
    published.write_odinw(data / "od", place="vector/train")
    run(source="odinw", root=data / "od", out=tmp_path / "out", subsets='["!vector/*"]')
    assert {sample.images[0].split("/")[0] for sample in samples(tmp_path / "out")} == {"WildfireSmoke"}
    with pytest.raises(SystemExit, match="match none of"):
        run(source="odinw", root=data / "od", out=tmp_path / "no", subsets='["*/train", "!*"]')


def test_the_papers_mixture_draws_from_no_set_that_is_evaluated(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "experiments/configs/paper/cot_mixture.yaml").read_text())
    (part,) = [Part(**part) for part in settings["parts"] if part["source"] == "odinw"]
    evaluated = [f"{folder}/train" for folder in SETS.values()]
    scan = Scan(dict.fromkeys([*evaluated, "Aquarium/train", "Aquarium/valid"], ()), None, tmp_path, {})
    assert part.chosen(scan) == ["Aquarium/train"]
