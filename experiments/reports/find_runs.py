"""Read the folders of trained or evaluated phases, to compare them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.runs import metrics_csv
from experiments.runs.results import (
    Results,
    find_mig_bench,
    make_stage,
    read_mig_bench,
    read_results,
    stages_first,
    started_from,
)
from experiments.runs.run_identity import CONFIG, read_settings, trained_commit
from lightning_modules.rl.rollout_log import LoggedGroup, read_index

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One phase folder, outputs/<experiment>/<phase>."""

    folder: Path
    label: str  # "<experiment>/<phase>"
    seed: int | None
    commit: str
    config: Mapping[str, Any]  # flat: {"model.init_args.beta": 0.001, …}; {} for a model that was only evaluated
    mig_bench: Mapping[str, Any] | None  # the numbers of MIG-Bench, as in results.json
    asked: Mapping[str, Any] = field(default_factory=dict)  # `data_root` and `questions` of the result.json

    @property
    def phase(self) -> str:
        return self.folder.name

    @property
    def family(self) -> Path:
        """The experiment without its seed: outputs/nano and outputs/nano-seed1 are the same experiment."""
        experiment = self.folder.parent
        return experiment.with_name(re.sub(r"(?<=.)-seed\d+$", "", experiment.name))

    @property
    def start(self) -> Path | None:
        """The folder of the phase in this experiment that it was trained from; None for another start."""
        model = self.config.get("model.init_args.model")
        # By the name in its settings, which stays when the folder of the experiment is renamed.
        name = self.config.get("experiment", self.folder.parent.name)
        stage = None if model is None else started_from(model, name)
        return None if stage is None else self.folder.parent / stage

    @cached_property
    def curves(self) -> dict[str, Points]:
        """All logged metrics, as curves over the steps."""
        rows = metrics_csv.read_rows(self.folder)
        names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch"))
        curves = {name: metrics_csv.read_curve(rows, name) for name in sorted(names)}
        return {name: points for name, points in curves.items() if points}

    @cached_property
    def groups(self) -> list[LoggedGroup]:
        """The groups of its rollout log; [] without a log."""
        return read_index(self.rollout_log)

    @property
    def rollout_log(self) -> Path:
        """The path of its rollout log, which may not exist."""
        names = ("model.init_args.rollout.log", "model.init_args.rollout_log")  # the second in runs of earlier versions
        named = [self.config[name] for name in names if self.config.get(name)]
        return self.folder / (named[0] if named else "rollouts.jsonl")


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in phase folders, and in all phases of experiment folders, in the given order, each once.

    Raises ValueError that names every path without a run.
    """
    folders: dict[Path, None] = {}
    empty = []
    for path in map(Path, paths):
        found = [path] if _is_phase(path) else list(filter(_is_phase, stages_first(path, _results(path))))
        folders |= dict.fromkeys(folder.resolve() for folder in found)
        empty += [str(path)] if not found else []
    if empty or not folders:
        raise ValueError(
            f"runs={empty}: no folder of a phase (config.yaml, benchmarks/mig_bench), nor one with such; "
            "make pipeline, make sft and make grpo make one"
        )
    # Labels must be unique, since pages and tables find a run by its label.
    runs: list[Run] = []
    for folder in folders:
        runs.append(_read_run(folder, [run.label for run in runs]))
    return runs


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}.

    An item of a list that has a class_path is named by its class, not by its index. A second item of this class gets
    the suffix ".2".
    """
    if isinstance(value, Mapping):
        items = [(str(name), member) for name, member in value.items()]
    elif isinstance(value, Sequence) and any(isinstance(member, Mapping) for member in value):
        items, seen = [], Counter()
        for place, member in enumerate(value):
            # By class name, so that a callback that is added at the front does not change the names of the others.
            name, settings = _named(member, place)
            seen[name] += 1
            items.append((name if seen[name] == 1 else f"{name}.{seen[name]}", settings))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, member in items:
        flat |= flatten(member, f"{prefix}.{name}" if prefix else name)
    return flat


def config_differences(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """For each phase with several runs: the settings that differ, as rows of cells, header first."""
    tables = {}
    for phase in dict.fromkeys(run.phase for run in runs):
        same = [run for run in runs if run.phase == phase and run.config]
        if len(same) < 2:
            continue
        # Only runs of the same phase are compared, because SFT and GRPO have different settings.
        configs = [{"commit": run.commit} | dict(run.config) for run in same]
        names = [name for name in dict.fromkeys(n for config in configs for n in config) if name != "experiment"]
        rows = [[name, *(_cell(config, name) for config in configs)] for name in names]
        tables[phase] = [["field", *(run.label for run in same)], *(row for row in rows if len(set(row[1:])) > 1)]
    return tables


def _cell(config: Mapping[str, Any], name: str) -> str:
    return "–" if name not in config else "null" if config[name] is None else str(config[name])


def _named(member: Any, place: int) -> tuple[str, Any]:
    """The name and the arguments of an item of a list."""
    path = member.get("class_path") if isinstance(member, Mapping) else None
    if not isinstance(path, str):
        return str(place), member
    return path.rpartition(".")[2], member.get("init_args") or "with its defaults"


def _is_phase(path: Path) -> bool:
    return any((path / name).exists() for name in (CONFIG, "attempts")) or find_mig_bench(path) is not None


def _results(experiment: Path) -> Results:
    file = experiment / "results.json"
    return read_results(file) if file.is_file() else Results(experiment.name, 0, "")


def _read_run(folder: Path, taken: Sequence[str]) -> Run:
    config = flatten(read_settings(folder))
    results = _results(folder.parent)
    result = read_mig_bench(folder)  # results.json may still contain a stage whose folder was renamed
    label = f"{folder.parent.name}/{folder.name}"
    if label in taken:  # the same names in another outputs folder
        label = f"{folder.parents[1].name}/{label} ({len(taken)})"
    return Run(
        folder=folder,
        label=label,
        seed=config.get("seed_everything", results.seed if results.stages else None),
        commit=trained_commit(folder) or results.commit or "unknown",
        config=config,
        mig_bench=make_stage(label, result, 0.0).mig_bench if result else None,
        asked={name: result.get(name) for name in ("data_root", "questions")},
    )
