"""The optimizer of a local sweep: W&B's methods and early stopping by Optuna.

    grid -> GridSampler   random -> RandomSampler   bayes -> TPESampler   hyperband -> SuccessiveHalvingPruner

W&B's hyperband stops trials at bands first, first · eta, first · eta² …, as successive halving with one bracket does;
Optuna's HyperbandPruner would spread the trials over several brackets with other bands. Of n values at a band, Optuna
keeps the best n // eta, but at least one; W&B keeps one more. Optuna stores nothing on disk here. After a restart, the
same calls are repeated from the sweep's journal and build the same study, so a killed sweep ends like an uninterrupted
sweep. For this, each trial has its own sampler, seeded with its number, so that a draw does not depend on earlier
draws.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from experiments.sweeps.plan import Parameter, SweepPlan

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Proposes parameters, and decides whether a trial should continue. One trial runs at a time.

    Optuna's study uses the labels of parameters, because its plots show them. Constants are not part of the study.
    """

    def __init__(self, plan: SweepPlan, seed: int = 0) -> None:
        self.plan, self.seed = plan, seed
        self.distributions = {parameter.label: distribution(parameter) for parameter in plan.varied}
        pruner = optuna.pruners.NopPruner()
        if plan.early:
            pruner = optuna.pruners.SuccessiveHalvingPruner(plan.early.first, plan.early.eta, 0)
        direction = "maximize" if plan.maximize else "minimize"
        self.study = optuna.create_study(sampler=RandomSampler(), pruner=pruner, direction=direction)
        self.trial: optuna.trial.Trial | None = None

    def begin(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """The parameters of the next trial by name: newly drawn, or `known`, which an earlier process drew."""
        assert self.trial is None, "one trial at a time"
        if known is not None:
            self.study.enqueue_trial({p.label: known[p.name] for p in self.plan.varied})
        else:
            self.study.sampler = self._sampler(len(self.study.trials))
        self.trial = self.study.ask(self.distributions)
        self.study.sampler = RandomSampler()  # GridSampler would end a study that it did not start
        return {p.name: self.trial.params.get(p.label, *p.choices[:1]) for p in self.plan.parameters}

    def report(self, index: int, value: float) -> bool:
        """Tell Optuna the trial's value number `index`, counted from 0; True if the trial should be stopped."""
        self.trial.report(value, index + 1)  # counted from 1, as W&B counts, so that bands are equal
        return self.trial.should_prune()

    def end(self, state: str, value: float | None = None) -> None:
        """Close the trial: "complete", with its value, "pruned" or "failed"."""
        self.study.tell(self.trial, value if state == "complete" else None, STATES[state])
        self.trial = None

    def _sampler(self, number: int) -> BaseSampler:
        if self.plan.method == "grid":
            return GridSampler({p.label: p.grid() for p in self.plan.varied}, seed=self.seed)
        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.plan.method == "random":
            return RandomSampler(seed)
        return TPESampler(seed=seed, n_startup_trials=min(10, 2 + len(self.plan.varied)))


def distribution(parameter: Parameter) -> BaseDistribution:
    """Optuna's distribution of a parameter."""
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if isinstance(parameter.q, int):
        return IntDistribution(int(parameter.low), int(parameter.high), step=parameter.q)
    log = parameter.distribution == "log_uniform_values"
    return FloatDistribution(parameter.low, parameter.high, log=log, step=parameter.q)
