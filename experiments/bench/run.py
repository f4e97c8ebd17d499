"""Measure this project's GRPO and SFT steps beside TRL's, alternating on one machine, and how ours grow.

    python -m experiments.bench.run --shapes nano
    python -m experiments.bench.run --shapes 7b 3b --minutes 8.5

Every finished case is written to <output>/<shape>.json at once. The same command goes on with the cases that are left;
a case is measured again when its settings, the code or the machine differ. With `--minutes` it ends in time and says
what is left. Each contender is a process of its own, so `--trl-python` may be the interpreter of another environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from datamodules.persistence.files import file_sha256, fingerprint, read_json, write_json
from experiments.bench.cases import Case, cases
from experiments.bench.contender_process import Contender, ContenderFailed, OutOfTime
from experiments.bench.measure import measure
from experiments.bench.roofline import Peaks, machine_peaks
from experiments.bench.shapes import SHAPES, model_folder
from experiments.bench.table import case_table, growth_table
from experiments.runs.commands import command

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("datamodules", "lightning_modules", "experiments/bench")


def num_cores() -> int:
    """Those that this process may use; macOS does not say, so there all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "lightning")}
    return {"device": device, "versions": versions}


def case_key(case: Case, settings: dict[str, Any]) -> str:
    """Changes with the case, the machine and the code that is measured."""
    files = sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))
    return fingerprint(asdict(case), settings, [file_sha256(file) for file in files])


class Runner:
    """Runs the cases of one shape that its results file does not hold yet."""

    def __init__(self, shape: str, arguments: argparse.Namespace, deadline: float) -> None:
        self.shape, self.arguments, self.deadline = shape, arguments, deadline
        self.path = arguments.output / f"{shape}.json"
        self.settings = machine() | {"threads": arguments.threads}
        self.contenders: dict[str, Contender] = {}
        self.left: list[str] = []
        self.failed: list[str] = []

    def chosen(self) -> list[Case]:
        growth = ("ours", "trl") if self.arguments.growth == "both" else ("ours",)
        found = [case for case in cases(self.shape, growth) if case.name.startswith(tuple(self.arguments.cases))]
        if self.arguments.growth == "none":
            found = [case for case in found if case.name in ("grpo", "sft")]
        return [_only(case, self.arguments.contenders) for case in found]

    def results(self) -> dict[str, Any]:
        stored = read_json(self.path).get("cases", {})
        # Results of earlier versions have other field names. They are measured again.
        return {name: result for name, result in stored.items() if "contenders" in result}

    def run(self) -> None:
        model: Path | None = None
        peaks: Peaks | None = None
        with self._closing():
            for case in self.chosen():
                key = case_key(case, self.settings)
                known = self.results().get(case.name, {})
                if known.get("key") != key:
                    if self.left or self._no_time(case):
                        self.left.append(case.name)
                        continue
                    model = model or model_folder(self.shape, self.arguments.models)
                    if self._no_time(case):  # writing the model took it
                        self.left.append(case.name)
                        continue
                    peaks = peaks or machine_peaks()
                    known = self._measure(case, key, str(model), peaks)
                if known is not None and "=" not in case.name:  # the others have a line each in the last table
                    print(case_table(known), end="\n\n", flush=True)
        grown = [result for name, result in self.results().items() if "=" in name]
        if grown:
            print(growth_table(grown), end="\n\n", flush=True)

    def _no_time(self, case: Case) -> bool:
        return self.deadline - time.monotonic() < case.expected_seconds

    def _measure(self, case: Case, key: str, model: str, peaks: Peaks) -> dict[str, Any] | None:
        """The case's result, stored; None if it failed or did not end in time."""
        try:
            if len(case.contenders) > 1:
                self._close_contenders()  # fresh processes hold no memory of another case
            for name in set(self.contenders) - set(case.contenders):
                self.contenders.pop(name).close()
            for name in case.contenders:
                if name not in self.contenders:
                    self.contenders[name] = self._start(name)
            for name in case.contenders:
                self.contenders[name].await_greeting()
            result = measure(case, model, self.contenders, peaks)
        except (OutOfTime, ContenderFailed) as error:
            self._close_contenders()  # the contenders' state is unknown: the next case starts them anew
            print(f"{self.shape} {case.name}: {error}", file=sys.stderr, flush=True)
            (self.left if isinstance(error, OutOfTime) else self.failed).append(case.name)
            return None
        versions = {name: self.contenders[name].versions for name in case.contenders}
        result |= {"shape": self.shape, "key": key, "peaks": asdict(peaks), "machine": self.settings, "by": versions}
        write_json(self.path, {"cases": self.results() | {case.name: result}})
        return result

    def _start(self, name: str) -> Contender:
        python = self.arguments.trl_python if name == "trl" else sys.executable
        log = self.arguments.output / "logs" / f"{self.shape}-{name}.log"
        return Contender(name, python, self.arguments.threads, log, self.deadline)

    def _close_contenders(self) -> None:
        for contender in self.contenders.values():
            contender.close()
        self.contenders = {}

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._close_contenders()


def _only(case: Case, contenders: Sequence[str]) -> Case:
    kept = tuple(name for name in case.contenders if name in contenders)
    return replace(case, contenders=kept or tuple(contenders))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted([*SHAPES, "nano"]), default=["nano"])
    parser.add_argument("--cases", nargs="+", default=[""], help="only names that begin so: 'grpo images'")
    parser.add_argument("--contenders", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--growth", choices=("ours", "both", "none"), default="ours", help="whose growth is measured")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end within this time; run again to go on")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--models", type=Path, default=Path("outputs/bench/models"), help="for random weights")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing failed, also where time ran out; else 1."""
    parsed = parse_arguments(arguments)
    deadline = time.monotonic() + 60 * parsed.minutes
    left, failed = [], []
    torch.set_num_threads(parsed.threads)
    for shape in parsed.shapes:
        runner = Runner(shape, parsed, deadline)
        runner.run()
        left += [f"{shape} {name}" for name in runner.left]
        failed += [f"{shape} {name}" for name in runner.failed]
    if left:
        print(f"Out of time, run the same command again for: {', '.join(left)}")
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
