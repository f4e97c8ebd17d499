"""What a sweep's YAML says, in W&B's own format, checked before anything runs. Pure: no optimiser, no W&B.

A parameter has a latent value, which the optimiser draws, and the value that a trial gets on its command line. They
differ where W&B's distribution is none of an optimiser's own: a choice is drawn by its index, a normal distribution as
a probability, and a q_ distribution is rounded to multiples of q afterwards, as W&B does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

KEYS = ("name", "description", "project", "entity", "program", "command", "method", "metric", "parameters", "run_cap")
KEYS += ("early_terminate",)
METHODS = ("grid", "random", "bayes")
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
# Fields of each distribution besides its name; those with a default are in DEFAULTS.
RANGE = ("min", "max")
FIELDS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": RANGE,
    **dict.fromkeys(("uniform", "log_uniform", "log_uniform_values"), RANGE),
    **dict.fromkeys(("inv_log_uniform", "inv_log_uniform_values"), RANGE),
    **dict.fromkeys(("q_uniform", "q_log_uniform", "q_log_uniform_values"), (*RANGE, "q")),
    **dict.fromkeys(("normal", "log_normal"), ("mu", "sigma")),
    **dict.fromkeys(("q_normal", "q_log_normal"), ("mu", "sigma", "q")),
}
DEFAULTS = {"q": 1.0, "mu": 0.0, "sigma": 1.0}
EDGE = 1e-9  # probabilities of a normal distribution stay this far from 0 and 1


@dataclass(frozen=True)
class Parameter:
    """One flag and how it is drawn. `choices` of a choice or constant; `low`, `high`, both included, of a number."""

    name: str
    distribution: str
    choices: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False  # drawn, and shown, on a logarithmic scale
    whole: bool = False
    q: float | None = None
    normal: tuple[float, float] | None = None  # mu, sigma

    @property
    def is_choice(self) -> bool:
        return bool(self.choices) and not self.probabilities

    def value(self, latent: float) -> Any:
        """What the trial gets for the latent value."""
        if self.probabilities:
            return self.choices[min(bisect_right(list(accumulate(self.probabilities)), latent), len(self.choices) - 1)]
        if self.choices:
            return self.choices[int(latent)]
        if self.normal:
            latent = NormalDist(*self.normal).inv_cdf(latent)
            latent = math.exp(latent) if self.distribution.endswith("log_normal") else latent
        return latent if self.q is None else _multiple(latent, self.q)

    def grid(self) -> list[float] | None:
        """All latent values, where they can be counted; None otherwise."""
        if self.choices:
            return None if self.probabilities else list(range(len(self.choices)))
        if self.whole:
            return list(range(int(self.low), int(self.high) + 1))
        if self.distribution == "q_uniform":
            first, last = math.ceil(self.low / self.q - EDGE), math.floor(self.high / self.q + EDGE)
            return [_multiple(k * self.q, self.q) for k in range(first, last + 1)]
        return None


@dataclass(frozen=True)
class EarlyStop:
    """W&B's hyperband: a trial whose k-th value is not among the best 1/eta of all trials' k-th values is stopped.

    k, counted from 1, is `first`, `first` · eta, `first` · eta² and so on.
    """

    first: int
    eta: int


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep. `command` is the trial's, with W&B's macros."""

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

    def grid_size(self) -> int | None:
        """How many trials a grid search has; None for other methods."""
        grids = [parameter.grid() or [] for parameter in self.parameters]
        return math.prod(map(len, grids)) if self.method == "grid" else None

    def values(self, latent: Mapping[str, float]) -> dict[str, Any]:
        return {parameter.name: parameter.value(latent[parameter.name]) for parameter in self.parameters}

    def arguments(self, values: Mapping[str, Any], python: str) -> list[str]:
        """The command line of a trial with these values, as W&B's agent fills in the macros."""
        filled = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [python],
            "${program}": [self.program],
            "${args}": [f"--{name}={value}" for name, value in values.items()],
        }
        return [word for part in self.command for word in filled.get(part, [part])]

    def better(self, one: float, other: float) -> bool:
        return one > other if self.maximize else one < other


def read_plan(path: str | Path) -> SweepPlan:
    """The plan in a YAML file. Raises ValueError that lists every fault by its key and value."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: expected keys and values, found {settings!r:.60}")
    faults, parameters, given = _top_faults(settings), [], settings.get("parameters")
    for name, fields in given.items() if isinstance(given, Mapping) else ():
        try:
            parameters.append(read_parameter(str(name), fields))
        except ValueError as error:
            faults.append(str(error))
    if settings.get("method") == "grid":
        uncountable = [p.name for p in parameters if not p.grid()]
        faults += [f"parameters.{name}: method grid needs values, int_uniform or q_uniform" for name in uncountable]
    early = None
    try:
        early = read_early_stop(settings.get("early_terminate"))
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(f"{path} is no sweep that can be run:\n" + "\n".join(f"  - {fault}" for fault in faults))
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


def read_parameter(name: str, fields: Any) -> Parameter:
    """One entry of `parameters`. Raises ValueError that names it, the field and its value."""
    where = f"parameters.{name}"
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}={fields!r}: give value, values, or min and max")
    if "parameters" in fields:
        raise ValueError(f"{where}: nested parameters; write the flag's name with dots instead")
    kind = fields.get("distribution") or _default_distribution(fields)
    if kind not in FIELDS:
        raise ValueError(f"{where}.distribution={kind!r} is none of {sorted(FIELDS)}")
    given = {key: value for key, value in fields.items() if key != "distribution"}
    unknown = sorted(set(given) - set(FIELDS[kind]))
    missing = sorted(set(FIELDS[kind]) - set(given) - set(DEFAULTS))
    if unknown or missing:
        raise ValueError(f"{where}: {kind} has {list(FIELDS[kind])}; unknown {unknown}, missing {missing}")
    read = _read_choice if kind.startswith(("constant", "categorical")) else _read_number
    return read(where, name, kind, DEFAULTS | given)


def read_early_stop(fields: Any) -> EarlyStop | None:
    """`early_terminate`; None without one. Raises ValueError for what successive halving cannot do."""
    if fields is None:
        return None
    if not isinstance(fields, Mapping) or fields.get("type") != "hyperband":
        raise ValueError(f"early_terminate={fields!r}: type must be hyperband, the one that W&B has")
    unknown = sorted(set(fields) - {"type", "min_iter", "max_iter", "s", "eta", "strict"})
    eta, first = fields.get("eta", 3), fields.get("min_iter")
    faults = [f"{key} is unknown" for key in unknown]
    if fields.get("strict", True) is not True:
        faults.append(f"strict={fields['strict']!r} is W&B's alone: leave it out")
    if not isinstance(eta, int) or eta < 2:
        faults.append(f"eta={eta!r} must be a whole number from 2 on")
    elif first is None:
        last, bands = fields.get("max_iter"), fields.get("s")
        if not isinstance(last, int) or not isinstance(bands, int) or last < 1 or bands < 1 or last % eta**bands:
            faults.append(f"give min_iter, or a max_iter={last!r} that eta={eta} divides s={bands!r} times")
        else:
            first = last // eta**bands
    if first is not None and (not isinstance(first, int) or first < 1):
        faults.append(f"min_iter={first!r} must be a whole number from 1 on")
    if faults:
        raise ValueError(f"early_terminate: {'; '.join(faults)}")
    return EarlyStop(first, eta)


def _top_faults(settings: Mapping) -> list[str]:
    faults = [f"{key} is no key of a sweep here; there are {list(KEYS)}" for key in settings if key not in KEYS]
    name, metric, command = (settings.get(key) for key in ("name", "metric", "command"))
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        faults.append(f"name={name!r} must be a plain folder name")
    if settings.get("method") not in METHODS:
        faults.append(f"method={settings.get('method')!r} is none of {list(METHODS)}")
    if not isinstance(metric, Mapping) or not metric.get("name") or not set(metric) <= {"name", "goal"}:
        faults.append(f"metric={metric!r} needs a name, and a goal")
    elif metric.get("goal", "minimize") not in ("minimize", "maximize"):
        faults.append(f"metric.goal={metric['goal']!r} is neither minimize nor maximize")
    if not isinstance(settings.get("parameters"), Mapping) or not settings["parameters"]:
        faults.append(f"parameters={settings.get('parameters')!r} names none")
    if not isinstance(command, list) or "${args}" not in command:
        faults.append(f"command={command!r} must be a list that runs experiments.train with ${{args}}")
    else:
        unknown = [word for word in command if "${" in str(word) and word not in MACROS]
        faults += [f"command: {word} is none of {list(MACROS)}" for word in unknown]
    run_cap = settings.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        faults.append(f"run_cap={run_cap!r} must be a whole number from 1 on")
    return faults


def _default_distribution(fields: Mapping) -> str:
    """W&B's choice where none is named."""
    if "value" in fields:
        return "constant"
    if "values" in fields:
        return "categorical_w_probabilities" if "probabilities" in fields else "categorical"
    return "int_uniform" if all(isinstance(fields.get(key), int) for key in RANGE) else "uniform"


def _read_choice(where: str, name: str, kind: str, given: Mapping) -> Parameter:
    choices = [given["value"]] if kind == "constant" else given["values"]
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"{where}.values={choices!r} must be a list that is not empty")
    shares = given.get("probabilities", ())
    if "probabilities" in given:
        positive = isinstance(shares, list) and all(isinstance(share, Real) and share >= 0 for share in shares)
        if not positive or len(shares) != len(choices) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"{where}.probabilities={shares!r} must be one for each of {choices!r} and sum to 1")
    return Parameter(name, kind, tuple(choices), tuple(shares))


def _read_number(where: str, name: str, kind: str, given: Mapping) -> Parameter:
    for key in FIELDS[kind]:
        if isinstance(given[key], bool) or not isinstance(given[key], Real):
            raise ValueError(f"{where}.{key}={given[key]!r} is no number (YAML reads 1e-4 as text: write 1.0e-4)")
    q = given["q"] if "q" in FIELDS[kind] else None
    if q is not None and q <= 0:
        raise ValueError(f"{where}.q={q} must be greater than 0")
    if "sigma" in FIELDS[kind]:
        if given["sigma"] <= 0:
            raise ValueError(f"{where}.sigma={given['sigma']} must be greater than 0")
        normal = (float(given["mu"]), float(given["sigma"]))
        return Parameter(name, kind, low=EDGE, high=1 - EDGE, q=q, normal=normal)
    low, high, whole = given["min"], given["max"], kind == "int_uniform"
    if not low < high:
        raise ValueError(f"{where}: min={low} is not below max={high}")
    if whole and not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"{where}: int_uniform from min={low} to max={high} needs whole numbers")
    log = "log" in kind
    if log and kind.endswith("_values") and low <= 0:
        raise ValueError(f"{where}.min={low} must be greater than 0 on a logarithmic scale")
    if log and not kind.endswith("_values"):  # the bounds are exponents, those of 1/x with inv_
        low, high = (-high, -low) if kind.startswith("inv_") else (low, high)
        low, high = math.exp(low), math.exp(high)
    return Parameter(name, kind, low=low, high=high, log=log, whole=whole, q=q)


def _multiple(value: float, q: float) -> float:
    """The multiple of q next to `value`; an int where q is one, as W&B has it: an int flag needs q: 1."""
    nearest = round(value / q) * q
    return int(nearest) if isinstance(q, int) else float(f"{nearest:.12g}")
