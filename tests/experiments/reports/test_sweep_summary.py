"""A sweep's table and its plots: the order of the trials, hostile texts, and the page of plots in a real browser."""

from __future__ import annotations

import math
import random
import re
import shlex
import sys
from pathlib import Path

import optuna
import pytest

from datamodules.persistence.files import read_json
from experiments.reports import sweep_plots, sweep_summary
from experiments.sweeps.plan import SweepPlan, read_plan
from experiments.sweeps.study import Study
from experiments.sweeps.trials import Trial
from tests.experiments.sweeps.test_plan import write

PREFIX = "model.init_args."
PARAMETERS = {
    PREFIX + "accuracy_weight": {"distribution": "q_uniform", "min": 0.5, "max": 2.0, "q": 0.25},
    PREFIX + "beta": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
    PREFIX + "group_size": {"values": [4, 8, "</script><script>alert(1)</script>"]},
    PREFIX + "layers": {"values": ["all", None]},
    PREFIX + "max_new_tokens": {"value": 160},
}


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return read_plan(write(tmp_path, name="nano-<sweep>", parameters=PARAMETERS))


def made_up_trials(plan: SweepPlan, count: int = 24) -> list[Trial]:
    """Trials that are the better, the nearer β is to 0.003 and the larger the weight; some pruned or failed."""
    rng, trials = random.Random(0), []
    for number in range(count):
        values = {p.name: rng.choice(p.grid() or [0.0]) for p in plan.parameters}
        values[PREFIX + "beta"] = 10 ** rng.uniform(-4, -1)
        height = 40 - 4 * abs(math.log10(values[PREFIX + "beta"] / 0.003)) + 2 * values[PREFIX + "accuracy_weight"]
        points = tuple((step, height - 12 + 0.2 * step + rng.uniform(-1, 1)) for step in (20, 40, 60))
        state = ("complete", "complete", "pruned", "complete", "failed")[number % 5]
        kept = {"complete": points, "pruned": points[:2], "failed": ()}[state]
        value = points[-1][1] if state == "complete" else None
        message = "exit code 1: the loss | is\nnan" if state == "failed" else ""
        trials.append(Trial(number, values, kept, state, value, 60.0 + number, message))
    return trials


def told(plan: SweepPlan, trials: list[Trial]) -> optuna.Study:
    """The optimizer's study after these trials."""
    study = Study(plan)
    for trial in trials:
        study.begin(trial.parameters)
        for index, (_, value) in enumerate(trial.points):
            study.report(index, value)
        study.end(trial.state, trial.value)
    return study.study


def summarise(plan: SweepPlan, folder: Path, trials: list[Trial]) -> tuple[dict, str]:
    """sweep.json and sweep.md."""
    commands = [f"python -m experiments.train --phase trial-{trial.number}" for trial in trials]
    sweep_summary.write(folder, plan, trials, commands, {"seed": 0, "commit": "abc123"})
    return read_json(folder / "sweep.json"), (folder / "sweep.md").read_text()


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_has_every_trial_the_best_first(plan: SweepPlan, tmp_path: Path) -> None:
    trials = made_up_trials(plan)
    summary, text = summarise(plan, tmp_path, trials)
    rows = cells(text)
    values = [float(row[2]) for row in rows if row[2]]
    assert len(rows) == 24 and len(values) == 15 and values == sorted(values, reverse=True)
    assert [row[1] for row in rows] == ["complete"] * 15 + ["pruned"] * 5 + ["failed"] * 4
    best = max((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    assert summary["best"]["trial"] == best.number == int(rows[0][0])
    assert [trial["trial"] for trial in summary["trials"]] == list(range(24)), "sweep.json has them by number"
    assert f"    python -m experiments.train --phase trial-{best.number}\n" in text
    assert all(len(row) == 3 + 4 + 2 for row in rows), "no text breaks the table; a constant has no column"
    assert rows[-1][-1] == r"exit code 1: the loss \| is nan"


def test_a_metric_to_minimise_has_the_lowest_value_first(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, metric={"name": "loss"}, parameters=PARAMETERS))
    _, text = summarise(plan, tmp_path, made_up_trials(plan))
    values = [float(row[2]) for row in cells(text) if row[2]]
    assert values == sorted(values) and len(values) == 15


def test_the_command_of_a_longer_run_can_be_pasted(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, parameters={"a": {"value": [1, 2]}, "b": {"value": 3}}))
    _, text = summarise(plan, tmp_path, [Trial(0, {"a": [1, 2], "b": 3}, ((1, 2.0),), "complete", 2.0)])
    (command,) = re.findall(r"^ +make grpo (.*)$", text, re.MULTILINE)
    assert shlex.split(shlex.split(command)[-1].removeprefix("ARGS=")) == ["--a=[1, 2]", "--b=3"]


def test_the_command_of_a_longer_run_has_the_fixed_flags_in_their_order(tmp_path: Path) -> None:
    command = ["${env}", "${interpreter}", "-m", "experiments.train", "--config=a.yaml", "--data.batch_size", "4"]
    command += ["--phase", "trial", "--config", "b.yaml", "${args}", "--trainer.max_steps=9"]
    plan = read_plan(write(tmp_path, parameters={"lr": {"values": [0.1, 0.2]}}, command=command))
    again = sweep_summary.again_command(plan, {"lr": 0.2})
    flags = "--data.batch_size=4 --lr=0.2 --trainer.max_steps=9"
    assert again == f'make grpo CONFIG=a.yaml ARGS="{flags}"'


@pytest.mark.parametrize("count", [0, 1])
def test_a_sweep_that_has_just_begun_has_a_table(plan: SweepPlan, tmp_path: Path, count: int) -> None:
    values = {p.name: (p.grid() or [p.low])[0] for p in plan.parameters}
    trials = [*made_up_trials(plan)[:count], Trial(count, values)]
    summary, text = summarise(plan, tmp_path, trials)
    assert len(cells(text)) == count + 1
    assert ("No trial has finished yet." in text) == (summary["best"] is None) == (count == 0)


def test_optuna_s_plots_open_offline_in_a_browser(plan: SweepPlan, tmp_path: Path, browser_page) -> None:
    pytest.importorskip("plotly")
    trials = made_up_trials(plan)
    summarise(plan, tmp_path, trials)
    values = sweep_summary.page_values(tmp_path, plan)
    assert sweep_plots.write_plots(tmp_path / "sweep.html", plan, told(plan, trials), **values) is None
    browser_page.goto((tmp_path / "sweep.html").as_uri())
    headings = browser_page.locator("h2").all_inner_texts()
    plots = ["History", "Intermediate values", "Parallel coordinates", "Slices", "Importance"]
    assert headings == ["Best trial", *plots, "Trials"]
    assert browser_page.locator("#trials tbody tr").count() == len(trials)
    assert "alert(1)" in browser_page.locator("#trials").inner_text(), "a value is text"
    browser_page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 5")
    shown = " ".join(browser_page.locator(".plotly-figure").all_inner_texts())
    assert "beta" in shown and "accuracy_weight" in shown and PREFIX not in shown
    assert "<sweep>" in browser_page.locator("h1").inner_text(), "a name is text"


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_trials_have_the_plots_that_they_suffice_for(plan: SweepPlan, tmp_path: Path, count: int) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "sweep.html"
    assert sweep_plots.write_plots(path, plan, told(plan, made_up_trials(plan)[:count])) is None
    headings = re.findall("<h2>(.*?)</h2>", path.read_text())
    assert ("Parallel coordinates" in headings) == (count > 1) and "Importance" not in headings


def test_a_sweep_of_constants_has_a_history(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    plan = read_plan(write(tmp_path, parameters={"a": {"value": 1}}))
    trials = [Trial(k, {"a": 1}, ((1, 2.0),), "complete", 2.0 + k) for k in range(8)]
    assert sweep_plots.write_plots(tmp_path / "sweep.html", plan, told(plan, trials)) is None
    assert "<h2>History</h2>" in (tmp_path / "sweep.html").read_text()


def test_importance_finds_the_parameter_that_matters(plan: SweepPlan) -> None:
    pytest.importorskip("plotly")
    plots = {title: figure for title, _, figure in sweep_plots.plots(plan, told(plan, made_up_trials(plan, 120)))}
    bars = plots["Importance"].data[0]
    shares = dict(zip(bars.y, bars.x, strict=True))
    assert max(shares, key=shares.get) == "beta" and sum(shares.values()) == pytest.approx(1)


def test_without_plotly_one_line_says_how_to_get_it(
    plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = told(plan, made_up_trials(plan))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install -e '.[plots]'" in sweep_plots.write_plots(tmp_path / "sweep.html", plan, study)
    assert not (tmp_path / "sweep.html").exists()


def test_without_a_finished_trial_there_is_no_page(plan: SweepPlan, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    study = told(plan, [trial for trial in made_up_trials(plan) if trial.state == "pruned"])
    assert "no trial has finished" in sweep_plots.write_plots(tmp_path / "sweep.html", plan, study)
    assert not (tmp_path / "sweep.html").exists()


def test_importance_says_what_it_cannot_tell() -> None:
    assert "best 3 trials" in sweep_plots.importance_note(8) and "best 6 trials" in sweep_plots.importance_note(60)
    assert "only a hint" in sweep_plots.importance_note(8)
