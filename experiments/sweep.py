"""A sweep from W&B's own YAML: `python -m experiments.sweep --config experiments/configs/nano/sweep.yaml`.

With a W&B key the command creates the sweep on W&B, or finds the sweep that it created before, and starts an agent.
Without a key, or with --local, Optuna chooses the trials, and they run here one after another. Then outputs/<sweep>/
contains trials.jsonl, the phase folders trial-<n>/, logs/, sweep.json and sweep.md (written after each trial), and at
the end sweep.html with plots. After a kill at any time, the same command resumes the running trial from its last
checkpoint. See docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence import folder_lock
from datamodules.persistence.durations import in_words
from datamodules.persistence.files import fingerprint
from datamodules.persistence.source_code import source_code
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments.reports import sweep_plots, sweep_summary
from experiments.reports.sweep_summary import value_text
from experiments.runs import run_identity, subprocess_steps
from experiments.runs.changes import Choice, MadeOf, choice_of
from experiments.runs.command_line.run_words import MODEL_FLAGS, given_modules, given_shards, laid_over, setting_given
from experiments.runs.commands import command
from experiments.runs.results import current_commit
from experiments.runs.subprocess_steps import ROOT, say
from experiments.runs.usage_errors import PlainParser
from experiments.runs.user_files import find_user_files
from experiments.runs.wandb_runs import choose_wandb_mode
from experiments.sweeps import wandb_sweep
from experiments.sweeps.plan import SweepPlan, read_plan
from experiments.sweeps.study import Study
from experiments.sweeps.trials import (
    Interrupted,
    Points,
    Trial,
    TrialLog,
    last_value,
    last_words,
    logged_points,
    run_process,
    trial_environment,
    trial_outlook,
)

GIVE_UP = 3  # the sweep ends after this number of failures in a row without any success, because all trials would fail
KEEPS_BOTH = "To keep both sweeps, give the new one another `name` in its YAML."
# Arguments of callbacks that name what a metric is measured on: MIGBench, HeldOutLoss, BenchmarkEvaluation.
MEASURED_ON = ("annotations", "shards", "benchmark")
ATTEMPTS = 2  # a trial whose process is killed, for example because memory ran out, is tried once more


class LocalSweep:
    """Runs trials on this machine, one at a time, until there are `num_trials`.

    Args:
        plan: the sweep.
        folder: outputs/<sweep>.
        seed: seed of the optimizer.
        num_trials: the number of trials, including those of earlier processes.
        retry_failed: run failed trials again.
        choice: keep or repeat a sweep that was made with other source files.
    """

    def __init__(
        self,
        plan: SweepPlan,
        folder: Path,
        seed: int,
        num_trials: int,
        retry_failed: bool = False,
        choice: Choice | None = None,
    ) -> None:
        self.plan, self.folder, self.num_trials, self.choice = plan, folder, num_trials, choice
        # Everything that the trials depend on, except their parameters. The number of trials is not in the key, so a
        # sweep can grow.
        inputs = [path_fingerprint(ROOT / config) for config in plan.configs]
        key = fingerprint(seed, plan.method, plan.metric, plan.maximize, plan.parameters, plan.command, inputs)
        settings = {"seed": seed, "method": plan.method, "metric": plan.metric, "maximize": plan.maximize}
        settings |= {"parameters": {p.name: asdict(p) for p in plan.parameters}, "command": list(plan.command)}
        # The content of a configuration is settings, so another content is asked about as another setting is.
        settings |= {"configurations": {str(c): content for c, content in zip(plan.configs, inputs, strict=True)}}
        find_user_files(str(ROOT / config) for config in plan.configs)
        loaded = [yaml.safe_load((ROOT / config).read_text()) for config in plan.configs]
        # So is the content of the model and of the shards: the values of finished trials were measured with it.
        settings |= {"inputs": {path: path_fingerprint(_place(path)) for path in input_paths(plan, loaded)}}
        flags = [*plan.example(), *(f"--{p.name}={choice}" for p in plan.parameters for choice in p.choices)]
        code = source_code(("experiments.sweep", "experiments.train", *given_modules(flags, loaded)))
        made = MadeOf(fingerprint(key, settings["inputs"]), settings, code=code)
        is_ours = run_identity.is_recorded(folder)
        run_identity.claim(folder, made, choice=choice, cure=KEEPS_BOTH)
        self.log = TrialLog(folder / "trials.jsonl", key, is_ours)
        self.study = Study(plan, seed)
        self.facts = {"seed": seed, "commit": current_commit(ROOT)}
        self.failures = 0  # failures in a row in this process
        if retry_failed:
            for trial in [trial for trial in self.log.trials if trial.state == "failed"]:
                self.log.reopen(trial.number)

    def run(self) -> None:
        """Finish the trials that earlier processes have started, then run new trials."""
        for known in list(self.log.trials):
            self._recall(known)
        while len(self.log.trials) < self.num_trials:
            self._carry_out(self.log.begin(self.study.begin()))
        self.write_summary()

    def command(self, trial: Trial) -> list[str]:
        """The trial's command line, with the folders of this sweep instead of the folders for W&B's agent."""
        words = self.plan.arguments(trial.parameters, sys.executable)
        words = [word for word in words if not word.startswith(("--experiment=", "--phase=", "--outputs="))]
        where = ["--experiment", self.folder.name, "--phase", phase_name(trial), "--outputs", str(self.folder.parent)]
        return words + where

    def write_summary(self) -> None:
        commands = [describe_command(self.command(trial)) for trial in self.log.trials]
        sweep_summary.write(self.folder, self.plan, self.log.trials, commands, self.facts)

    def _recall(self, trial: Trial) -> None:
        """Tell the optimizer about a trial of an earlier process, and continue the trial if it has not ended."""
        self.study.begin(trial.parameters)
        if trial.state != "running":
            for index, (_, value) in enumerate(trial.points):
                self.study.report(index, value)
            self.study.end(trial.state, trial.value)
        # stopped early, but the sweep was killed before it recorded this
        elif self._report(0, trial.points) is not None:
            self._close(trial, True, 0, trial.seconds, self.folder / "logs")
        else:
            say(f"trial {trial.number} was interrupted and goes on")
            self._carry_out(trial)

    def _carry_out(self, trial: Trial) -> None:
        number, folder, spent = trial.number, self.folder / phase_name(trial), trial.seconds
        log = self.folder / "logs" / f"{folder.name}.log"
        settings = ", ".join(f"{p.label} {value_text(trial.parameters[p.name])}" for p in self.plan.parameters)
        say(f"trial {number} ({number + 1} of {self.num_trials}): {settings}{self._left_text()}")

        def see(points: Points, seconds: float) -> bool:
            known = len(self.log.trials[number].points)
            if len(points) <= known:
                return False  # a resumed trial logs the values after its checkpoint again
            # Values after the one that stops the trial are ignored, because their number depends on the time of this
            # check.
            stopped = self._report(known, points[known:])
            kept = points[known:] if stopped is None else points[known : stopped + 1]
            self.log.add_points(number, kept, spent + seconds)
            say(f"trial {number}: {self.plan.metric} {kept[-1][1]:.4g} at step {kept[-1][0]}")
            return stopped is not None

        outlook = trial_outlook(self.log.trials, number, self.num_trials)
        environment = trial_environment(("sweep", self.plan.method), outlook)
        # The flag --keep or --redo applies to a trial that was started with other code.
        words = self.command(trial) + ([f"--{self.choice}"] if self.choice else [])
        for _ in range(ATTEMPTS):
            ended = run_process(words, environment, log, lambda: logged_points(folder, self.plan.metric), see)
            spent += ended.seconds
            if ended.pruned or ended.code >= 0:
                break
        self._close(trial, ended.pruned, ended.code, spent, log)

    def _left_text(self) -> str:
        """ "; about 12 min left", from the mean time of the finished trials; "" before the first one."""
        ended = [trial.seconds for trial in self.log.trials if trial.state != "running"]
        left = self.num_trials - len(ended)
        return f"; about {in_words(left * sum(ended) / len(ended))} left of the sweep" if ended else ""

    def _report(self, first: int, points: Sequence[tuple[int, float]]) -> int | None:
        """Report the values from number `first` on to the optimizer.

        Returns the number of the value at which to stop the trial.

        A trial is not stopped at the last value of finished trials, because that would save no time, and the trial may
        have ended already.
        """
        # Index of the last value of the longest finished trial; -1 before any has finished, so nothing is stopped then.
        last = max((len(trial.points) for trial in self.log.trials if trial.state == "complete"), default=0) - 1
        for number, (_, value) in enumerate(points, start=first):
            if self.study.report(number, value) and number < last:
                return number
        return None

    def _close(self, trial: Trial, pruned: bool, code: int, seconds: float, log: Path) -> None:
        """Record the end of a trial: `pruned`, or this exit code, and its seconds over all attempts.

        Ends the program after `GIVE_UP` failures if no trial has succeeded.
        """
        folder = self.folder / phase_name(trial)
        points, last = logged_points(folder, self.plan.metric), last_value(folder, self.plan.metric)
        known = len(self.log.trials[trial.number].points)

        # 1. How it ended. A trial without a finite last value has failed, because it cannot be compared with others.
        state, value, message = "failed", None, ""
        if pruned:
            state, message = "pruned", "not among the best at this step"
        elif code != 0:
            message = f"exit code {code}: {last_words(log)}"
        elif not points:
            message = f"it logged no finite {self.plan.metric}"
        elif not math.isfinite(last):
            message = f"its last {self.plan.metric} is {last}"
        else:
            state, value = "complete", points[-1][1]

        # 2. Write the values since the last check, and the end, to the journal and the optimizer.
        if points[known:] and not pruned:
            self.log.add_points(trial.number, points[known:], seconds)
            for index, (_, late) in enumerate(points[known:], start=known):
                self.study.report(index, late)
        trial = self.log.end(trial.number, state, seconds, value, message)
        self.study.end(state, value)
        say(f"trial {trial.number}: {state}{'' if value is None else f', {value:.4g}'} {message}".rstrip())
        self.write_summary()

        # 3. Give up if nothing works.
        self.failures = self.failures + 1 if state == "failed" else 0
        if self.failures >= GIVE_UP and not any(t.state in ("complete", "pruned") for t in self.log.trials):
            sys.exit(f"the first {self.failures} trials failed; {log}: {message}\n--retry_failed takes them up again")


def phase_name(trial: Trial) -> str:
    return f"trial-{trial.number}"


def describe_command(arguments: Sequence[str]) -> str:
    """A command line that can be copied into a shell."""
    return shlex.join(["python", *[word for word in arguments if word != "/usr/bin/env"][1:]])


def input_paths(plan: SweepPlan, loaded: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models, the sources of shards and the questions that trials read, by flags or by the YAML files `loaded`."""
    words, settings = plan.example(), reduce(laid_over, loaded, {})
    paths = [setting_given(words, settings, "model.model"), *given_shards(words, settings)]
    # The metric may be measured by a callback, on its own questions or samples: others give other values.
    callbacks = {"callbacks": setting_given(words, settings, "trainer.callbacks")}
    for entry in run_identity.callback_entries({"trainer": callbacks}):
        given = entry.get("init_args") or {}
        for name in MEASURED_ON:
            paths += given.get(name) if isinstance(given.get(name), list) else [given.get(name)]
    for parameter in plan.parameters:  # the example has the first value alone
        paths += parameter.choices if parameter.name in (*MODEL_FLAGS, "data.shards") else ()
    return sorted({str(path) for path in paths if path is not None})


def _place(path: str) -> str | Path:
    """Where trials, which run in `ROOT`, find a path; a name on the Hub or a URL as it is."""
    return ROOT / path if (ROOT / path).exists() else path


def num_trials(plan: SweepPlan, asked: int | None) -> int:
    """The number of trials. Raises ValueError if it is not given."""
    # A grid has a fixed number of points; more trials would repeat them.
    counts = [count for count in (asked or plan.run_cap, plan.grid_size()) if count is not None]
    if not counts:
        raise ValueError(f"method {plan.method} has no end: set run_cap in the YAML, or --trials")
    return min(counts)


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, help="the sweep, as W&B defines it")
    parser.add_argument("--join", metavar="ENTITY/PROJECT/ID", help="start an agent for a W&B sweep that is there")
    parser.add_argument("--local", action="store_true", help="run the trials here also where there is a W&B key")
    parser.add_argument("--trials", type=int, help="number of trials; by default run_cap, or the whole grid")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of parameters")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder that holds all experiments")
    parser.add_argument("--retry_failed", action="store_true", help="take up failed trials again")
    parser.add_argument("--redo", action="store_true", help="make a sweep again that other source files have made")
    parser.add_argument("--keep", action="store_true", help="go on with a sweep that other source files have made")
    only_check = "only check the settings, and read nothing from these paths, which are still to be made: '[data/nano]'"
    parser.add_argument("--check_without", metavar="PATHS", help=only_check)
    known = parser.parse_args(args)
    if (known.config is None) == (known.join is None):
        parser.error("give --config, or --join")
    if known.trials is not None and known.trials < 1:
        parser.error(f"--trials {known.trials} must be at least 1")
    return known


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make sweep` and `make agent`."""
    given = parse(args)
    online = choose_wandb_mode() == "online"
    # 1. An agent of a W&B sweep: the W&B server chooses the parameters.
    if given.join:
        if not online:
            sys.exit("to join a sweep takes a W&B key: `wandb login`, or WANDB_API_KEY")
        wandb_sweep.run_agent(given.join, given.trials)
    try:
        # 2. The plan, checked before anything runs.
        plan = read_plan(given.config)
        count = num_trials(plan, given.trials)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if given.check_without is not None:
        words = ["experiments.train", *plan.example(), f"--check_without={given.check_without}"]
        sys.exit(subprocess_steps.run_process([sys.executable, "-m", *words], lambda: None))
    folder = given.outputs / plan.name
    if online and not given.local:
        wandb_sweep.run_agent(wandb_sweep.find_or_create(given.config, folder), given.trials)
    # 3. Trials on this machine, and the pages about them.
    with folder_lock.locked(folder):
        choice = choice_of(given.redo, given.keep)
        sweep = LocalSweep(plan, folder, given.seed, count, given.retry_failed, choice)
        try:
            sweep.run()
        except Interrupted as signal_name:
            sys.exit(f"stopped by {signal_name}; the same command goes on with the trial that was running")
        plots = folder / "sweep.html"
        missing = sweep_plots.write_plots(plots, plan, sweep.study.study, **sweep_summary.page_values(folder, plan))
        wandb_sweep.log_sweep(folder, plan)
    say(f"{folder / 'sweep.md'}, {folder / 'sweep.json'}, {missing or plots}")


if __name__ == "__main__":
    main()
