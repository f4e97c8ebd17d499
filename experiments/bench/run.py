"""Measure GRPO and SFT steps of this project and of TRL, alternating on one machine, and the growth of our steps.

    python -m experiments.bench.run --shapes nano
    python -m experiments.bench.run --shapes 7b 3b --minutes 8.5

Every finished case is written to <output>/<shape>.json at once. The same command continues with the missing cases. A
case is measured again if its settings, the code or the machine have changed. With `--minutes`, the command ends within
this time and prints the missing cases. Each contender is a separate process, so `--trl-python` may be the interpreter
of another environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import closing
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
from experiments.runs.usage_errors import PlainParser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("datamodules", "lightning_modules", "experiments/bench")  # a change in these files changes every key


def num_cores() -> int:
    """Number of cores that this process may use; on macOS, the number of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict[str, Any]:
    """The device and the versions of libraries, which are part of a result's key."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "lightning")}
    return {"device": device, "versions": versions}


def case_key(case: Case, settings: dict[str, Any]) -> str:
    """A hash of the case, the machine and the measured code. A result with another key is measured again."""
    files = sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))
    return fingerprint(asdict(case), settings, [file_sha256(file) for file in files])


class Runner:
    """Measures all cases of one shape that are not in its results file.

    Args:
        shape: a name in `shapes.SHAPES`, or "nano".
        arguments: the command line.
        deadline: in seconds of time.monotonic().
    """

    def __init__(self, shape: str, arguments: argparse.Namespace, deadline: float) -> None:
        self.shape, self.arguments, self.deadline = shape, arguments, deadline
        self.path = arguments.output / f"{shape}.json"
        self.settings = machine() | {"threads": arguments.threads}
        self.contenders: dict[str, Contender] = {}  # running processes
        self.left: list[str] = []  # names of cases for which there was no time
        self.failed: list[str] = []

    def chosen(self) -> list[Case]:
        """The cases that the command line selects."""
        growth = ("ours", "trl") if self.arguments.growth == "both" else ("ours",)
        found = [case for case in cases(self.shape, growth) if case.name.startswith(tuple(self.arguments.cases))]
        if "ours" not in self.arguments.contenders:
            found = [case for case in found if not case.variants]
        if self.arguments.growth == "none":
            found = [case for case in found if "=" not in case.name and len(case.contenders) > 1]
        return [_only(case, self.arguments.contenders) for case in found]

    def results(self) -> dict[str, Any]:
        """The stored results by name of the case."""
        stored = read_json(self.path).get("cases", {})
        # Results of earlier versions have other field names. They are measured again.
        return {name: result for name, result in stored.items() if "contenders" in result}

    def run(self) -> None:
        """Measure the missing cases, and print all chosen cases."""
        model: Path | None = None  # written and measured only if a case needs it
        peaks: Peaks | None = None
        with closing(self):
            for case in self.chosen():
                key = case_key(case, self.settings)
                known = self.results().get(case.name, {})
                if known.get("key") != key:
                    if self.left or self._no_time(case):
                        self.left.append(case.name)
                        continue
                    model = model or model_folder(self.shape, self.arguments.models)
                    if self._no_time(case):  # writing the model has used the time
                        self.left.append(case.name)
                        continue
                    peaks = peaks or machine_peaks()
                    known = self._measure(case, key, str(model), peaks)
                if known is not None and "=" not in case.name:  # cases of growth have one line each in a common table
                    print(case_table(known), end="\n\n", flush=True)
        grown = [result for name, result in self.results().items() if "=" in name]
        if grown:
            print(growth_table(grown), end="\n\n", flush=True)

    def _no_time(self, case: Case) -> bool:
        return self.deadline - time.monotonic() < case.expected_seconds

    def _measure(self, case: Case, key: str, model: str, peaks: Peaks) -> dict[str, Any] | None:
        """Measure a case and store the result; None if it failed or did not end in time."""
        try:
            # Start the contenders that do not run yet, and stop those that this case does not need.
            if len(case.contenders) > 1:
                self.close()  # in a comparison, both begin with fresh processes
            for name in set(self.contenders) - set(case.contenders):
                self.contenders.pop(name).close()
            for name in case.contenders:
                if name not in self.contenders:
                    self.contenders[name] = self._start(name)
            for name in case.contenders:
                self.contenders[name].await_greeting()
            result = measure(case, model, self.contenders, peaks)
        except (OutOfTime, ContenderFailed) as error:
            self.close()  # their state is unknown, so the next case starts them again
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

    def close(self) -> None:
        """Stop all contenders."""
        for contender in self.contenders.values():
            contender.close()
        self.contenders = {}


def _only(case: Case, contenders: Sequence[str]) -> Case:
    """The case with the contenders that the user has chosen. Two variants of this project are not separated."""
    kept = case.contenders if case.variants else tuple(name for name in case.contenders if name in contenders)
    return replace(case, contenders=kept or tuple(contenders))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted([*SHAPES, "nano"]), default=["nano"])
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="only cases whose name begins with this: 'grpo images'"
    )
    parser.add_argument("--contenders", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument(
        "--growth", choices=("ours", "both", "none"), default="ours", help="contenders whose growth to measure"
    )
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end within this time; run again to continue")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--models", type=Path, default=Path("outputs/bench/models"), help="folder for random models")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a case failed, else 0, also if time ran out."""
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
