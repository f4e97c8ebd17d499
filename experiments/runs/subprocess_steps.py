"""Steps of an experiment: each is a process that runs once for the same command and inputs, even if the pipeline is
killed and restarted.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from callbacks import preemption
from datamodules.persistence.durations import Outlook, in_words
from datamodules.persistence.files import fingerprint, read_json
from datamodules.persistence.source_code import source_code
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments.runs import run_identity
from experiments.runs.changes import Choice, changed_text, decide, is_stale, kept, origin
from experiments.runs.wandb_runs import child_environment

ROOT = Path(__file__).resolve().parents[2]
# Share of all expected times that counts as measured as expected. Without it, a short first step, which mostly loads
# the model, or which other work on the machine slows down, would set the pace of hours.
PRIOR = 0.15
CLOCK_SECONDS = 5.0  # interval at which the elapsed time is saved; a kill loses at most this time


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        title: name of the step, for messages.
        marker: the file that says that the step is done.
        command: module and arguments of `python -m`.
        inputs: files and folders that the process reads.
        result: a JSON file with a key that the process writes, and other commands may write too. The step is done only
            while the file has the same key.
        environment: more variables for the process, such as W&B names; they must not change the result.
        modules: the modules whose code makes the result.
        choice: keep or repeat a step that was made with other code; the process gets the same flag.
        proof: a file that changes if the process has computed anything.
        checks: whether its settings are checked before any step runs (command_line/step_checks.py).
    """

    title: str
    marker: Path
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    choice: Choice | None = None
    proof: Path | None = None
    checks: bool = False

    def result_key(self) -> str | None:
        return read_json(self.result).get("key") if self.result else None

    def key(self) -> str:
        return fingerprint(self.command, [path_fingerprint(path) for path in self.inputs])

    def seconds_if_done(self) -> float | None:
        """Its duration in seconds if it is done with the present command, inputs and code; otherwise None."""
        marker = read_json(self.marker)
        done = marker.get("done") and marker.get("result_key") == self.result_key() and marker["key"] == self.key()
        return marker["seconds"] if done and not is_stale(marker, self.code(), self.choice) else None

    def code(self) -> dict[str, str]:
        return source_code(self.modules)

    def read_proof(self) -> bytes | None:
        return self.proof.read_bytes() if self.proof and self.proof.is_file() else None

    def is_stale(self) -> bool:
        """Whether it was started or finished with the present command and inputs, but with other code."""
        marker = read_json(self.marker)
        return marker.get("key") == self.key() and is_stale(marker, self.code(), self.choice)


class Plan:
    """The steps of an experiment in order, with the expected time of each.

    Args:
        steps: all steps.
        minutes: title of a step, such as "cot_sft: training" -> expected minutes from earlier measurements; {} if
            unknown. Unknown times follow from the steps that have run, see `seconds_of`. "grpo: training, rejection
            sampling" -> expected minutes from the start of the step to the end of this part of it.
    """

    def __init__(self, steps: Sequence[Step], minutes: Mapping[str, float]) -> None:
        self.steps = list(steps)
        self.minutes = minutes
        self.expected = {step.title: 60 * minutes[step.title] for step in steps if step.title in minutes}
        self.spent: dict[str, list[float]] = {}  # title -> seconds of the steps that have run here

    def begin(self, step: Step) -> dict[str, str]:
        """The environment variable with the position of the step and the expected times."""
        later = self.seconds_of(self.steps[self._number(step) :])
        # The mean of other steps says nothing about the pace of the machine, so it does not correct other times.
        is_measured = step.title in self.spent or step.title in self.expected
        expected, start = self.seconds_of([step]) if is_measured else None, f"{step.title}, "
        parts = {name: minutes for name, minutes in self.minutes.items() if name.startswith(start)}
        parts = {name.removeprefix(start): 60 * minutes * self.pace() for name, minutes in parts.items()}
        outlook = Outlook(self.place(step), time.time(), expected, later, evidence=self.evidence(), parts=parts)
        return outlook.environment()

    def place(self, step: Step) -> str:
        """The position of a step, such as "2 of 5, cot_sft: training"."""
        return f"{self._number(step)} of {len(self.steps)}, {step.title}"

    def _number(self, step: Step) -> int:
        return [each.marker for each in self.steps].index(step.marker) + 1

    def seconds_of(self, steps: Sequence[Step]) -> float | None:
        """Expected seconds of the steps that are not done; None if the time of a step is unknown.

        The time of a step is, in this order: the measured time of a step with the same title (of another seed), the
        expected time at the pace of this machine, and the measured mean of steps of the same kind, such as "training".
        """
        times = [self._seconds_of(step) for step in steps if step.seconds_if_done() is None]
        return None if None in times else sum(times)

    def _seconds_of(self, step: Step) -> float | None:
        kind = step.title.rpartition(": ")[2]
        same_kind = [s for title, each in self.spent.items() if title.rpartition(": ")[2] == kind for s in each]
        if step.title in self.spent:
            return mean(self.spent[step.title])
        if step.title in self.expected:
            return self.expected[step.title] * self.pace()
        return mean(same_kind) if same_kind else None

    def pace(self) -> float:
        """The factor between measured and expected times on this machine; 1 before any step.

        A part of all expected times counts as measured as expected (`PRIOR`).
        """
        known = [title for title in self.spent if title in self.expected]
        weight = PRIOR * sum(self.expected.values())
        foreseen = weight + sum(self.expected[title] * len(self.spent[title]) for title in known)
        return (weight + sum(sum(self.spent[title]) for title in known)) / foreseen if foreseen else 1.0

    def evidence(self) -> float:
        """The weight of the expected times, in seconds (`Outlook`)."""
        return PRIOR * sum(self.expected.values()) + sum(sum(seconds) for seconds in self.spent.values())

    def left_text(self, step: Step) -> str:
        """ "; about 12 min left of all stages", or "" if that is not known."""
        left = self.seconds_of(self.steps[self._number(step) - 1 :])
        return "" if left is None else f"; about {in_words(left)} left of all stages"

    def end(self, step: Step, seconds: float) -> None:
        """Record the seconds of a step in this process."""
        self.spent.setdefault(step.title, []).append(seconds)


def settle(steps: Sequence[Step]) -> None:
    """Before any step runs: mark steps that were made with other code as kept, or let them be repeated, as the user has
    chosen.

    Raises CodeChanged, which names the steps and the changed files, if there is no choice.
    """
    stale = [step for step in steps if step.is_stale()]
    waiting = [(step.title, read_json(step.marker), step.code()) for step in stale if step.choice is None]
    decide(bool(waiting), None, partial(changed_text, waiting))
    for step in stale:
        if step.choice == "keep":
            marker = read_json(step.marker)
            run_identity.write_marker(step.marker.parent, step.marker.name, **(marker | kept(marker, step.code())))
            say(f"{step.title}: kept, although other source files have made it")


def run_step(step: Step, plan: Plan | None = None) -> float:
    """Run the step unless it is done. Returns its seconds over all attempts. Ends the program if the step fails.

    Args:
        step: the step.
        plan: all steps, for messages and for the progress lines of the process.
    """
    seconds = step.seconds_if_done()
    if seconds is not None:
        say(f"{step.title}: done before, in {seconds:.0f} s")
        return seconds

    # The time of earlier attempts is added, if they belong to the same step and are not repeated.
    key, old, redone = step.key(), read_json(step.marker), step.is_stale()
    command = [*step.command, *([f"--{step.choice}"] if step.choice else [])]
    if plan:
        say(f"stage {plan.place(step)}{plan.left_text(step)}")
    say(f"{step.title}: python -m {shlex.join(command)}")
    goes_on = old.get("key") == key and not redone
    before, start = old["seconds"] if goes_on else 0.0, time.monotonic()
    code = origin(old) if goes_on else {"code": step.code()}
    # If the process does not change the proof, it had nothing to compute, and the old time is kept.
    proof = step.read_proof() if old.get("done") and not redone else None

    def note(done: bool) -> float:
        seconds = round(before + time.monotonic() - start, 1)
        # The marker of another, finished run stays until the step has renamed the folder of that run, or is done.
        marker = read_json(step.marker)
        free = done or marker.get("key") == key or not marker.get("done")
        if step.marker.parent.is_dir() and free:  # the step creates its folder itself
            content = {"key": key, "result_key": step.result_key(), "done": done, "seconds": seconds}
            run_identity.write_marker(step.marker.parent, step.marker.name, **content, **code)
        return seconds

    def tick() -> None:
        try:
            note(False)
        except OSError as error:  # only the clock failed; the step itself notices if it cannot continue
            say(f"{step.title}: the time spent is not noted: {error}")

    environment = {**step.environment, **(plan.begin(step) if plan else {})}
    status = run_process([sys.executable, "-m", *command], tick, environment)
    if status != 0:
        sys.exit(f"{step.title} ended with exit code {status}. The same command goes on from what is saved.")
    seconds = note(True)
    if proof is not None and step.read_proof() == proof:
        seconds = old["seconds"]  # it had nothing to do: another command or YAML asked for the same result
        run_identity.write_marker(
            step.marker.parent, step.marker.name, **(read_json(step.marker) | {"seconds": seconds})
        )
    say(f"{step.title}: {seconds:.0f} s")
    if plan and not before:
        plan.end(step, seconds)
    return seconds


def run_process(command: list[str], tick: Callable[[], Any], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end; returns its exit code.

    SIGTERM is passed on to the command. SLURM's warning signal stops it too, and then requeues the job. Ctrl-C reaches
    the command directly, and this process waits, because the command saves a checkpoint then.

    Args:
        command: the command line.
        tick: called every `CLOCK_SECONDS`.
        environment: more variables, beside the variables of this process.
    """
    variables = child_environment() | {preemption.LEFT_TO_PARENT: "1"} | dict(environment or {})
    child = subprocess.Popen(command, cwd=ROOT, env=variables)
    stopped = requeue = False

    def stop(signum: int, *_: Any) -> None:
        nonlocal stopped, requeue
        stopped = True
        requeue |= signum == preemption.REQUEUE_SIGNAL
        child.terminate()

    # Handlers are set only while the child runs, and put back in `finally`.
    numbers = [signal.SIGTERM, *([preemption.REQUEUE_SIGNAL] if preemption.in_slurm_job() else [])]
    old = {number: signal.signal(number, stop) for number in numbers}
    try:
        while True:
            try:
                try:
                    code = child.wait(CLOCK_SECONDS)
                except subprocess.TimeoutExpired:
                    tick()
                    continue
                if requeue:
                    preemption.requeue_job()
                return code or (128 + signal.SIGTERM if stopped else 0)
            except KeyboardInterrupt:  # in `tick` too
                stopped = True
                say("stopping: the step saves what it has")
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    print(f"== {text}", flush=True)
