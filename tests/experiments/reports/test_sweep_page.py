"""The sweep's page in a real browser: sorting, picking, brushing; and that it needs nothing from outside."""

from __future__ import annotations

import html
import math
import random
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.reports import sweep_charts, sweep_page
from experiments.sweeps.plan import SweepPlan, read_plan
from experiments.sweeps.trials import Trial
from tests.experiments.sweeps.test_plan import write

PREFIX = "model.init_args."
PARAMETERS = {
    PREFIX + "accuracy_weight": {"distribution": "q_uniform", "min": 0.5, "max": 2.0, "q": 0.25},
    PREFIX + "beta": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
    PREFIX + "group_size": {"values": [4, 8, "<16>"]},
    PREFIX + "max_new_tokens": {"value": 160},
}


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return read_plan(write(tmp_path, name="nano-<sweep>", parameters=PARAMETERS))


def made_up_trials(plan: SweepPlan, count: int = 24) -> list[Trial]:
    """Trials that are the better, the nearer β is to 0.003 and the larger the weight."""
    rng, trials = random.Random(0), []
    for number in range(count):
        latent = {p.name: rng.choice(p.grid() or [0.0]) for p in plan.parameters}
        latent[PREFIX + "beta"] = 10 ** rng.uniform(-4, -1)
        values = plan.values(latent)
        height = 40 - 4 * abs(math.log10(values[PREFIX + "beta"] / 0.003)) + 2 * values[PREFIX + "accuracy_weight"]
        points = tuple((step, height - 12 + 0.2 * step + rng.uniform(-1, 1)) for step in (20, 40, 60))
        state = ("complete", "complete", "pruned", "complete", "failed")[number % 5]
        kept = {"complete": points, "pruned": points[:2], "failed": ()}[state]
        value = points[-1][1] if state == "complete" else None
        message = "exit code 1: ValueError: the loss is <nan>" if state == "failed" else ""
        trials.append(Trial(number, latent, values, kept, state, value, 60.0 + number, message))
    return trials


def write_page(plan: SweepPlan, folder: Path, trials: list[Trial], shares: dict[str, float] | None = None) -> Path:
    commands = [f"python -m experiments.train --phase trial-{trial.number}" for trial in trials]
    sweep_page.write(folder, plan, trials, commands, shares or {}, {"seed": 0, "commit": "abc123"})
    return folder / "sweep.html"


def test_the_page_works_in_a_browser(plan: SweepPlan, tmp_path: Path, browser_page) -> None:
    trials = made_up_trials(plan)
    shares = {PREFIX + "beta": 0.7, PREFIX + "accuracy_weight": 0.2, PREFIX + "group_size": 0.1}
    browser_page.goto(write_page(plan, tmp_path, trials, shares).as_uri())
    best = max((t for t in trials if t.value is not None), key=lambda t: t.value)
    assert f"trial {best.number}" in browser_page.locator(".best").inner_text()
    assert browser_page.locator("#command").inner_text().endswith(f"--phase trial-{best.number}")
    rows = browser_page.locator("#table tbody tr")
    assert rows.count() == 24

    column = browser_page.locator("#table th", has_text="mig_bench_val/avg")
    column.click()
    column.click()
    shown = browser_page.locator("#table tbody td:nth-child(3)").all_inner_texts()
    numbers = [float(text) for text in shown if text]
    assert numbers == sorted(numbers, reverse=True) and shown[-1] == "" and len(numbers) == 15
    assert rows.first.get_attribute("data-trial") == str(best.number)

    line = browser_page.locator(f'#parallel .line[data-trial="{best.number}"]')
    line.dispatch_event("mousemove", {"clientX": 300, "clientY": 300})
    assert "picked" in rows.first.get_attribute("class")
    assert f"trial {best.number}" in browser_page.locator("#tip").inner_text()
    line.dispatch_event("mouseleave")
    assert browser_page.locator("#tip").is_hidden() and browser_page.locator("tr.picked").count() == 0
    line.dispatch_event("click")
    line.dispatch_event("mouseleave")
    assert browser_page.locator("tr.picked").count() == 1, "a click keeps it"


def test_brushing_an_axis_keeps_the_trials_in_its_range(plan: SweepPlan, tmp_path: Path, browser_page) -> None:
    trials = made_up_trials(plan)
    browser_page.goto(write_page(plan, tmp_path, trials).as_uri())
    handle = browser_page.locator("#parallel .axis .handle").last
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, top = box["x"] + box["width"] / 2, box["y"] + 1
    browser_page.mouse.move(x, top)
    browser_page.mouse.down()
    browser_page.mouse.move(x, top + box["height"] / 3)
    browser_page.mouse.up()
    values = sorted((t.value for t in trials if t.value is not None), reverse=True)
    kept = browser_page.locator("#parallel .line:not(.out)")
    assert 1 <= kept.count() < len(values), "the upper third of the metric's axis"
    numbers = {int(line.get_attribute("data-trial")) for line in kept.all()}
    assert {t.number for t in trials if t.value in values[: kept.count()]} == numbers
    assert browser_page.locator("#brushed").inner_text() == f"{kept.count()} trials in the brushed ranges"
    browser_page.mouse.click(x, top + box["height"] / 2)
    assert browser_page.locator("#parallel .line.out").count() == 0


def test_the_page_needs_nothing_from_outside_and_escapes_all_text(plan: SweepPlan, tmp_path: Path) -> None:
    page = write_page(plan, tmp_path, made_up_trials(plan)).read_text()
    assert re.findall(r"(?:src|href)=|url\(|@import|<link", page) == []
    assert "<nan>" not in page and "<16>" not in page and "<sweep>" not in page


def test_a_value_that_was_rounded_to_zero_has_a_place(tmp_path: Path) -> None:
    fields = {"distribution": "q_log_uniform_values", "min": 0.1, "max": 10, "q": 1}
    plan = read_plan(write(tmp_path, parameters={"a": fields}))
    trials = [
        Trial(k, {"a": latent}, plan.values({"a": latent}), ((1, 2.0),), "complete", 2.0 + k)
        for k, latent in enumerate((0.1, 8.0))
    ]
    assert [trial.parameters["a"] for trial in trials] == [0, 8]
    page = write_page(plan, tmp_path, trials).read_text()
    assert page.count("data-ys=") == 2 and "log scale" not in page


def test_the_command_of_a_longer_run_can_be_pasted(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, parameters={"a": {"values": [[1, 2]]}, "b": {"value": 3}}))
    page = write_page(plan, tmp_path, [Trial(0, {}, {"a": [1, 2], "b": 3}, ((1, 2.0),), "complete", 2.0)]).read_text()
    command = html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[0])
    assert shlex.split(shlex.split(command)[-1].removeprefix("ARGS=")) == ["--a=[1, 2]", "--b=3"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_sweep_that_has_just_begun_has_a_page(plan: SweepPlan, tmp_path: Path, browser_page, count: int) -> None:
    trials = [*made_up_trials(plan)[:count], Trial(count, *_first(plan))]
    browser_page.goto(write_page(plan, tmp_path, trials).as_uri())
    assert browser_page.locator("#table tbody tr").count() == count + 1
    assert ("No trial has finished" in browser_page.locator("body").inner_text()) == (count == 0)


def _first(plan: SweepPlan) -> tuple[dict, dict]:
    latent = {p.name: (p.grid() or [p.low])[0] for p in plan.parameters}
    return latent, plan.values(latent)


def test_a_sweep_with_one_constant_has_a_page(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, parameters={"a": {"value": 1}}))
    page = write_page(plan, tmp_path, [Trial(0, {"a": 0}, {"a": 1}, ((1, 2.0),), "complete", 2.0)]).read_text()
    assert 'id="parallel"' not in page and "History" in page


def test_drawings_are_well_formed_and_stay_in_their_frame(plan: SweepPlan) -> None:
    trials = made_up_trials(plan)
    for draw in (sweep_charts.history_chart, sweep_charts.curves_chart, sweep_charts.parallel_chart):
        tree = ElementTree.fromstring(draw(plan, trials))
        width, height = float(tree.get("width")), float(tree.get("height"))
        lines = [line.get("points") for line in tree.iter("{http://www.w3.org/2000/svg}polyline")]
        places = [tuple(map(float, place.split(","))) for points in lines for place in points.split()]
        assert len(places) >= 15, draw.__name__
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places), draw.__name__


def test_the_best_is_dark_and_the_goal_decides_which_it_is(plan: SweepPlan, tmp_path: Path) -> None:
    trials = [t for t in made_up_trials(plan) if t.state == "complete"]
    low, high = min(trials, key=lambda t: t.value), max(trials, key=lambda t: t.value)
    assert sweep_charts.best_number(plan, trials) == high.number
    falling = read_plan(write(tmp_path, metric={"name": "loss"}, parameters=PARAMETERS))
    assert sweep_charts.best_number(falling, trials) == low.number
    assert sweep_charts.shades_of(falling, trials)[low.number] == sweep_charts.BEST


def test_importance_says_what_it_cannot_tell() -> None:
    assert "at least 6" in sweep_page.importance_note(3, False)
    few, many = sweep_page.importance_note(8, True), sweep_page.importance_note(60, True)
    assert "best 3 trials" in few and "not a result" in few
    assert "best 6 trials" in many and "not a result" not in many
