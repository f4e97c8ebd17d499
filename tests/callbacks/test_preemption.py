"""SLURM's warning, with a scontrol that notes how it is called and what checkpoints there are then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import preemption
from callbacks.checkpoints import WindowCheckpoint
from callbacks.save_on_interrupt import SaveOnInterrupt
from tests.callbacks.conftest import FakeEngine, FakeModule, true_answer
from tests.callbacks.test_fit_callbacks import Sends

ROOT = Path(__file__).resolve().parents[2]


def put_scontrol(folder: Path, look_at: Path, code: int = 0) -> Path:
    """A scontrol in folder/bin; the file in which it notes its calls."""
    (folder / "bin").mkdir()
    script = folder / "bin/scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" $(ls {look_at}) >> {folder}/calls\nexit {code}\n')
    script.chmod(0o755)
    return folder / "calls"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return put_scontrol(tmp_path, tmp_path / "ckpt")


def train_until_warned(fit, model: Path, folder: Path) -> FakeModule:
    module = FakeModule(str(model), FakeEngine(true_answer))
    checkpoints = WindowCheckpoint(str(folder), every_n_steps=100)
    callbacks = [SaveOnInterrupt(), checkpoints, Sends(preemption.REQUEUE_SIGNAL)]
    with pytest.raises(SIGTERMException) as caught:
        fit(module, callbacks, max_steps=5, enable_checkpointing=True)
    assert caught.value.code == 143
    return module


@pytest.mark.parametrize(
    ("more", "job"), [({}, "17"), ({"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}, "9_4")]
)
def test_the_job_is_requeued_when_the_checkpoint_is_there(
    fit, tiny_model_dir, tmp_path: Path, calls: Path, monkeypatch, more: dict, job: str
) -> None:
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(preemption.REQUEUE_SIGNAL)
    module = train_until_warned(fit, tiny_model_dir, tmp_path / "ckpt")
    assert calls.read_text() == f"requeue {job} interrupted.ckpt\n"
    assert len(module.seen) == 2 * 2, "the batch was finished"
    assert signal.getsignal(preemption.REQUEUE_SIGNAL) == before


@pytest.mark.parametrize(("name", "value"), [("SLURM_PROCID", "1"), (preemption.LEFT_TO_PARENT, "1")])
def test_another_process_of_the_job_leaves_it_to_the_first(
    fit, tiny_model_dir, tmp_path: Path, calls: Path, monkeypatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    train_until_warned(fit, tiny_model_dir, tmp_path / "ckpt")
    assert (tmp_path / "ckpt/interrupted.ckpt").is_file() and not calls.exists()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "NODE_RANK"])
def test_of_the_ranks_that_lightning_or_torchrun_start_one_requeues(calls: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")  # of the batch script, and so of all that it starts
    monkeypatch.setenv(name, "1")
    preemption.requeue_job()
    assert not calls.exists()
    monkeypatch.setenv(name, "0")
    preemption.requeue_job()
    assert calls.read_text().split() == ["requeue", "17"]


def test_a_job_that_cannot_be_requeued_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    preemption.requeue_job()
    assert "job 17 is not requeued" in capsys.readouterr().out


def test_work_that_is_saved_as_it_comes_ends_at_once(calls: Path) -> None:
    code = (
        "import os, signal, time; from callbacks import preemption; preemption.requeue_at_once()\n"
        "os.kill(os.getpid(), signal.SIGUSR1); time.sleep(60); print('went on')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert run.returncode == 143 and "went on" not in run.stdout
    assert calls.read_text().split()[:2] == ["requeue", "17"]


def test_the_pipeline_requeues_when_its_step_has_saved(tmp_path: Path, calls: Path) -> None:
    saved = tmp_path / "ckpt"
    step = (
        "import os, pathlib, signal, sys, time\n"
        f"save = lambda *_: (time.sleep(0.5), pathlib.Path({str(saved)!r}).mkdir(), "
        f"pathlib.Path({str(saved / 'saved')!r}).touch(), sys.exit(143))\n"
        "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
    )
    code = (
        "import sys; from experiments.runs.subprocess_steps import run_process\n"
        f"sys.exit(run_process([sys.executable, '-c', {step!r}], lambda: None))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50)
    assert run.returncode == 143
    assert calls.read_text() == "requeue 17 saved\n"


@pytest.mark.parametrize("module", ["pipeline", "ablations"])
def test_a_warning_between_two_steps_requeues_too(calls: Path, module: str) -> None:
    """While inputs are hashed, or a lock is waited for."""
    code = (
        f"import os, signal, time; from experiments import {module} as program\n"
        "def run() -> None:\n    os.kill(os.getpid(), signal.SIGUSR1); time.sleep(60)\n"
        "program.run = run\nprogram.main([])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 143, run.stderr
    assert calls.read_text().split()[:2] == ["requeue", "17"]
