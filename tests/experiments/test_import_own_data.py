"""A user's own data from the file to a trained model: `make shards SOURCE=jsonl|hf|coco`, training, evaluation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from datamodules.persistence.files import read_json
from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.shard_reader import ShardReader
from experiments import evaluate, import_shards, train
from experiments.evaluation.choose_predictor import choose_predictor
from experiments.evaluation.evaluation_settings import AskedModel
from tests.datamodules.importers.own_data import own_files, test_coco
from tests.datamodules.importers.own_data.own_files import SIZES, numbers, true_boxes
from tests.datamodules.importers.published import jpeg
from tests.datamodules.importers.test_speed import look
from tests.experiments.conftest import Workbench

ROOT = Path(__file__).resolve().parents[2]
NUM_LINES = 100_000
SLACK_MB = 32


def run(**settings: object) -> None:
    import_shards.main([f"--{name}={value}" for name, value in {"processes": 1, **settings}.items()])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def ten_lines(form: str) -> list[dict]:
    if form != "swift":
        return own_files.records(form)
    boxes = enumerate(true_boxes())
    return [own_files.swift(number, image, numbers(box, SIZES[image], "pixels")) for number, (image, box) in boxes]


@pytest.mark.parametrize("form", ["qwen", "sharegpt", "swift", "trl"])
def test_ten_lines_of_each_form_are_imported_trained_on_and_evaluated(workbench: Workbench, form: str) -> None:
    own_files.write_jsonl(workbench.root / "mine", ten_lines(form))
    statement = {} if form == "swift" else {"own.box_format": "pixels"}
    run(source="jsonl", root=workbench.root / "mine", out=workbench.root / "own", **statement)
    assert ShardReader(workbench.root / "own").count == (20 if form == "sharegpt" else 10)

    path = Path(workbench.training("cot_sft"))
    settings = yaml.safe_load(path.read_text())
    settings["data"] |= {"shards": str(workbench.root / "own"), "style": "answer", "strict": True}
    settings["trainer"] |= {"max_steps": 5}
    path.write_text(yaml.safe_dump(settings))
    train.main(["--config", str(path), "--trainer.logger=false"])
    merged = workbench.outputs / "tiny" / "cot_sft" / "merged"

    # A copy anywhere is asked as the phase asked: "answer", where the evaluation's own default is "think".
    copied = shutil.copytree(merged, workbench.root / "published")
    chosen = choose_predictor(str(copied), AskedModel())
    assert chosen.prompts["style"] == "answer" and chosen.prompts["box_format"] == "absolute_pixels"

    where = [
        f"--data_root={workbench.root}",
        f"--bench=mig_bench,{workbench.root / 'own'}",
        f"--output={workbench.outputs / 'eval'}",
    ]
    evaluate.main([f"--model={merged}", *where, "--decoding.max_new_tokens=4"])
    found = {file.parent.name: read_json(file) for file in (workbench.outputs / "eval").glob("*/result.json")}
    assert set(found) == {"mig_bench", f"shards-{workbench.root.name}-own"}
    own = found[f"shards-{workbench.root.name}-own"]
    tasks = {task for shard in read_manifest(workbench.root / "own")["shards"] for task in shard["tasks"]}
    assert own["n"] == ShardReader(workbench.root / "own").count and set(own["columns"]) == tasks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what the numbers of a box mean"),
        ({"own.box_format": "normalized"}, "cannot be normalized"),
        ({"own.box_format": "resized_pixels"}, "own.resized_limits=None"),
        ({"own.box_format": "pixels", "own.images": "/gone"}, "own.images='/gone' is no folder"),
        ({"own.box_format": "pixels", "root": "/gone"}, "root='/gone' is neither a folder nor a file of records"),
        ({"own.box_format": "pixels", "own.questions": '["Where?"]'}, "must hold {} once"),
        ({"own.box_format": "pixels", "own.fields": "{promt: q}"}, "'promt' is a field of no format; there are"),
        ({"own.box_format": "pixels", "own.fields": "{prompt: q, label: q}"}, "two names stand for 'q'"),
        ({"source": "odinw", "own.box_format": "pixels"}, "own.* is for jsonl, hf, coco"),
    ],
)
def test_a_wrong_statement_is_five_lines_at_most_and_writes_nothing(
    tmp_path: Path, settings: dict, message: str
) -> None:
    root = own_files.write_jsonl(tmp_path / "mine", own_files.records("qwen"))
    with pytest.raises(SystemExit) as caught:
        run(**{"source": "jsonl", "root": root, "out": tmp_path / "out"} | settings)
    text = str(caught.value)
    assert message in text and len(text.splitlines()) <= 5
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_an_import_would_and_writes_nothing(tmp_path: Path, capsys) -> None:
    lines = own_files.records("qwen", count=20)
    lines[3]["images"][1] = "images/gone.jpg"
    root = own_files.write_jsonl(tmp_path / "mine", lines)
    chosen = {"source": "jsonl", "root": root, "out": tmp_path / "out", "own.box_format": "pixels"}
    run(**chosen, dry_run="true")
    tried = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "19 samples, 1 rejected" in tried and "missing_image 1: mine/train:4: record 'q3': " in tried
    run(**chosen)
    assert tried.splitlines()[-3:] == capsys.readouterr().out.splitlines()[-4:-1]
    run(**chosen)
    assert "already imported" in capsys.readouterr().out


def test_odd_characters_and_names_end_no_import(tmp_path: Path) -> None:
    odd = {"note\ud800": "half \udfff", "id": "\udc80", "when": [1]}
    lines = [record | odd for record in own_files.records("qwen")]
    root = own_files.write_jsonl(tmp_path / "mine", [])
    with (root / "train.jsonl").open("w") as file:  # as escapes, which are sound JSON
        file.writelines(json.dumps(record) + "\n" for record in [*lines, lines[0] | {"images": ["a", "b"]}])
    run(source="jsonl", root=root, out=tmp_path / "out", max_rejected=1, **{"own.box_format": "pixels"})
    report = read_json(tmp_path / "out/import.json")
    assert report["parts"]["train"]["rejected"]["missing_image"] == 1
    assert "note?" in report["sources"]["jsonl"]["counts"]["unknown fields of messages record, not used"]
    os.rename(os.fsencode(root / "train.jsonl"), os.fsencode(root) + b"/tr\xffin.jsonl")
    with pytest.raises(SystemExit, match="the name of this file is not UTF-8; rename it"):
        run(source="jsonl", root=root, out=tmp_path / "no", **{"own.box_format": "pixels"})


def test_other_statements_are_another_import(tmp_path: Path) -> None:
    root = own_files.write_jsonl(tmp_path / "mine", own_files.records("qwen"))
    chosen = {"source": "jsonl", "root": root, "out": tmp_path / "out"}
    for box_format in ("pixels", "relative_1000"):
        run(**chosen, **{"own.box_format": box_format})
        assert read_json(tmp_path / "out/import.json")["sources"]["jsonl"]["own"]["box_format"] == box_format
    assert len(list((tmp_path / "out").glob("train*"))) == 2, "the first import is moved aside"


def test_training_splits_are_the_default_and_what_is_left_out_is_said(tmp_path: Path, capsys) -> None:
    root = test_coco.roboflow(test_coco.roboflow(tmp_path / "pets"), "valid")
    run(source="coco", root=root, out=tmp_path / "out")
    assert "not taken, as others are for training: valid" in capsys.readouterr().out
    assert [path.parent.name for path in (tmp_path / "out").rglob("*.tar")] == ["train"]
    run(source="coco", root=root, out=tmp_path / "one", one_box="true", max_rejected=1, subsets='["*"]')
    assert ShardReader(tmp_path / "one").count == 4
    parts = read_json(tmp_path / "one/import.json")["parts"]
    assert parts["train"]["rejected"] == {"several_answers": 1}


@pytest.mark.parametrize("name", ["", ".", "../other", "/proc/other", "a:b", "a\\b", "done.json", "manifest.json/a"])
def test_a_part_is_a_folder_below_out_that_the_manifest_can_name(tmp_path: Path, name: str) -> None:
    own_files.write_jsonl(tmp_path / "kites", own_files.records("trl"))
    part = {"name": name, "source": "jsonl", "root": "kites", "own": {"box_format": "pixels"}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"parts": [part]}))
    with pytest.raises(SystemExit, match=r"these settings cannot be run:\n  - name='.*rename it"):
        run(config=tmp_path / "mixture.yaml", root=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_whose_name_no_manifest_can_hold_is_refused(tmp_path: Path) -> None:
    own_files.write_jsonl(tmp_path / "kites", own_files.records("trl"), "train:1.jsonl")
    with pytest.raises(SystemExit, match=r"name='train:1' of a part or subset is no plain name"):
        run(source="jsonl", root=tmp_path / "kites", out=tmp_path / "out", **{"own.box_format": "pixels"})


def test_a_subset_below_another_survives_changed_annotations(tmp_path: Path) -> None:
    root = own_files.write_jsonl(tmp_path / "kites", own_files.records("trl"))
    (root / "train").mkdir()
    chosen = {"source": "jsonl", "root": root, "out": tmp_path / "out", "own.box_format": "pixels"}
    for count in (4, 5):  # the second import moves both folders of the first one aside
        own_files.write_jsonl(root, own_files.records("trl", count=count), "train/train_more.jsonl")
        run(**chosen)
        reader = ShardReader(tmp_path / "out")
        assert [path.parent.name for path in reader.paths] == ["train_more", "train"]
        assert reader.count == own_files.NUM_RECORDS + count


def test_no_parts_and_a_file_in_place_of_the_folder_are_refused(tmp_path: Path) -> None:
    root = own_files.write_jsonl(tmp_path / "kites", own_files.records("trl"))
    (tmp_path / "mixture.yaml").write_text("parts: []")
    with pytest.raises(SystemExit, match="with 0 parts: exactly one of the two is needed"):
        run(config=tmp_path / "mixture.yaml", root=tmp_path, out=tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"out='.*file' is a file"):
        run(source="jsonl", root=root, out=tmp_path / "file", **{"own.box_format": "pixels"})


def test_a_mixture_draws_from_data_of_ones_own_too(tmp_path: Path) -> None:
    own_files.write_jsonl(tmp_path / "data" / "kites", own_files.records("trl"))
    test_coco.cvat(tmp_path / "data" / "pets")
    parts = [
        {"name": "kites", "source": "jsonl", "root": "kites", "count": 4, "own": {"box_format": "pixels"}},
        {"name": "pets", "source": "coco", "root": "pets", "own": {"task": "find", "name": "my_pets"}},
    ]
    config = tmp_path / "mixture.yaml"
    config.write_text(yaml.safe_dump({"parts": parts}))
    run(config=config, root=tmp_path / "data", out=tmp_path / "out", max_rejected=1)
    reader = ShardReader(tmp_path / "out")
    samples = [reader.read(number).sample for number in range(reader.count)]
    assert [sample.task for sample in samples] == ["kites"] * 4 + ["find"] * 2
    assert samples[-1].id.startswith("my_pets/") and read_json(tmp_path / "out/import.json")["sources"]["coco pets"]
    parts[1]["own"]["name"] = "kites"
    config.write_text(yaml.safe_dump({"parts": parts}))
    with pytest.raises(SystemExit, match=r"two data sets are named 'kites': say own\.name"):
        run(config=config, root=tmp_path / "data", out=tmp_path / "out")


def many_lines(root: Path, count: int) -> Path:
    """`count` records of one image; every tenth is half a line."""
    root.mkdir()
    (root / "a.jpg").write_bytes(jpeg(0, (64, 48)))
    with (root / "train.jsonl").open("w") as file:
        for number in range(count):
            record = {"id": f"r{number}", "prompt": "Where is the kite?", "solution": [8, 12, 24, 36], "image": "a.jpg"}
            line = json.dumps(record)
            file.write((line if number % 10 else line[:-7]) + "\n")
    return root


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_hundred_thousand_lines_are_imported_in_flat_memory(tmp_path: Path, capsys) -> None:
    root, out = many_lines(tmp_path / "mine", NUM_LINES), tmp_path / "out"
    command = [sys.executable, "-m", "experiments.import_shards", "--source=jsonl", f"--root={root}", f"--out={out}"]
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, "--own.box_format=pixels", "--processes=2"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    seen: list[tuple[int, float]] = []  # shards done, megabytes
    while process.poll() is None:
        seen.append((len(list(out.glob("train/shard-*.tar"))), look(process.pid, {})))
        time.sleep(0.1)
    assert process.returncode == 0
    assert ShardReader(out).count == NUM_LINES * 9 // 10
    quarter = max(mb for done, mb in seen if done <= NUM_LINES / 4000)
    end = max(mb for done, mb in seen if done > NUM_LINES / 4000)
    with capsys.disabled():
        rate = NUM_LINES / (time.monotonic() - begin)
        print(
            f"\n{NUM_LINES:,} lines: {rate:,.0f} a second by the clock, scan included; {quarter:.0f} MB, then {end:.0f}"
        )
    assert end < quarter + SLACK_MB


def session_members(session: int) -> dict[int, str]:
    """The living processes of a session, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="kills processes")
@pytest.mark.parametrize("is_killed", [False, True])
def test_no_process_of_an_import_outlives_it(tmp_path: Path, is_killed: bool) -> None:
    """The fork server, its workers and the resource tracker end, also where nobody tells them."""
    root, out = many_lines(tmp_path / "mine", 4000), tmp_path / "out"
    command = [sys.executable, "-m", "experiments.import_shards", "--source=jsonl", f"--root={root}", f"--out={out}"]
    command += ["--own.box_format=pixels", "--processes=2", "--records_per_shard=100"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    most = 0
    while process.poll() is None:
        most = max(most, len(session_members(process.pid)))
        if is_killed and len(list(out.glob("train/*.tar"))) >= 3:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == (-signal.SIGKILL if is_killed else 0)
    assert most >= 4, "the command, a fork server and two workers"
    deadline = time.monotonic() + 30
    while (left := session_members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="kills processes")
def test_an_import_of_own_data_that_is_killed_ends_with_the_same_files(tmp_path: Path) -> None:
    root = many_lines(tmp_path / "mine", 4000)
    command = [sys.executable, "-m", "experiments.import_shards", "--source=jsonl", f"--root={root}"]
    command += ["--own.box_format=pixels", "--processes=2", "--records_per_shard=100"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], cwd=ROOT, check=True, **quiet)
    out, kills = tmp_path / "killed", 0
    while not (out / "done.json").exists():
        process = subprocess.Popen([*command, f"--out={out}"], cwd=ROOT, start_new_session=True, **quiet)
        done = len(list(out.glob("train/*.tar")))
        while process.poll() is None and (kills == 3 or len(list(out.glob("train/*.tar"))) < done + 3):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 2
    assert contents(out) == contents(tmp_path / "whole")
