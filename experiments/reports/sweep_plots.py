"""sweep.html: Optuna's own plots of a sweep in one file that opens offline. The only file that needs plotly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from markupsafe import Markup
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from datamodules.persistence.files import write_atomic
from experiments.reports.sweep_summary import short
from experiments.reports.templates import render
from experiments.sweeps.plan import Parameter, SweepPlan
from experiments.sweeps.study import STATES
from experiments.sweeps.trials import Trial

MISSING = "no sweep.html: pip install -e '.[plots]' gives plotly, which draws it"
FEWEST_FOR_IMPORTANCE = 6  # finished trials
SCALARS = (type(None), bool, int, float, str)  # the choices that Optuna takes as they are


def write_plots(path: Path, plan: SweepPlan, trials: Sequence[Trial]) -> str | None:
    """Write the page of plots to `path`; a sentence where there is none, for want of plotly or of a finished trial."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return MISSING
    if not any(trial.state == "complete" for trial in trials):
        return "no sweep.html: no trial has finished"
    options = {"full_html": False, "include_plotlyjs": False}
    figures = [(title, text, Markup(plot.to_html(**options))) for title, text, plot in _plots(plan, trials)]
    page = render("sweep.html.j2", title=plan.name, figures=figures, plotly=Markup(get_plotlyjs()))
    write_atomic(path, page)
    return None


def _plots(plan: SweepPlan, trials: Sequence[Trial]) -> Iterator[tuple[str, str, Any]]:
    """Heading, note and plotly figure of each plot that the trials suffice for."""
    from optuna import visualization

    study, name = shown_study(plan, trials), {"target_name": plan.metric}
    finished = [trial for trial in trials if trial.state == "complete"]
    varied = [short(parameter.name) for parameter in plan.varied]
    text = "Each finished trial's value, and the best value so far."
    yield "History", text, visualization.plot_optimization_history(study, **name)
    if any(trial.points for trial in trials):
        text = "Values while the trials trained, by step."
        yield "Intermediate values", text, visualization.plot_intermediate_values(study)
    if len(finished) > 1 and varied:
        text = "One line for each finished trial. Drag along an axis to keep the trials of that range."
        yield "Parallel coordinates", text, visualization.plot_parallel_coordinate(study, varied, **name)
        yield "Slices", "The value by each parameter alone.", visualization.plot_slice(study, varied, **name)
    if len(finished) >= FEWEST_FOR_IMPORTANCE and varied and len({trial.value for trial in finished}) > 1:
        evaluator = PedAnovaImportanceEvaluator(target_quantile=num_best(len(finished)) / len(finished))
        figure = visualization.plot_param_importances(study, evaluator, varied, **name)
        yield "Importance", importance_note(len(finished)), figure


def shown_study(plan: SweepPlan, trials: Sequence[Trial]) -> optuna.Study:
    """The ended trials with their values; the optimizer's own study has latent ones, such as the index of a choice."""
    study = optuna.create_study(direction="maximize" if plan.maximize else "minimize")
    distributions = {short(parameter.name): _shown_distribution(parameter, trials) for parameter in plan.varied}
    for trial in trials:
        if trial.state in STATES:
            parameters = {short(p.name): _shown(p, trial.parameters[p.name]) for p in plan.varied}
            study.add_trial(
                optuna.trial.create_trial(
                    state=STATES[trial.state],
                    value=trial.value,
                    params=parameters,
                    distributions=distributions,
                    intermediate_values=dict(trial.points),
                )
            )
    return study


def _shown_distribution(parameter: Parameter, trials: Sequence[Trial]) -> BaseDistribution:
    if parameter.choices:
        return CategoricalDistribution(list(dict.fromkeys(_shown(parameter, choice) for choice in parameter.choices)))
    seen = [trial.parameters[parameter.name] for trial in trials]  # rounding may leave the range of the latent value
    if parameter.whole:
        return IntDistribution(min(seen), max(seen))
    return FloatDistribution(min(seen), max(seen), log=parameter.log)


def _shown(parameter: Parameter, value: Any) -> Any:
    return value if not parameter.choices or isinstance(value, SCALARS) else str(value)


def num_best(num_finished: int) -> int:
    """How many trials count as the best ones for importance: a tenth, at least three. One alone decides nothing."""
    return max(3, num_finished // 10)


def importance_note(num_finished: int) -> str:
    """The meaning of importance, and its limits."""
    return (
        f"PED-ANOVA: how far the settings of the best {num_best(num_finished)} trials differ from those of all"
        f" {num_finished} finished trials, for each parameter by itself. It gives no direction and no interaction,"
        " leaves out trials that were stopped early, and is only a hint with fewer than some 30 finished trials."
    )
