"""Training runs whose workers, or whose newest checkpoint, are not as they should be: they end in words, or go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from datamodules.encoding.encoder import Encoder
from datamodules.persistence import processes
from datamodules.streaming import workers
from experiments import train
from experiments.runs import metrics_csv, wandb_runs
from tests.datamodules.streaming.test_workers import may_mount
from tests.experiments.conftest import REJECTION, ROOT, Workbench


def test_too_little_shared_memory_is_told_before_anything_is_computed(workbench: Workbench, monkeypatch) -> None:
    monkeypatch.setattr(workers, "free_bytes", lambda folder: 2**16)
    config = workbench.training("grpo", [REJECTION])
    with pytest.raises(SystemExit, match=r"(?s)/dev/shm has 0 MiB free, but.*--shm-size=.*data.num_workers=0") as ended:
        train.main(["--config", config, "--trainer.logger=false", "--data.num_workers=2"])
    assert len(str(ended.value).splitlines()) <= 5
    folder = workbench.outputs / "tiny/grpo"
    assert not (folder / "rejection_sampling").exists() and not (folder / "checkpoints").exists()


@pytest.mark.skipif(not may_mount(), reason="no right to mount a small /dev/shm (unshare -m, as root)")
@pytest.mark.slow
def test_a_run_in_a_small_container_ends_in_words(workbench: Workbench) -> None:
    run = [sys.executable, "-m", "experiments.train", "--config", workbench.training("cot_sft")]
    run += ["--trainer.logger=false", "--data.num_workers=2"]
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = ["unshare", "-m", "sh", "-c", mount, "sh", *run]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stderr
    assert "/dev/shm has 0 MiB free, but the workers" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_ends_the_run_which_then_goes_on_as_one_left_alone(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    arguments = ["--config", workbench.training("cot_sft"), "--trainer.logger=false", "--data.num_workers=2"]
    arguments += ["--trainer.max_steps=5"]
    train.main([*arguments, "--phase=whole"])
    encode = Encoder.encode
    with monkeypatch.context() as patch:
        patch.setattr(processes, "STOPPED_SECONDS", 2.0)
        patch.setattr(Encoder, "encode", lambda self, loaded: _lose_worker(self, loaded, encode, signum))
        with pytest.raises(SystemExit, match="worker 1 of 2") as ended:
            train.main([*arguments, "--phase=lost"])
    message = str(ended.value)
    assert "The same command goes on from the last checkpoint" in message and len(message.splitlines()) <= 5
    train.main([*arguments, "--phase=lost"])
    whole, lost = (load_file(workbench.outputs / f"tiny/{name}/merged/model.safetensors") for name in ("whole", "lost"))
    assert all(whole[name].equal(lost[name]) for name in whole)


def _lose_worker(encoder: Encoder, loaded: object, encode: object, signum: int) -> object:
    """In the second worker, at its fourth sample."""
    worker = get_worker_info()
    encoder.__dict__["seen"] = encoder.__dict__.get("seen", 0) + 1
    if worker is not None and worker.id == 1 and encoder.__dict__["seen"] == 4:
        os.kill(os.getpid(), signum)
    return encode(encoder, loaded)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_as_before(workbench: Workbench, caplog) -> None:
    config = Path(workbench.training("cot_sft"))
    settings = yaml.safe_load(config.read_text())
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"].endswith("WindowCheckpoint"):
            callback["init_args"] |= {"keep_last": 9}
    config.write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(config), "--trainer.max_steps=3"]
    train.main(arguments)
    wandb_runs.finish_run()
    folder = workbench.outputs / "tiny/cot_sft"
    weights = load_file(folder / "merged/model.safetensors")
    losses = metrics_csv.read_curve(metrics_csv.read_rows(folder), "train/loss")
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "merged")
    newest = folder / "checkpoints/step-00000003.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    train.main(arguments)
    assert f"{newest} is damaged" in caplog.text
    assert newest.with_name("step-00000003.ckpt.damaged").is_file() and newest.is_file(), "it was made again"
    again = load_file(folder / "merged/model.safetensors")
    assert all(weights[name].equal(again[name]) for name in weights)
    assert metrics_csv.read_curve(metrics_csv.read_rows(folder), "train/loss") == losses


def test_a_run_without_a_whole_checkpoint_says_so_and_does_not_begin_again(workbench: Workbench) -> None:
    arguments = ["--config", workbench.training("cot_sft"), "--trainer.logger=false"]
    train.main(arguments)
    folder = workbench.outputs / "tiny/cot_sft"
    (folder / "done.json").unlink()
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    checkpoint.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"(?s)no checkpoint in .* is whole \(step-00000002.ckpt: it is empty\)"):
            train.main(arguments)
    assert not (folder / "done.json").exists()
