"""A sweep's YAML in W&B's format, checked before anything runs. Imports neither the optimizer nor W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence.problems import Problems

KEYS = ("name", "description", "project", "entity", "program", "command", "method", "metric", "parameters", "run_cap")
KEYS += ("early_terminate",)
METHODS = ("grid", "random", "bayes")
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
# The supported distributions of W&B, and their fields besides the name.
FIELDS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
}
SCALARS = (type(None), bool, int, float, str)  # choices that an optimizer can compare


@dataclass(frozen=True)
class Parameter:
    """One flag of the trials: one of `choices`, or a number from `low` to `high` (both inclusive) in steps of `q`."""

    name: str
    distribution: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    q: float | None = None  # None: any number; for int_uniform, any integer

    @property
    def label(self) -> str:
        """The flag without its common prefix."""
        return self.name.removeprefix("model.init_args.")

    def grid(self) -> list[Any]:
        """All values; [] if they cannot be enumerated."""
        if self.choices:
            return list(self.choices)
        if self.q is None:
            return []
        count = round((self.high - self.low) / self.q) + 1
        return [type(self.q)(f"{self.low + k * self.q:.12g}") for k in range(count)]


@dataclass(frozen=True)
class EarlyStop:
    """W&B's hyperband: a trial whose k-th value is not among the best 1/eta of all trials' k-th values is stopped.

    k, counted from 1, is `first`, `first` · eta, `first` · eta² and so on.
    """

    first: int
    eta: int


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep. `command` is the command of a trial, with W&B's macros."""

    name: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]
    command: tuple[str, ...]
    program: str
    early: EarlyStop | None = None
    run_cap: int | None = None

    @property
    def varied(self) -> tuple[Parameter, ...]:
        """The parameters that differ between trials."""
        return tuple(p for p in self.parameters if len(p.choices) != 1)

    @property
    def configs(self) -> list[str]:
        """The YAML files that the command names."""
        words = " ".join(self.command).replace("--config=", "--config ").split()
        return [after for word, after in pairwise(words) if word == "--config"]

    def flags(self, values: Mapping[str, Any]) -> list[str]:
        """The flags of a trial as `make grpo ARGS=` takes them: fixed ones of the YAML, and `values`, in their order.

        Configurations and the names of the run's folder are left out.
        """
        words = self.arguments(values, "python")
        start = max(words.index(word) for word in ("experiments.train", self.program, words[0]) if word in words) + 1
        # One word for each flag with its value: "--a 1" becomes "--a=1".
        flags: list[str] = []
        for word in words[start:]:
            if word.startswith("--"):
                flags.append(word)
            elif flags:
                flags[-1] += ("=" if "=" not in flags[-1] else " ") + word
        own = ("--config", "--experiment", "--phase", "--outputs")
        return [flag for flag in flags if flag.partition("=")[0] not in own]

    def example(self) -> list[str]:
        """The arguments of experiments.train in a trial with the first value of every parameter."""
        values = {p.name: p.choices[0] if p.choices else p.low for p in self.parameters}
        configs = [f"--config={config}" for config in self.configs]
        return [*configs, *self.flags(values), f"--experiment={self.name}", "--phase=example"]

    def grid_size(self) -> int | None:
        """The number of trials of a grid search; None for other methods."""
        return math.prod(len(parameter.grid()) for parameter in self.parameters) if self.method == "grid" else None

    def arguments(self, values: Mapping[str, Any], python: str) -> list[str]:
        """The command line of a trial with these values; macros are replaced as by W&B's agent."""
        filled = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [python],
            "${program}": [self.program],
            "${args}": [f"--{name}={value}" for name, value in values.items()],
        }
        return [word for part in self.command for word in filled.get(part, [part])]


def read_plan(path: str | Path) -> SweepPlan:
    """The plan in a YAML file. Raises ValueError that lists every problem by its key and value."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: expected keys and values, found {settings!r:.60}")
    problems, parameters, given = _check_top(settings), [], settings.get("parameters")
    for name, fields in given.items() if isinstance(given, Mapping) else ():
        try:
            parameters.append(read_parameter(str(name), fields))
        except ValueError as error:
            problems.append(str(error))
    if settings.get("method") == "grid":
        uncountable = [p.name for p in parameters if not p.grid()]
        problems += [f"parameters.{name}: method grid needs values, int_uniform or q_uniform" for name in uncountable]
    early = None
    try:
        early = read_early_stop(settings.get("early_terminate"))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{path} is no sweep that can be run:\n{lines}")
    return SweepPlan(
        name=settings["name"],
        method=settings["method"],
        metric=settings["metric"]["name"],
        maximize=settings["metric"].get("goal", "minimize") == "maximize",
        parameters=tuple(parameters),
        command=tuple(map(str, settings["command"])),
        program=settings.get("program", ""),
        early=early,
        run_cap=settings.get("run_cap"),
    )


def _check_top(settings: Mapping) -> Problems:
    """Problems of the sweep's own keys."""
    problems = Problems()
    problems += [f"{key} is no key of a sweep here; the keys are {list(KEYS)}" for key in settings if key not in KEYS]
    name, metric, command = (settings.get(key) for key in ("name", "metric", "command"))
    plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
    problems.require(plain, "must be a plain folder name", name=name)
    problems.one_of(METHODS, method=settings.get("method"))
    if not isinstance(metric, Mapping) or not metric.get("name") or not set(metric) <= {"name", "goal"}:
        problems.require(False, "needs a name, and a goal", metric=metric)
    elif metric.get("goal", "minimize") not in ("minimize", "maximize"):
        problems.append(f"metric.goal={metric['goal']!r} is neither minimize nor maximize")
    parameters, run_cap = settings.get("parameters"), settings.get("run_cap")
    problems.require(isinstance(parameters, Mapping) and bool(parameters), "names none", parameters=parameters)
    if not isinstance(command, list) or "${args}" not in command:
        problems.require(False, "must be a list that runs experiments.train with ${args}", command=command)
    else:
        unknown = [word for word in command if "${" in str(word) and word not in MACROS]
        problems += [f"command: {word} is none of {list(MACROS)}" for word in unknown]
    problems.require(run_cap is None or _is_count(run_cap, 1), "must be a whole number from 1 on", run_cap=run_cap)
    return problems


def read_parameter(name: str, fields: Any) -> Parameter:
    """One entry of `parameters`. Raises ValueError that names it, the field and its value."""
    where = f"parameters.{name}"
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}={fields!r}: give value, values, or min and max")
    if "parameters" in fields:
        raise ValueError(f"{where}: nested parameters; write the flag's name with dots instead")
    given = {key: value for key, value in fields.items() if key != "distribution"}
    kind = fields.get("distribution") or _default_distribution(given)
    if kind not in FIELDS:
        raise ValueError(f"{where}.distribution={kind!r} is not supported; these are: {', '.join(FIELDS)}")
    unknown, missing = sorted(set(given) - set(FIELDS[kind])), sorted(set(FIELDS[kind]) - set(given))
    if unknown or missing:
        raise ValueError(f"{where}: {kind} has {list(FIELDS[kind])}; unknown {unknown}, missing {missing}")
    if kind == "constant":
        return Parameter(name, kind, (given["value"],))
    if kind == "categorical":
        if not isinstance(given["values"], list) or not given["values"]:
            raise ValueError(f"{where}.values={given['values']!r} must be a list that is not empty")
        if wrong := [value for value in given["values"] if not isinstance(value, SCALARS)]:
            raise ValueError(f"{where}.values: {wrong} are not numbers, texts, true, false or null")
        return Parameter(name, kind, tuple(given["values"]))
    return _read_number(where, name, kind, given)


def _default_distribution(given: Mapping) -> str:
    """W&B's default distribution."""
    if "value" in given or "values" in given:
        return "constant" if "value" in given else "categorical"
    return "int_uniform" if all(isinstance(given.get(key), int) for key in ("min", "max")) else "uniform"


def _read_number(where: str, name: str, kind: str, given: Mapping) -> Parameter:
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{where}.{key}={value!r} is no number (YAML reads 1e-4 as text: write 1.0e-4)")
    low, high, q = given["min"], given["max"], given.get("q")
    if not low < high:
        raise ValueError(f"{where}: min={low} is not below max={high}")
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"{where}: int_uniform from min={low} to max={high} needs whole numbers")
    if q is not None and (q <= 0 or any(abs(end / q - round(end / q)) > 1e-9 for end in (low, high))):
        raise ValueError(f"{where}: q={q} must be greater than 0, and min={low} and max={high} multiples of it")
    if kind == "log_uniform_values" and low <= 0:
        raise ValueError(f"{where}.min={low} must be greater than 0 on a logarithmic scale")
    # An int q gives ints, as in W&B: a flag that takes integers needs q: 1.
    return Parameter(name, kind, low=low, high=high, q=1 if kind == "int_uniform" else q)


def read_early_stop(fields: Any) -> EarlyStop | None:
    """`early_terminate`; None without one. Raises ValueError for everything but hyperband with min_iter and eta."""
    if fields is None:
        return None
    known = {"type", "min_iter", "eta"}
    if not isinstance(fields, Mapping) or fields.get("type") != "hyperband" or not set(fields) <= known:
        raise ValueError(f"early_terminate={fields!r}: supported are type: hyperband, min_iter and eta")
    first, eta, problems = fields.get("min_iter"), fields.get("eta", 3), Problems("early_terminate.")
    problems.require(_is_count(first, 1), "must be a whole number from 1 on", min_iter=first)
    problems.require(_is_count(eta, 2), "must be a whole number from 2 on", eta=eta)
    if problems:
        raise ValueError("; ".join(problems))
    return EarlyStop(first, eta)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least
