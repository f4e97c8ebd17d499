"""The whole pipeline: synthetic dataset, base, CoT-SFT, rejection sampling and GRPO, with MIG-Bench after each stage.

    python -m experiments.pipeline --config experiments/configs/nano/pipeline.yaml --seed 1

Every step is a separate process. A step that was finished with the same command, configuration and inputs is skipped.
So after a kill, only the work of one step since its last checkpoint is lost. If the project's source files have changed
since, the command asks before anything runs: --keep takes the existing results, --redo makes them again.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from callbacks import preemption
from datamodules.benchmarks import mig_bench
from datamodules.metrics.result_files import RESULT, read_result, result_folder
from datamodules.persistence import folder_lock
from datamodules.persistence.durations import in_words
from experiments.evaluation.evaluation_settings import PHASE_FOLDER, read_settings
from experiments.generate_synthetic import absent_data, build_synthetic, dataset_configs
from experiments.reports import pipeline_report
from experiments.runs import preflight, run_identity
from experiments.runs.changes import Choice, choice_of, spell_out
from experiments.runs.command_line.run_words import (
    config_files,
    given_modules,
    given_shards,
    last_given,
    read_yamls,
    replaced,
    seeded,
    setting_given,
    yaml_fault,
)
from experiments.runs.command_line.step_checks import check_steps
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.results import BASE, Results, Stage, current_commit, make_stage, write_results
from experiments.runs.sharing.model_card import write_model_card
from experiments.runs.subprocess_steps import ROOT, Plan, Step, run_step, say, settle
from experiments.runs.user_files import find_user_files

EVALUATION = "evaluation"  # its overrides are for the evaluations of all stages
QUESTION_FILES = (mig_bench.ANNOTATIONS, mig_bench.IMAGES)  # changed images are other questions too


def experiment_folder(outputs: str, experiment: str, seed: int) -> Path:
    """The folder of an experiment at this seed."""
    return Path(outputs, seeded(experiment, seed))


def check_stages(stages: Iterable[str], overrides: Mapping[str, str]) -> None:
    """Ends the program if a stage's name cannot be a folder's name, or overrides name an unknown stage or are no words
    of a command line.
    """
    if unknown := sorted(set(overrides) - set(stages) - {EVALUATION}):
        sys.exit(f"overrides for {unknown}, but the stages are {sorted(stages)} and {EVALUATION!r}")
    if BASE in stages:
        sys.exit(f"stages={sorted(stages)}: {BASE!r} is the name of the first stage, the model as it is given")
    if EVALUATION in stages:
        sys.exit(f"stages={sorted(stages)}: overrides.{EVALUATION} is for all evaluations, so no stage has this name")
    if wrong := [stage for stage in stages if Path(stage).name != stage or "." in stage or not stage]:
        sys.exit(f"stages={wrong}: a name must be a folder name without a dot; a dot marks runs that were set aside")
    for stage, words in overrides.items():
        try:
            shlex.split(words)
        except ValueError as error:
            sys.exit(f"overrides.{stage}={words!r} are no words of a command line: {error}")


def check_files(files: Mapping[str, str | None]) -> None:
    """Ends the program before anything runs if files of settings do not exist or are no settings; the message names
    these fields.
    """
    missing = [f"{field}={path!r}" for field, path in files.items() if path is not None and not Path(path).is_file()]
    if missing:
        sys.exit(f"no such file: {', '.join(missing)}")
    for field, path in files.items():
        fault = None if path is None else yaml_fault(Path(path))
        if fault:
            sys.exit(f"{field}={path!r} is no YAML of settings: {fault}")


@dataclass(frozen=True)
class Phase:
    """A training phase: the YAML `config`, and the stage `start` whose model it is trained from."""

    start: str
    config: str


@dataclass
class Pipeline:
    """The stages of one experiment and their folders: BASE, and then the training phases in order.

    Args:
        folder: the experiment's folder; each stage has a folder in it.
        seed: seed of all training.
        model: the model of BASE, folder or Hub name.
        evaluation: YAML of experiments.evaluate.
        phases: stage -> its training phase. A phase starts from BASE or from a phase before it.
        overrides: more arguments, by stage or by "evaluation".
        environment: stage -> more variables for its processes.
        choice: whether steps that were made with other source files are kept or repeated.
        plan: the list of all steps, for messages and for the time left; several pipelines may share it.
        gpus: GPUs of each training and evaluation; None: as the configurations say.
    """

    folder: Path
    seed: int
    model: str
    evaluation: str
    phases: Mapping[str, Phase]
    overrides: Mapping[str, str]
    environment: Callable[[str], Mapping[str, str]] = lambda stage: {}
    choice: Choice | None = None
    plan: Plan | None = None
    gpus: int | None = None

    def __post_init__(self) -> None:
        find_user_files(phase.config for phase in self.phases.values())
        find_user_files(word for words in self.overrides.values() for word in shlex.split(words))
        self.commit, self.stages = current_commit(ROOT), {}
        self.evaluation_settings = read_settings(self.evaluation, shlex.split(self.overrides.get("evaluation", "")))
        self._check_overrides()

    def _check_overrides(self) -> None:
        """Ends the program if overrides replace what the pipeline itself gives to its steps: it would then read other
        results than those of its stages.
        """
        steps = {stage: (self.training(stage).command, ("experiment", "phase", "outputs")) for stage in self.phases}
        steps[EVALUATION] = self.evaluation_of(BASE).command, ("model", "output")
        for stage, (words, names) in steps.items():
            faults = replaced(words, names)
            faults += [f"seed={seed}"] if (seed := last_given(words, "seed")) is not None else []
            bench = setting_given(words, read_yamls(words), "bench")
            if bench not in (None, "all") and mig_bench.NAME not in bench.split(","):
                faults.append(f"bench={bench}, without {mig_bench.NAME}")
            if faults:
                sys.exit(
                    f"overrides.{stage}: {', '.join(faults)}. The pipeline itself gives these to its steps: leave them "
                    "out, of a YAML behind --config too. Another experiment, seed or model is a setting of the pipeline"
                )

    @property
    def models(self) -> list[str]:
        """The models that the phases produce."""
        return [self.model_of(stage) for stage in self.phases]

    @property
    def results(self) -> Results:
        """The finished stages, in the pipeline's order."""
        stages = tuple(self.stages[name] for name in (BASE, *self.phases) if name in self.stages)
        return Results(self.folder.name, self.seed, self.commit, stages)

    def model_of(self, stage: str) -> str:
        """The model that the stage produces."""
        return self.model if stage == BASE else str(self.folder / stage / "merged")

    def training(self, stage: str) -> Step:
        """The training phase, which writes <folder>/<stage>/merged."""
        config, model = self.phases[stage].config, self.model_of(self.phases[stage].start)
        command = ["experiments.train", "--config", config, "--model.init_args.model", model]
        command += ["--experiment", self.folder.name, "--phase", stage, "--outputs", str(self.folder.parent)]
        command += ["--seed_everything", str(self.seed), *shlex.split(self.overrides.get(stage, ""))]
        command += [] if self.gpus is None else ["--gpus", str(self.gpus)]
        settings = read_yamls(command)
        inputs = (config, model, *given_shards(command, settings), *_more_configs(command))
        return Step(
            title=f"{stage}: training",
            marker=self.folder / stage / "trained.json",
            command=tuple(command),
            inputs=inputs,
            environment=self.environment(stage),
            modules=("experiments.train", *given_modules(command, settings)),
            choice=self.choice,
            proof=self.folder / stage / run_identity.DONE,
            checks=True,
        )

    def evaluation_of(self, stage: str) -> Step:
        """The step that measures MIG-Bench for the model of the stage."""
        folder, model = self.folder / stage, self.model_of(stage)
        home, settings = folder / PHASE_FOLDER, self.evaluation_settings
        command = ["experiments.evaluate", "--config", self.evaluation, "--model", model, "--output", str(home)]
        command += [] if self.gpus is None else ["--processes", str(self.gpus)]
        command += ["--bench", mig_bench.NAME, *shlex.split(self.overrides.get("evaluation", ""))]
        questions = [str(Path(settings.data_root, mig_bench.FOLDER, name)) for name in QUESTION_FILES]
        result = home / result_folder(mig_bench.NAME, settings.limit, settings.decoding.generation) / RESULT
        return Step(
            title=f"{stage}: MIG-Bench",
            marker=folder / "evaluated.json",
            command=tuple(command),
            inputs=(self.evaluation, model, *questions, *_more_configs(command)),
            result=result,
            environment=self.environment(stage),
            modules=("experiments.evaluate",),
            choice=self.choice,
            proof=result,
            checks=stage == BASE,  # the later ones have the same settings
        )

    def training_seconds(self, stage: str) -> float | None:
        """The seconds of its training if this stage and all earlier stages are trained; otherwise None."""
        if stage == BASE:
            return 0.0
        if self.training_seconds(self.phases[stage].start) is None:
            return None
        return self.training(stage).seconds_if_done()

    def seconds_if_done(self, stage: str) -> float | None:
        """The seconds of the stage if all its steps are finished; otherwise None."""
        evaluating = self.evaluation_of(stage).seconds_if_done()
        training = None if evaluating is None else self.training_seconds(stage)
        return None if training is None else training + evaluating

    def steps(self, wanted: Collection[str] | None = None) -> list[Step]:
        """All steps of BASE and of the wanted stages, by default of all stages, in order."""
        names = [name for name in self.phases if wanted is None or name in wanted]
        trained = [step for name in names for step in (self.training(name), self.evaluation_of(name))]
        return [self.evaluation_of(BASE), *trained]

    def list_done(self) -> None:
        """Write results.json and report.html with exactly the stages that are done."""
        seconds = {stage: self.seconds_if_done(stage) for stage in (BASE, *self.phases)}
        self.stages = {stage: self._found(stage, spent) for stage, spent in seconds.items() if spent is not None}
        if self.stages or (self.folder / "results.json").is_file():
            self._write()

    def run(self, stage: str) -> None:
        """Train (except BASE) and evaluate, unless this is done already; then write and print the results."""
        seconds = 0.0 if stage == BASE else run_step(self.training(stage), self.plan)
        step = self.evaluation_of(stage)
        step.marker.parent.mkdir(parents=True, exist_ok=True)
        seconds += run_step(step, self.plan)
        self.stages[stage] = self._found(stage, seconds)
        self._write()
        if stage != BASE:
            write_model_card(self.folder / stage)
        starts = pipeline_report.stage_starts(self.folder, self.results)
        print(pipeline_report.stage_text(self.results, starts), flush=True)

    def _found(self, stage: str, seconds: float) -> Stage:
        return make_stage(stage, read_result(self.evaluation_of(stage).result), seconds)

    def _write(self) -> None:
        write_results(self.folder / "results.json", self.results)
        pipeline_report.write_report(self.folder)


def _more_configs(words: Sequence[str]) -> list[str]:
    """The YAML files that overrides lay over the first one: their content decides about the result too."""
    return [str(file) for file in config_files(words)[1:]]


def run(
    experiment: str,
    model: str,
    evaluation: str,
    stages: dict[str, str],
    synthetic_dataset: str | list[str] | None = None,
    seed: int = 0,
    outputs: str = "outputs",
    overrides: dict[str, str] | None = None,
    minutes: dict[str, float] | None = None,
    note: str = "",
    redo: bool = False,
    keep: bool = False,
    gpus: int | None = None,
    check_without: list[str] | None = None,
) -> None:
    """Run the whole pipeline.

    Args:
        experiment: name of the folder in `outputs`; "-seed1" and so on is added at other seeds than 0
        model: the base model, folder or Hub name
        evaluation: YAML of experiments.evaluate
        stages: name of each training phase, in order, and its YAML for experiments.train
        synthetic_dataset: YAML of experiments.generate_synthetic, or a list of them; null if the data exist already
        seed: seed of all training
        outputs: folder of all experiments
        overrides: arguments for one stage, or for "evaluation": --overrides.grpo="--model.loss.kl_beta=0.01"
        minutes: expected minutes of each step, by its title such as "cot_sft: training", for the time left
        note: a limitation of the results; printed at the beginning and at the end
        redo: repeat results that were made with other source files of the project
        keep: keep results that were made with other source files of the project
        gpus: number of GPUs for each training, with the same total batch, and for each evaluation
        check_without: only check the settings, and read nothing from these paths, which are still to be made
    """
    # 1. Check all settings before anything runs.
    check_stages(stages, overrides or {})
    datasets = dataset_configs(synthetic_dataset)
    check_files(
        {"evaluation": evaluation}
        | {f"synthetic_dataset[{n}]": config for n, config in enumerate(datasets)}
        | {f"stages.{n}": config for n, config in stages.items()}
    )
    preflight.raise_all(preflight.seed_problems(seed))
    start = time.monotonic()
    folder = experiment_folder(outputs, experiment, seed)
    starts = [BASE, *stages]
    phases = {stage: Phase(start, config) for start, (stage, config) in zip(starts, stages.items(), strict=False)}
    choice = choice_of(redo, keep)
    pipeline = Pipeline(folder, seed, model, evaluation, phases, overrides or {}, choice=choice, gpus=gpus)
    with folder_lock.locked(folder):
        check_steps(pipeline.steps(), [*absent_data(datasets), *pipeline.models, *(check_without or [])])
        if check_without is not None:
            return
        # 2. The synthetic datasets, and the choice for steps that other source files have made.
        build_synthetic(datasets)
        settle(pipeline.steps())
        pipeline.plan = Plan(pipeline.steps(), minutes or {})
        left = pipeline.plan.seconds_of(pipeline.steps())
        say(f"{len(pipeline.steps())} stages" + ("" if left is None else f", about {in_words(left)}") + f". {note}")
        # 3. Run the stages. The results on disk always list exactly the finished stages.
        pipeline.list_done()
        for stage in starts:
            pipeline.run(stage)
    say(f"{(time.monotonic() - start) / 60:.1f} minutes; {folder / 'results.json'}, {folder / 'report.html'}. {note}")
    last = pipeline.model_of(starts[-1])
    say(f'model: {last}\nask it: make ask MODEL={last} IMAGES="a.jpg b.jpg" QUESTION="..."')
    say(f"compare the stages: make compare RUNS={folder}")


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make pipeline`."""
    preemption.requeue_at_once()  # between two steps
    run_cli(run, spell_out(args))


if __name__ == "__main__":
    main()
