"""The whole ladder: the world, base, CoT-SFT, rejection sampling and GRPO, with MIG-Bench before, between and after.

    python -m experiments.pipeline --config experiments/configs/nano/pipeline.yaml --seed 1

Every step is a process of its own and is skipped when it was finished with the same command, configuration and inputs,
so a kill at any moment costs nothing but the step's work since its last checkpoint.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from callbacks import preemption
from datamodules.artefacts import fingerprint, path_fingerprint, read_json
from datamodules.shards import folder_list
from experiments import checks, phases, report
from experiments.results import BASE, Results, current_commit, make_stage, write_results

ROOT = Path(__file__).resolve().parents[1]
CLOCK_SECONDS = 5.0  # how often the time spent is written down: a kill loses no more of it


@dataclass(frozen=True)
class Step:
    """One process. `marker` is the file that says it is done; `inputs` are the files and folders that it reads.

    `result` is a JSON file that it writes and others may write too, with a key: only with that key is the step done.
    `environment` adds variables for its process, such as W&B names: none that change what it computes.
    """

    title: str
    marker: Path
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def result_key(self) -> str | None:
        return read_json(self.result).get("key") if self.result else None

    def key(self) -> str:
        return fingerprint(self.command, [path_fingerprint(path) for path in self.inputs])

    def seconds_if_done(self, key: str) -> float | None:
        """The seconds that it took, where it is done with this key; else None."""
        marker = read_json(self.marker)
        done = marker.get("key") == key and marker["done"] and marker.get("result_key") == self.result_key()
        return marker["seconds"] if done else None


def run_step(step: Step) -> float:
    """Run the step unless it is done; the seconds it took, over all attempts. Ends the program if the step fails."""
    key, old = step.key(), read_json(step.marker)
    seconds = step.seconds_if_done(key)
    if seconds is not None:
        say(f"{step.title}: done before, in {seconds:.0f} s")
        return seconds
    say(f"{step.title}: python -m {shlex.join(step.command)}")
    before, start = old["seconds"] if old.get("key") == key else 0.0, time.monotonic()

    def note(done: bool) -> float:
        seconds = round(before + time.monotonic() - start, 1)
        marker = read_json(step.marker)  # another's that is finished stays until the step moves it aside, or is done
        free = done or marker.get("key") == key or not marker.get("done")
        if step.marker.parent.is_dir() and free:  # the step itself makes its folder
            content = {"key": key, "result_key": step.result_key(), "done": done, "seconds": seconds}
            phases.write_marker(step.marker.parent, step.marker.name, **content)
        return seconds

    def tick() -> None:
        try:
            note(False)
        except OSError as error:  # only the clock: whether the step can go on, it finds out itself
            say(f"{step.title}: the time spent is not noted: {error}")

    code = run_process([sys.executable, "-m", *step.command], tick, step.environment)
    if code != 0:
        sys.exit(f"{step.title} ended with exit code {code}. The same command goes on from what is saved.")
    seconds = note(True)
    say(f"{step.title}: {seconds:.0f} s")
    return seconds


def run_process(command: list[str], tick: Callable[[], Any], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end, calling `tick` now and then; its exit code. `environment` adds to this process's own.

    SIGTERM is passed on to it. SLURM's warning stops it too, and the job is requeued when it has ended. Ctrl-C reaches
    it by itself; it is waited for, since it saves a checkpoint then.
    """
    # Not this process's own W&B service: it would hold the run of a step that has ended, and refuse it to the next.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    child = subprocess.Popen(command, cwd=ROOT, env=own | {preemption.LEFT_TO_PARENT: "1"} | dict(environment or {}))
    stopped = requeue = False

    def stop(signum: int, *_: Any) -> None:
        nonlocal stopped, requeue
        stopped = True
        requeue |= signum == preemption.REQUEUE_SIGNAL
        child.terminate()

    numbers = [signal.SIGTERM, *([preemption.REQUEUE_SIGNAL] if preemption.in_slurm_job() else [])]
    old = {number: signal.signal(number, stop) for number in numbers}
    try:
        while True:
            try:
                code = child.wait(CLOCK_SECONDS)
                if requeue:
                    preemption.requeue_job()
                return code or (128 + signal.SIGTERM if stopped else 0)
            except subprocess.TimeoutExpired:
                tick()
            except KeyboardInterrupt:
                stopped = True
                say("stopping: the step saves what it has")
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def experiment_folder(outputs: str, experiment: str, seed: int) -> Path:
    """Where an experiment of this seed lies."""
    return Path(outputs) / (experiment if seed == 0 else f"{experiment}-seed{seed}")


def check_stages(stages: Iterable[str], overrides: Iterable[str]) -> None:
    """Ends the program where a stage cannot be a folder's name, or overrides are for no stage."""
    if unknown := sorted(set(overrides) - set(stages) - {"evaluation"}):
        sys.exit(f"overrides for {unknown}, but the stages are {sorted(stages)} and 'evaluation'")
    if BASE in stages:
        sys.exit(f"stages={sorted(stages)}: {BASE!r} is the name of the first rung, which nothing is trained on")
    if wrong := [stage for stage in stages if Path(stage).name != stage or "." in stage or not stage]:
        sys.exit(f"stages={wrong}: a name must be one of a folder, without a dot: that marks runs that were set aside")


def check_files(files: Mapping[str, str | None]) -> None:
    """Ends the program, naming each field whose file is not there, before anything runs."""
    missing = [f"{field}={path!r}" for field, path in files.items() if path is not None and not Path(path).is_file()]
    if missing:
        sys.exit(f"no such file: {', '.join(missing)}")


def build_world(config: str) -> None:
    """Generate shards and benchmark, unless a finished world is there, of whatever settings it is.

    Its process is always run: it knows by itself whether there is anything to do.
    """
    command = ["experiments.shards", "--config", config, "--keep=true"]
    if run_process([sys.executable, "-m", *command], lambda: None) != 0:
        sys.exit("the world could not be built")


class Ladder:
    """The steps of one experiment, tied together by its folders.

    `overrides` has more arguments by stage, or by "evaluation"; `environment` gives a stage's processes more variables.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        evaluation: str,
        overrides: Mapping[str, str],
        environment: Callable[[str], Mapping[str, str]] = lambda stage: {},
    ) -> None:
        self.folder, self.seed = folder, seed
        self.evaluation, self.overrides, self.environment = evaluation, overrides, environment
        self.results = Results(folder.name, seed, current_commit(ROOT))

    def merged(self, stage: str) -> str:
        """The model that the stage leaves."""
        return str(self.folder / stage / "merged")

    def training(self, stage: str, config: str, model: str) -> Step:
        """The training phase from `model` to <folder>/<stage>/merged."""
        command = ["experiments.train", "--config", config, "--model.init_args.model", model]
        command += ["--experiment", self.folder.name, "--phase", stage, "--outputs", str(self.folder.parent)]
        command += ["--seed_everything", str(self.seed), *shlex.split(self.overrides.get(stage, ""))]
        inputs = (config, model, *_shards(config))
        marker, names = self.folder / stage / "trained.json", self.environment(stage)
        return Step(f"{stage}: training", marker, tuple(command), inputs, environment=names)

    def evaluation_of(self, stage: str, model: str) -> Step:
        """MIG-Bench of `model`, which the stage has left."""
        folder = self.folder / stage
        command = ["experiments.evaluate", "--config", self.evaluation, "--model", model, "--output", str(folder)]
        command += shlex.split(self.overrides.get("evaluation", ""))
        benchmark = yaml.safe_load(Path(self.evaluation).read_text())["annotations"]
        inputs, summary = (self.evaluation, model, benchmark), folder / "mig_bench.json"
        marker, names = folder / "evaluated.json", self.environment(stage)
        return Step(f"{stage}: MIG-Bench", marker, tuple(command), inputs, summary, names)

    def train(self, stage: str, config: str, model: str) -> float:
        """Run the training phase; its seconds."""
        return run_step(self.training(stage, config, model))

    def evaluate(self, stage: str, model: str, seconds: float) -> None:
        """MIG-Bench of `model`: a new rung in results.json, report.html and on the terminal."""
        step = self.evaluation_of(stage, model)
        step.marker.parent.mkdir(parents=True, exist_ok=True)
        seconds += run_step(step)
        self.results = self.results.with_stage(make_stage(stage, read_json(step.result), seconds))
        write_results(self.folder / "results.json", self.results)
        report.write_report(self.folder)
        print(report.ladder_text(self.results, report.stage_starts(self.folder, self.results)), flush=True)


def run(
    experiment: str,
    model: str,
    evaluation: str,
    stages: dict[str, str],
    world: str | None = None,
    seed: int = 0,
    outputs: str = "outputs",
    overrides: dict[str, str] | None = None,
) -> None:
    """Run the whole ladder.

    Args:
        experiment: name of the folder in `outputs`; "-seed1" and so on is added at other seeds than 0
        model: the base model, folder or Hub name
        evaluation: YAML of experiments.evaluate
        stages: name of each training phase, in order, and its YAML for experiments.train
        world: YAML of experiments.shards; null where the data are there already
        seed: seed of all training
        outputs: folder of all experiments
        overrides: arguments for one stage, or for "evaluation": --overrides.grpo="--model.beta=0.01"
    """
    check_stages(stages, overrides or {})
    check_files({"evaluation": evaluation, "world": world} | {f"stages.{n}": config for n, config in stages.items()})
    checks.raise_all(checks.seed_faults(seed))
    start = time.monotonic()
    folder = experiment_folder(outputs, experiment, seed)
    ladder = Ladder(folder, seed, evaluation, overrides or {})
    with phases.locked(folder):
        if world:
            build_world(world)
        ladder.evaluate(BASE, model, 0.0)
        for stage, config in stages.items():
            seconds = ladder.train(stage, config, model)
            model = ladder.merged(stage)
            ladder.evaluate(stage, model, seconds)
    say(f"{(time.monotonic() - start) / 60:.1f} minutes; {folder / 'results.json'}, {folder / 'report.html'}")


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def _shards(config: str) -> list[str]:
    return folder_list(yaml.safe_load(Path(config).read_text())["data"]["shards"])


def main(args: list[str] | None = None) -> None:
    """Entry point of `make pipeline`."""
    preemption.requeue_at_once()  # between two steps
    try:
        auto_cli(run, as_positional=False, args=args)
    except checks.SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
