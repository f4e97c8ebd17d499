"""Run the paper's ablation at several seeds. Each row is trained from the model of another row; then rows are compared.

    python -m experiments.ablations --config experiments/configs/nano/ablations.yaml --seeds '[0, 1]'

The rows of a seed are in the experiment folder of `make pipeline SEED=…` and use the same steps. A step that one of the
two commands has finished is not run again. After a kill at any time, the same command continues from the saved state.
If the project's source files have changed since, the command asks before anything runs: --keep takes the existing
results, --redo makes them again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from callbacks import preemption
from datamodules.persistence import folder_lock
from datamodules.persistence.files import write_atomic
from datamodules.persistence.user_error import UserError
from experiments.generate_synthetic import absent_data, build_synthetic, dataset_configs
from experiments.pipeline import Phase, Pipeline, check_files, check_stages, experiment_folder
from experiments.reports import ablation_report
from experiments.reports.ablation_summary import FINDING_FIGURES, Comparison, Finding
from experiments.runs import preflight, wandb_runs
from experiments.runs.changes import choice_of, spell_out
from experiments.runs.command_line.run_words import laid_over
from experiments.runs.command_line.step_checks import check_steps
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.results import BASE
from experiments.runs.run_identity import callback_entries
from experiments.runs.subprocess_steps import Plan, say, settle
from experiments.runs.user_files import also_beside


@dataclass(frozen=True)
class Row:
    """One row: a training phase, and the row whose model it is trained from.

    Args:
        start: the row whose model it is trained from; "base" is the given model.
        config: YAML of the phase.
        without: class names of callbacks to remove from it.
        overrides: more arguments for experiments.train.
        changes: YAML files whose settings replace those of `config`, in order; lists are replaced completely.
    """

    start: str
    config: str
    without: list[str] = field(default_factory=list)
    overrides: str = ""
    changes: list[str] = field(default_factory=list)


def run(
    experiment: str,
    model: str,
    evaluation: str,
    rows: dict[str, Row],
    synthetic_dataset: str | list[str] | None = None,
    seeds: list[int] | None = None,
    comparisons: list[Comparison] | None = None,
    findings: list[Finding] | None = None,
    only: list[str] | None = None,
    report_only: bool = False,
    outputs: str = "outputs",
    overrides: dict[str, str] | None = None,
    minutes: dict[str, float] | None = None,
    redo: bool = False,
    keep: bool = False,
    check_without: list[str] | None = None,
) -> None:
    """Run the rows at all seeds, and compare them.

    Args:
        experiment: name of the pipeline's folder in `outputs`; "-seed1" and so on is added at other seeds than 0. The
            comparison goes to <experiment>-ablations
        model: the base model, folder or Hub name
        evaluation: YAML of experiments.evaluate
        rows: name of each row's phase, after the row that it starts from; the first row, "base", always exists
        synthetic_dataset: YAML of experiments.generate_synthetic, or a list of them; null if the data exist already
        seeds: seeds of all training; null: [0]
        comparisons: differences between rows, with their aims
        findings: the paper's findings, each judged by one of the comparisons
        only: rows to run, with the rows that they start from; other rows are kept if they are done. null: all
        report_only: run nothing; compare the rows that the results.json of each seed lists
        outputs: folder of all experiments
        overrides: more arguments for one row, or for "evaluation": --overrides.grpo="--model.loss.kl_beta=0.01"
        minutes: expected minutes of each step, by its title such as "cot_sft: training", for the time left
        redo: repeat results that were made with other source files of the project
        keep: keep results that were made with other source files of the project
        check_without: only check the settings, and read nothing from these paths, which are still to be made
    """
    # 1. Check all settings before anything runs.
    seeds, comparisons, findings, overrides = seeds or [0], comparisons or [], findings or [], overrides or {}
    check_stages(rows, overrides)
    check_rows(rows, comparisons, findings, only)
    preflight.raise_all([problem for seed in seeds for problem in preflight.seed_problems(seed)])
    folders = {seed: experiment_folder(outputs, experiment, seed) for seed in seeds}
    home = Path(outputs) / f"{experiment}-ablations"
    starts = {BASE: BASE} | {name: row.start for name, row in rows.items()}

    def report() -> str:
        return ablation_report.write(home, folders, starts, comparisons, findings)

    if not report_only:
        configs = {f"rows.{name}.config": row.config for name, row in rows.items()}
        configs |= {f"rows.{name}.changes[{n}]": p for name, row in rows.items() for n, p in enumerate(row.changes)}
        datasets = dataset_configs(synthetic_dataset)
        configs |= {f"synthetic_dataset[{n}]": config for n, config in enumerate(datasets)}
        check_files({"evaluation": evaluation} | configs)
        start = time.monotonic()
        phases = {name: Phase(row.start, row_config(name, row, home)) for name, row in rows.items()}
        arguments = {name: f"{row.overrides} {overrides.get(name, '')}".strip() for name, row in rows.items()}
        arguments["evaluation"] = overrides.get("evaluation", "")
        choice, pipelines = choice_of(redo, keep), {}
        for seed, folder in folders.items():
            names = partial(wandb_runs.wandb_environment, home.name, f"seed{seed}")  # of a row; the row is also a tag
            pipelines[seed] = Pipeline(folder, seed, model, evaluation, phases, arguments, names, choice)
        wanted = wanted_rows(rows, only)
        steps = [step for pipeline in pipelines.values() for step in pipeline.steps(wanted)]
        models = [model for pipeline in pipelines.values() for model in pipeline.models]
        check_steps(steps, [*absent_data(datasets), *models, *(check_without or [])])
        if check_without is not None:
            return
        # 2. The synthetic datasets, and the choice for steps that other source files have made.
        build_synthetic(datasets)
        settle([step for pipeline in pipelines.values() for step in pipeline.steps()])
        plan = Plan(steps, minutes or {})
        for pipeline in pipelines.values():
            pipeline.plan = plan
        # 3. Run the rows, seed after seed, and write the comparison after each row.
        list_all_done(pipelines)
        report()
        for seed, pipeline in pipelines.items():
            with folder_lock.locked(pipeline.folder):
                for name in run_rows(pipeline, wanted):
                    say(f"seed {seed}: {name} is there")
                    report()
        say(f"{(time.monotonic() - start) / 60:.1f} minutes")
    print(report(), flush=True)
    if not report_only:
        wandb_runs.log_summary(home / "summary", *ablation_report.figures(home))
    say(f"{home / 'ablations.html'}, {home / 'ablations.md'}, {home / 'ablations.json'}")


def list_all_done(pipelines: Mapping[int, Pipeline]) -> None:
    """List the finished rows of every seed before the first seed runs, so that the first tables are complete.

    A seed at which another process is working is skipped, because that process lists its own rows.
    """
    for seed, pipeline in pipelines.items():
        with folder_lock.locked(pipeline.folder, wait=False) as held:
            if held:
                pipeline.list_done()
            else:
                say(f"seed {seed}: another process is working in {pipeline.folder}: its rows are listed as it has them")


def run_rows(pipeline: Pipeline, wanted: set[str]) -> Iterator[str]:
    """Run the wanted rows of one seed in their order; yields each row's name when it is trained and evaluated.

    A row that is done with the present settings is not run. It stays in the results, even if it is not wanted.
    """
    pipeline.list_done()
    for name in (BASE, *pipeline.phases):
        # `list_done` has listed a finished row. Its report is not written again: that takes seconds for each row.
        if pipeline.seconds_if_done(name) is not None:
            say(f"seed {pipeline.seed}: {name} was done before")
        elif name == BASE or name in wanted:
            pipeline.run(name)
            yield name


def wanted_rows(rows: Mapping[str, Row], only: list[str] | None) -> set[str]:
    """The rows to run: those of `only`, or else all rows, with all rows that they start from."""
    wanted, waiting = set(), list(rows if only is None else only)
    while waiting:
        name = waiting.pop()
        if name != BASE:
            wanted.add(name)
            waiting.append(rows[name].start)
    return wanted


def row_config(name: str, row: Row, home: Path) -> str:
    """The path of the row's configuration: its YAML, or a copy in `home` with `row.changes` and without `row.without`.

    Raises ValueError if the YAML does not have such a callback.
    """
    if not row.without and not row.changes:
        return row.config
    # The command line can change a callback but cannot remove it, and the key of a step depends on the content of only
    # one YAML. So the row gets its own YAML.
    also_beside([row.config, *row.changes])  # rewards of the user
    settings = yaml.safe_load(Path(row.config).read_text())
    for path in row.changes:
        settings = laid_over(settings, yaml.safe_load(Path(path).read_text()))
    trainer, callbacks = settings.get("trainer") or {}, callback_entries(settings)
    kept = [callback for callback in callbacks if class_name(callback) not in row.without]
    if missing := sorted(set(row.without) - {class_name(callback) for callback in callbacks}):
        raise ValueError(f"rows.{name}: without={missing}, but {row.config} has {[class_name(c) for c in callbacks]}")
    settings["trainer"] = trainer | {"callbacks": kept}
    path = home / "configs" / f"{name}.yaml"
    parts = [f"with {', '.join(row.changes)}"] * bool(row.changes) + [f"without {', '.join(row.without)}"] * bool(
        row.without
    )
    head = f"# {row.config} {' '.join(parts)}\n"
    write_atomic(path, head + yaml.safe_dump(settings, sort_keys=False, width=120))
    return str(path)


def class_name(callback: Mapping) -> str:
    return str(callback.get("class_path")).rpartition(".")[-1]


def check_rows(
    rows: Mapping[str, Row], comparisons: list[Comparison], findings: list[Finding], only: list[str] | None
) -> None:
    """Raises ValueError that lists every name of a row that does not exist, and every finding without a comparison."""
    known, problems = [BASE], []
    for name, row in rows.items():
        # Only an earlier row may be the start of a row. This also excludes cycles.
        if row.start not in known:
            problems.append(f"rows.{name}: start={row.start!r} must be one of the rows before it, {known}")
        known.append(name)
    wanted = [("comparisons", name) for each in comparisons for name in (each.row, each.over)]
    wanted += [("only", name) for name in only or ()]
    problems += [f"{where}: no row {name!r} in {known}" for where, name in wanted if name not in known]
    compared = {(each.row, each.over) for each in comparisons}
    for each in findings:
        if (each.row, each.over) not in compared:
            problems.append(f"findings: {each.text!r} needs {{row: {each.row}, over: {each.over}}} in comparisons")
        if each.figure not in FINDING_FIGURES:
            problems.append(f"findings: figure={each.figure!r} must be one of {', '.join(FINDING_FIGURES)}")
    if problems:
        raise ValueError("; ".join(problems))


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make ablations`."""
    preemption.requeue_at_once()  # between two steps
    try:
        run_cli(run, spell_out(args))
    except UserError:
        raise
    except ValueError as error:
        sys.exit(f"no ablation: {error}")


if __name__ == "__main__":
    main()
