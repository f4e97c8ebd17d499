"""The optimizer of a local sweep: W&B's methods and early stopping by Optuna.

    grid -> GridSampler   random -> RandomSampler   bayes -> TPESampler   hyperband -> SuccessiveHalvingPruner

W&B's hyperband stops trials at bands first, first · eta, first · eta² …, as successive halving does in one bracket;
Optuna's HyperbandPruner would spread the trials over several brackets with other bands. From n values at a band Optuna
keeps the best n // eta, and at least one; W&B keeps one more. Optuna stores nothing on disk here. After a restart the
same calls, read from the sweep's journal, build the same study, so a killed sweep ends like an uninterrupted sweep.
Therefore each trial has its own sampler, seeded with its number: a draw does not depend on earlier draws.
"""

from __future__ import annotations

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from experiments.sweeps.plan import Parameter, SweepPlan

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Proposes latent values, and decides whether a trial is worth going on. One trial at a time."""

    def __init__(self, plan: SweepPlan, seed: int = 0) -> None:
        self.plan, self.seed = plan, seed
        self.distributions = {parameter.name: distribution(parameter) for parameter in plan.parameters}
        pruner = optuna.pruners.NopPruner()
        if plan.early:
            pruner = optuna.pruners.SuccessiveHalvingPruner(plan.early.first, plan.early.eta, 0)
        direction = "maximize" if plan.maximize else "minimize"
        self.study = optuna.create_study(sampler=RandomSampler(), pruner=pruner, direction=direction)
        self.trial: optuna.trial.Trial | None = None

    def begin(self, latent: dict[str, float] | None = None) -> dict[str, float]:
        """The latent values of the next trial: newly drawn, or those given, which an earlier process drew."""
        assert self.trial is None, "one trial at a time"
        if latent is not None:
            self.study.enqueue_trial(latent)
        else:
            self.study.sampler = self._sampler(len(self.study.trials))
        self.trial = self.study.ask(self.distributions)
        self.study.sampler = RandomSampler()  # GridSampler ends a study that it did not start
        return dict(self.trial.params)

    def report(self, index: int, value: float) -> bool:
        """Note the trial's value number `index`, from 0; True where the trial should be stopped."""
        self.trial.report(value, index + 1)  # W&B counts the values of a trial from 1, and so bands mean the same
        return self.trial.should_prune()

    def end(self, state: str, value: float | None = None) -> None:
        """Close the trial as "complete" with its value, "pruned" or "failed"."""
        self.study.tell(self.trial, value if state == "complete" else None, STATES[state])
        self.trial = None

    def _sampler(self, number: int) -> BaseSampler:
        if self.plan.method == "grid":
            return GridSampler({p.name: p.grid() for p in self.plan.parameters}, seed=self.seed)
        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.plan.method == "random":
            return RandomSampler(seed)
        return TPESampler(seed=seed, n_startup_trials=min(10, 2 + len(self.plan.varied)))


def distribution(parameter: Parameter) -> BaseDistribution:
    """What the latent value is drawn from."""
    if parameter.choices:
        return CategoricalDistribution(range(len(parameter.choices)))
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
