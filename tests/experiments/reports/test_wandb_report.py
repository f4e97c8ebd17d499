"""The report as it would be sent, without W&B."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from experiments.reports import wandb_report
from tests.documented_metrics import documented_names


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return pytest.importorskip("wandb_workspaces.reports.v2", reason="no wandb-workspaces: pip install -e '.[dev]'")


def test_panels_name_only_metrics_that_are_documented(library: Any) -> None:
    report = wandb_report.build_report("t", "p", "team", ["nano", "nano-seed1"])
    grids = [block for block in report.blocks if isinstance(block, library.PanelGrid)]
    panels = [panel._to_model().model_dump(by_alias=True)["config"] for grid in grids for panel in grid.panels]
    named = {metric for panel in panels for metric in panel.get("metrics") or ()}
    named |= {panel["xAxis"] for panel in panels if panel.get("xAxis")}
    assert {"mig_bench/avg", "mig_bench/diff", "grpo/kl", "train/loss", "trainer/global_step"} <= named
    assert named - documented_names() == set()


def test_runs_are_chosen_by_group_and_job_type(library: Any) -> None:
    expressions = library.interface.expr
    report = wandb_report.build_report("t", "p", "team", ["nano", 'x" or "'])
    runsets = [grid.runsets[0] for grid in report.blocks if isinstance(grid, library.PanelGrid)]
    (grpo,) = [runset for runset in runsets if runset.name == "grpo"]
    chosen = [(part.key.name, part.op, part.value) for part in expressions.expr_to_filters(grpo.filters).filters]
    assert chosen == [("group", "IN", ["nano", 'x" or "']), ("jobType", "IN", ["grpo"])]
    assert {runset.project for runset in runsets} == {"p"} and {runset.entity for runset in runsets} == {"team"}


def test_without_a_key_it_says_so(library: Any) -> None:
    with pytest.raises(SystemExit, match="no W&B key"):
        wandb_report.main([])


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    with pytest.raises(SystemExit, match="wandb-workspaces is missing"):
        wandb_report.main([])
