"""Pages: text stays text in every template, and markup is written nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from experiments.reports import pipeline_report
from experiments.reports.drawing import charts
from experiments.reports.drawing.templates import render
from experiments.runs.results import Results, make_stage, write_results
from tests.experiments.phase_results import cell, summary
from tests.experiments.runs.test_metrics_csv import attempt

ROOT = Path(__file__).resolve().parents[4]
HOSTILE = "</h1></title><script>alert('text')</script><img src=x onerror=alert(1)>"


def test_a_chart_escapes_its_texts() -> None:
    lines = charts.line_chart(HOSTILE, {HOSTILE: [(0, 1.0), (1, 2.0)]})
    bars = charts.bar_chart(HOSTILE, [HOSTILE], {HOSTILE: {HOSTILE: 50.0}})
    for drawn in (lines, bars):
        assert drawn.count("&lt;script&gt;") >= 3 and "<script" not in drawn and "<img" not in drawn


def test_hostile_names_do_nothing_in_a_browser(tmp_path: Path, browser_page) -> None:
    stage = make_stage(HOSTILE.replace("/", ""), summary(11.0, columns={HOSTILE: cell(11.0)}), 60)
    write_results(tmp_path / "results.json", Results(HOSTILE, 1, HOSTILE, (stage,)))
    attempt(tmp_path / "grpo", 0, "reward/total,step\n0.5,0\n0.75,1\n")
    browser_page.goto(pipeline_report.write_report(tmp_path).as_uri())
    assert HOSTILE in browser_page.locator("h1").inner_text()
    assert browser_page.locator("main script, img").count() == 0
    assert HOSTILE in browser_page.locator("#tasks table").first.inner_text()


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("base.html.j2")


def test_no_python_file_holds_markup_and_one_alone_draws_with_plotly() -> None:
    sources = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "experiments").rglob("*.py")}
    tag = re.compile(r"""["'](<|</)(div|p|h\d|table|tr|td|th|span|section|svg|text|rect|script|style|html|head)\b""")
    assert [str(path) for path, text in sources.items() if tag.search(text)] == []
    users = [str(path) for path, text in sources.items() if re.search(r"(import|from) plotly", text)]
    assert users == ["experiments/reports/sweep_plots.py"]
