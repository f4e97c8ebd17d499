"""The pipeline that `make chaos` kills: the nano one, made short, with all processes that any start of it has left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence.files import read_json, write_atomic
from experiments.runs.wandb_runs import child_environment

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "experiments/configs/nano"
EXPERIMENT, STAGES = "chaos", ("cot_sft", "grpo")
POLL_SECONDS = 0.02
HANG_SECONDS = 300.0  # a pipeline that has lost one process must end by itself within it


def write_configs(folder: Path, model: str) -> Path:
    """The nano configurations with a small synthetic dataset and few steps; the pipeline's."""

    def load(name: str) -> dict[str, Any]:
        return yaml.safe_load((NANO / f"{name}.yaml").read_text())

    def save(name: str, settings: dict[str, Any]) -> str:
        write_atomic(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
        return str(folder / f"{name}.yaml")

    dataset = folder.parent / "dataset"
    benchmark = {"annotations": str(dataset / "MIG-Bench/MIG_data.json"), "image_root": str(dataset)}
    small = {"train_samples": 300, "eval_per_task": 3, "pool_samples": 40}
    shards = load("shards") | {"root": str(dataset)} | small
    evaluation = load("eval") | {"data_root": str(dataset), "decoding": {"max_new_tokens": 96, "prompts_per_batch": 3}}
    changes = {
        "cot_sft": ({}, {"shards": str(dataset / "shards/sft"), "batch_size": 4}, 24),
        "grpo": (
            {"rollout": {"group_size": 4, "max_new_tokens": 96}, "update": {"minibatches": 2}, "accumulate": 2},
            {"shards": str(dataset / "shards/rl_pool"), "batch_size": 2},
            8,
        ),
    }
    init_args = {
        "WindowCheckpoint": {"every_n_steps": 3, "keep_last": 2, "keep_every": 6},
        "MIGBench": benchmark | {"every_n_steps": 4, "validation_limit_per_task": 1, "max_new_tokens": 96},
        "Previews": benchmark | {"max_new_tokens": 32},
        # A model that has hardly been trained seldom meets a box; nearly so is enough here.
        "RejectionSampling": {"num_samples": 4, "max_new_tokens": 96, "prompts_per_batch": 5, "threshold": 0.1},
    }
    for stage, (module, data, steps) in changes.items():
        settings = load(stage)
        given = settings["model"]["init_args"]
        given |= {name: given.get(name, {}) | v if isinstance(v, dict) else v for name, v in module.items()}
        settings["data"] |= data
        settings["trainer"] |= {"max_steps": steps, "log_every_n_steps": 1, "enable_progress_bar": False}
        for callback in settings["trainer"]["callbacks"]:
            if more := init_args.get(callback["class_path"].split(".")[-1]):
                callback["init_args"] = more
        save(stage, settings)
    stages = {stage: str(folder / f"{stage}.yaml") for stage in STAGES}
    pipeline = {"experiment": EXPERIMENT, "model": model, "stages": stages}
    pipeline |= {"synthetic_dataset": save("shards", shards), "evaluation": save("eval", evaluation)}
    return Path(save("pipeline", pipeline))


class Pipeline:
    """The pipeline's processes, each start in a session of its own; what an earlier one has left is found too."""

    def __init__(self, config: Path, outputs: Path) -> None:
        self.folder = outputs / EXPERIMENT
        where = ["--config", str(config), "--outputs", str(outputs)]
        self.command = [sys.executable, "-m", "experiments.pipeline", *where]
        self.log = outputs.with_suffix(".log")
        self.process: subprocess.Popen | None = None
        self.sessions: set[int] = set()

    def start(self) -> None:
        environment = child_environment() | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        self.sessions.add(self.process.pid)

    def members(self) -> dict[int, str]:
        """Process id -> command, of this program's living processes, those of earlier starts included."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                command = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):  # it has just ended
                continue
            if int(session) in self.sessions and state != "Z" and "experiments." in command:
                found[int(stat.parent.name)] = command
        return found

    def phase(self) -> str | None:
        """Where it is now; None between two steps and in what belongs to no phase."""
        for command in self._steps():
            words = command.split()
            if "experiments.generate_synthetic" in command:
                return "dataset"
            if "experiments.evaluate" in command:
                return f"{Path(words[words.index('--output') + 1]).parent.name}: evaluation"
            if "experiments.train" in command:
                return self._training(words[words.index("--phase") + 1])
        done = [stage for stage in STAGES if read_json(self.folder / stage / "evaluated.json").get("done")]
        results = read_json(self.folder / "results.json").get("stages", [])
        waiting = [name for name in done if name not in [stage["name"] for stage in results]]
        return f"{waiting[0]}: report" if waiting else None

    def _steps(self) -> list[str]:
        """Commands of the pipeline's own children: seldom more than one, and read often."""
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode() for child in children]
        except OSError:  # one has just ended
            return []

    def _training(self, stage: str) -> str:
        folder = self.folder / stage
        if (folder / "merged.unfinished").exists():
            return f"{stage}: merge"
        sampling = stage == "grpo" and not (folder / "rejection_sampling/histogram.json").is_file()
        return f"{stage}: {'rejection sampling' if sampling else 'training'}"

    def kill(self, kind: str, rng: random.Random) -> str:
        """Kill all, one, or ask the pipeline to end; whom it met."""
        members = self.members()
        if kind == "all" or not members:
            for session in self.sessions:
                with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                    os.killpg(session, signal.SIGKILL)
            return f"{len(members)} processes"
        if kind == "term":
            self.process.terminate()
            return "the pipeline"
        chosen = rng.choice(sorted(members))
        os.kill(chosen, signal.SIGKILL)
        leader = min(pid for pid, command in members.items() if command == members[chosen])
        module = next(word for word in members[chosen].split() if word.startswith("experiments."))
        return f"{module}{'' if chosen == leader else ', second rank'}"

    def wait(self, seconds: float = HANG_SECONDS) -> int:
        """The exit code. Ends the program where it does not end: a hang is a failure."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            sys.exit(f"the pipeline did not end within {seconds:.0f} s: {self.log}")

    def wait_for_phase(self, phase: str) -> None:
        """Until it has ended or is in another phase."""
        end = time.monotonic() + HANG_SECONDS
        while self.process.poll() is None and (self.phase() or phase) == phase:
            if time.monotonic() > end:
                self.wait(0.0)
            time.sleep(POLL_SECONDS)

    def run_watched(self) -> dict[str, float]:
        """Run it to its end; the seconds spent in each phase."""
        spent: Counter[str] = Counter()
        self.start()
        last = time.monotonic()
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            spent[self.phase() or ""] += now - last
            last = now
        if self.process.returncode != 0:
            sys.exit(f"the undisturbed pipeline ended with {self.process.returncode}: {self.log}")
        return dict(spent)
