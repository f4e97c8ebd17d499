"""sweep.html: Optuna's plots of a sweep in one file that needs no network. The only file that needs plotly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from datamodules.persistence.files import write_atomic
from experiments.reports.drawing.templates import render
from experiments.sweeps.plan import SweepPlan

Rows = Sequence[Sequence[str]]
MISSING = "no sweep.html: pip install -e '.[plots]' gives plotly, which draws it"
FEWEST_FOR_IMPORTANCE = 6  # smallest number of finished trials for the plot of importance


def write_plots(
    path: Path, plan: SweepPlan, study: Study, commands: Mapping[str, str] | None = None, trials: Rows = ()
) -> str | None:
    """Write the page of plots. Returns the reason if plotly or a finished trial is missing.

    Args:
        path: the file.
        plan: the sweep.
        study: all its trials.
        commands: heading -> command of the best trial.
        trials: the trials as rows of text cells, header first.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return MISSING
    if not study.get_trials(states=[TrialState.COMPLETE]):
        return "no sweep.html: no trial has finished"
    figures = [(heading, note, _figure_markup(plot)) for heading, note, plot in plots(plan, study)]
    page = render(
        "sweep.html.j2",
        title=plan.name,
        figures=figures,
        commands=commands or {},
        trials=trials,
        plotly=Markup(get_plotlyjs()),
    )
    write_atomic(path, page)
    return None


def _figure_markup(plot: Any) -> Markup:
    """The figure as HTML that is as wide as its card."""
    plot.update_layout(autosize=True, margin={"l": 60, "r": 20, "t": 20, "b": 60}, title=None)
    plot.update_xaxes(automargin=True)
    plot.update_yaxes(automargin=True)
    config = {"responsive": True, "displaylogo": False}
    return Markup(plot.to_html(full_html=False, include_plotlyjs=False, default_width="100%", config=config))


def plots(plan: SweepPlan, study: Study) -> Iterator[tuple[str, str, Any]]:
    """Heading, note and plotly figure of each plot for which there are enough trials."""
    from optuna import visualization

    name, varied = {"target_name": plan.metric}, [parameter.label for parameter in plan.varied]
    values = [trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])]
    note = "Each finished trial's value, and the best value so far."
    yield "History", note, visualization.plot_optimization_history(study, **name)
    note = "Values while the trials trained, by the number of the value."
    yield "Intermediate values", note, visualization.plot_intermediate_values(study)
    if len(values) > 1 and varied:
        note = "One line for each finished trial. Drag along an axis to keep the trials of that range."
        yield "Parallel coordinates", note, visualization.plot_parallel_coordinate(study, varied, **name)
        yield "Slices", "The value by each parameter alone.", visualization.plot_slice(study, varied, **name)
    if len(values) >= FEWEST_FOR_IMPORTANCE and len(set(values)) > 1 and varied:
        evaluator = PedAnovaImportanceEvaluator(target_quantile=num_best(len(values)) / len(values))
        figure = visualization.plot_param_importances(study, evaluator, varied, **name)
        yield "Importance", importance_note(len(values)), figure


def num_best(num_finished: int) -> int:
    """Number of trials that count as the best ones for importance: a tenth, but at least three."""
    return max(3, num_finished // 10)


def importance_note(num_finished: int) -> str:
    """The meaning of importance, and its limits."""
    return (
        f"PED-ANOVA: how far the settings of the best {num_best(num_finished)} trials differ from those of all"
        f" {num_finished} finished trials, for each parameter by itself. It gives no direction and no interaction,"
        " leaves out trials that were stopped early, and is only a hint with fewer than some 30 finished trials."
    )
