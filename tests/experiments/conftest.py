"""A whole tiny experiment: shards, a MIG-Bench of two tasks, and YAMLs that train a few updates of the tiny model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
import yaml

from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_writer import ShardWriter
from tests.conftest import QUESTIONS, SIZES, random_png
from tests.lightning_modules.grpo_modules import grouped

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Workbench:
    """Paths of the tiny experiment; `outputs` is empty at first."""

    root: Path
    model: Path

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def benchmark(self) -> dict[str, str]:
        return {"annotations": str(self.root / "MIG-Bench" / "MIG_data.json"), "image_root": str(self.root)}

    def write_yaml(self, name: str, settings: dict) -> str:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def training(self, phase: str, callbacks: Sequence[dict] = (), **model: object) -> str:
        """Path of a training YAML: two updates of two prompts on the CPU, with a checkpoint after each."""
        is_grpo = phase == "grpo"
        class_path = "lightning_modules.grpo.GRPO" if is_grpo else "lightning_modules.cot_sft.CoTSFT"
        checkpoints = {"every_n_steps": 1}
        every = [
            {"class_path": "callbacks.merge_adapter.MergeAdapter"},
            {"class_path": "callbacks.checkpoints.WindowCheckpoint", "init_args": checkpoints},
            {"class_path": "callbacks.save_on_interrupt.SaveOnInterrupt"},
        ]
        init_args = {"model": str(self.model), "lora": {"rank": 4, "alpha": 8}, "learning_rate": 1e-3}
        if is_grpo:  # of an untrained model all rewards are 0
            sampling = {"group_size": 2, "max_new_tokens": 6, "temperature": 1.0}
            init_args |= grouped(**sampling | {"skip_zero_advantage": False} | model)
        else:
            init_args |= model
        settings = {
            "experiment": "tiny",
            "phase": phase,
            "outputs": str(self.outputs),
            "model": {"class_path": class_path, "init_args": init_args},
            "data": {"shards": str(self.root / "shards"), "batch_size": 2, "with_target": not is_grpo},
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [*callbacks, *every],
            },
        }
        return self.write_yaml(phase, settings)


@pytest.fixture(autouse=True)
def no_open_wandb_run() -> None:
    """A run that an earlier test in this process left open would be taken for the new one."""
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    with ShardWriter(root / "shards") as writer:
        for index in range(12):
            files = tuple(f"{index}_{image}.png" for image in range(2))
            parts = (*(ImagePart(image) for image in range(2)), TextPart(rng.choice(QUESTIONS)))
            answer = BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "ring")
            sample = Sample(f"tiny/{index}", "test", "diff", files, parts, answer, "It is there.")
            writer.add(LoadedSample(sample, tuple(random_png(rng, rng.choice(SIZES)) for _ in files)))
    records = []
    for index, task in enumerate(("diff", "reasoning", "diff", "reasoning")):
        names = [f"./MIG-Bench/images/{task}/{index}_{image}.png" for image in range(2)]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(random_png(rng, rng.choice(SIZES)))
        records.append(
            {
                "task": task,
                "images": names,
                "question": "Find it and locate it in the second image. ",
                "answer": [0.1, 0.2, 0.7, 0.8],
                "additional_info": "",
                "need_format": True,
            }
        )
    (root / "MIG-Bench" / "MIG_data.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def workbench(tiny_world: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["train"])  # LightningCLI warns when it is given arguments in two ways
    for name in ("shards", "MIG-Bench"):
        (tmp_path / name).symlink_to(tiny_world / name)
    return Workbench(tmp_path, tiny_model_dir)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What is logged to W&B, in order, with the run's id, group, job type and tags."""
    calls, log = [], wandb.Run.log

    def note(run: wandb.Run, data: dict) -> None:
        calls.append({"id": run.id, "group": run.group, "job_type": run.job_type, "tags": run.tags} | data)
        log(run, data)

    monkeypatch.setattr(wandb.Run, "log", note)
    return calls


REJECTION = {
    "class_path": "callbacks.rejection_sampling.RejectionSampling",
    "init_args": {"num_samples": 2, "max_new_tokens": 6},
}


def run_apart(config: str, *more: str, log: Path, timeout: float | None = None, **environment: object) -> int:
    """The run as a process of its own; its exit code."""
    command = [sys.executable, "-m", "tests.experiments.text_reward", "--config", config, *more]
    environment = {name: str(value) for name, value in environment.items()}
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    variables.pop("WANDB_SERVICE", None)  # else it would be one with the run that an earlier test made
    with log.open("a") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        return subprocess.run(command, cwd=ROOT, env=variables, timeout=timeout, **streams).returncode


def rolling_back(workbench: Workbench) -> str:
    """A GRPO run whose entropy is out of bounds, as any policy's is, in every window of two batches."""
    bounds = {"grpo/entropy": {"low": 99.0}}
    settings = {"bounds": bounds, "action": "roll_back", "average_over": 2, "max_rollbacks": 1}
    guard = {"class_path": "callbacks.collapse_guard.CollapseGuard", "init_args": settings}
    return workbench.training("grpo", [guard])


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the sweep and to the trial it runs, as when a machine goes down."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    for child in children:
        os.killpg(int(child), signal.SIGKILL)
    process.wait()


@pytest.fixture
def start_apart() -> Iterator[Callable[..., subprocess.Popen]]:
    """start_apart(config, outputs, poll=…, hold=…) starts a sweep as a process of its own, which ends with the test.

    poll: seconds between its looks at a trial. hold: the trial that waits behind its first step (sweep_trial.py).
    """
    started: list[subprocess.Popen] = []

    def start(config: Path, outputs: Path, poll: float = 1.0, hold: str = "") -> subprocess.Popen:
        code = "from experiments import sweep; from experiments.sweeps import trials; "
        code += f"trials.POLL_SECONDS = {poll}; sweep.main()"
        command = [sys.executable, "-c", code, "--config", str(config), "--outputs", str(outputs)]
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=os.environ | {"HOLD": hold}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill_all(process)
