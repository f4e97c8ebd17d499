"""CoT-SFT from a server, killed with -9 three times, is CoT-SFT from the folder that the server serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.persistence.files import read_json
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from experiments import evaluate, train
from experiments.runs import metrics_csv
from tests.datamodules.streaming.shard_server import ShardServer, cut, hang_up, status
from tests.experiments.conftest import ROOT, Workbench, run_apart


@pytest.fixture
def served(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workbench's samples in four shards."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workbench.root / "cache"))
    folder, reader = workbench.root / "served", ShardReader(workbench.root / "shards")
    with ShardWriter(folder, max_samples=3) as writer:
        for number in range(reader.count):
            writer.add(reader.read(number))
    return folder


def kill_behind(checkpoint: Path, arguments: list[str], log: Path) -> None:
    """Run until the checkpoint is there, and kill."""
    command = [sys.executable, "-m", "experiments.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("WANDB_SERVICE", None)  # else it would be one with a run of this process
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    while not checkpoint.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "ranks"), [(0, 1), (2, 1), (2, 2)])
def test_a_killed_run_from_a_server_is_the_undisturbed_local_run(
    workbench: Workbench, served: Path, num_workers: int, ranks: int
) -> None:
    config, log = workbench.training("cot_sft"), workbench.root / "log.txt"
    more = ["--trainer.max_steps=12", f"--data.num_workers={num_workers}", f"--trainer.devices={ranks}"]
    assert run_apart(config, *more, "--phase=local", f"--data.shards={served}", log=log) == 0, log.read_text()
    with ShardServer(served) as server:
        for k, fault in enumerate((cut(5000), status(500), hang_up)):
            server.faults[f"shard-0000{k}.tar"] = [fault]
        arguments = [*more, "--phase=remote", f"--data.shards={server.url}/shard-{{00000..00003}}.tar"]
        for step in (2, 5, 9):
            checkpoint = workbench.outputs / f"tiny/remote/checkpoints/step-{step:08d}.ckpt"
            kill_behind(checkpoint, ["--config", config, *arguments], log)
        assert run_apart(config, *arguments, log=log) == 0, log.read_text()
    assert log.read_text().count("going on from") == 3
    rows, merged = {}, {}
    for phase in ("local", "remote"):
        folder = workbench.outputs / "tiny" / phase
        rows[phase] = [
            {name: value for name, value in row.items() if not name.startswith("speed/")}
            for row in metrics_csv.read_rows(folder)
        ]
        merged[phase] = (folder / "merged/model.safetensors").read_bytes()
    assert len(rows["local"]) == 12 and rows["local"] == rows["remote"], "losses, step by step"
    assert merged["local"] == merged["remote"]


def test_a_mixture_is_trained_on_and_its_shares_are_logged(workbench: Workbench, served: Path) -> None:
    mixture = f'{{"{served}": 0.75, "{workbench.root / "shards"}": 0.25}}'
    train.main(["--config", workbench.training("cot_sft"), "--trainer.max_steps=4", f"--data.shards={mixture}"])
    rows = metrics_csv.read_rows(workbench.outputs / "tiny/cot_sft")
    assert float(rows[-1]["data/share_0"]) == 0.75 and float(rows[-1]["data/share_1"]) == 0.25


def test_faults_of_sources_are_told_before_anything_is_loaded(workbench: Workbench, served: Path) -> None:
    config = workbench.training("cot_sft", model=str(workbench.root / "nowhere"))
    with ShardServer(served) as server:
        sources = f'["{server.url}/gone", "ftp://host/a", "{served}/shard-00009.tar"]'
        with pytest.raises(SystemExit) as caught:
            train.main(["--config", config, f"--data.shards={sources}", "--data.cache_gib=0"])
    for words in ("gone/manifest.json cannot be fetched: HTTP 404", "ftp:// is none of", "shard-00009.tar", "nowhere"):
        assert words in str(caught.value), words
    assert "cache_gib=0.0 must be greater than 0" in str(caught.value)


def test_weights_of_sources_that_rejection_sampling_makes_one_are_refused(workbench: Workbench, served: Path) -> None:
    rejection = {"class_path": "callbacks.rejection_sampling.RejectionSampling", "init_args": {"num_samples": 2}}
    config = workbench.training("grpo", [rejection])
    with pytest.raises(SystemExit, match=r"RejectionSampling: data\.shards has weights"):
        train.main(["--config", config, f'--data.shards={{"{served}": 1.0, "{workbench.root / "shards"}": 2.0}}'])


def test_a_shard_that_is_gone_ends_a_run_in_few_lines(workbench: Workbench, served: Path) -> None:
    with ShardServer(served) as server:
        server.stays = True
        for k in range(4):
            server.faults[f"shard-0000{k}.tar"] = [status(404)]
        with pytest.raises(SystemExit, match=r"shard-0000\d\.tar cannot be fetched: HTTP 404") as caught:
            train.main(["--config", workbench.training("cot_sft"), f"--data.shards={server.url}"])
    assert len(str(caught.value).splitlines()) <= 5


def test_a_model_is_evaluated_on_shards_of_a_server(workbench: Workbench, served: Path) -> None:
    out = workbench.outputs / "eval"
    with ShardServer(served) as server:
        where = [f"--data_root={workbench.root}", f"--bench={server.url}", f"--output={out}"]
        evaluate.main([f"--model={workbench.model}", *where, "--decoding.max_new_tokens=4"])
    (remote,) = out.glob("shards-*/result.json")
    where[1:] = [f"--bench={served}", f"--output={workbench.outputs / 'local'}"]
    evaluate.main([f"--model={workbench.model}", *where, "--decoding.max_new_tokens=4"])
    (local,) = (workbench.outputs / "local").glob("shards-*/result.json")
    found, expected = read_json(remote), read_json(local)
    assert found["n"] == expected["n"] == 12
    assert found["columns"] == expected["columns"] and found["averages"] == expected["averages"]
