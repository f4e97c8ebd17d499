"""Make a W&B report that compares experiments: stages, tasks, curves by phase, settings, drawn answers.

    python -m experiments.reports.wandb_report --experiments nano nano-seed1 --entity my-team

It needs the extra `dashboards` and a W&B key. Runs are found by their group (experiment) and job type (phase).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from datamodules.benchmarks.mig_bench import TASKS
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser
from experiments.runs.wandb_runs import PROJECT, has_key

STEP = "trainer/global_step"
STAGE_METRICS = ("mig_bench/avg", "mig_bench/in_domain", "mig_bench/out_of_domain", "mig_bench/format_rate")
# Phase -> the metrics whose curves are drawn. A test checks that all are in docs/metrics.md. `<name>` stands for the
# name of every reward; these share a panel.
CURVES = {
    "grpo": (
        "reward/total",
        "reward/<name>",
        "grpo/kl",
        "grpo/loss",
        "grpo/entropy",
        "grpo/completion_length",
        "grpo/frac_zero_advantage",
        "grpo/frac_truncated",
        "train/learning_rate",
        "train/grad_norm",
        "mig_bench_val/avg",
        "speed/seconds_per_batch",
        "speed/rollout_seconds",
        "speed/completion_tokens_per_second",
    ),
    "cot_sft": ("train/loss", "train/token_accuracy", "train/learning_rate", "speed/seconds_per_batch"),
    "sft": ("train/loss", "train/token_accuracy", "train/learning_rate", "speed/seconds_per_batch"),
}


def build_report(title: str, project: str, entity: str, experiments: Sequence[str] = ()) -> Any:
    """The report, not saved yet: `wandb_workspaces.reports.v2.Report`. Without `experiments`, it shows all experiments.

    Raises ValueError without the package.
    """
    wr = _library()

    def runs(name: str, phases: Sequence[str] = ()) -> Any:
        filters = [f"Group in {json.dumps(list(experiments))}"] if experiments else []
        filters += [f"JobType in {json.dumps(list(phases))}"] if phases else []
        return wr.Runset(entity=entity, project=project, name=name, filters=" and ".join(filters))

    def bars(metric: str) -> Any:
        spread = {"groupby": "JobType", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=metric, metrics=[metric], **spread)

    def curve(metric: str) -> Any:
        several = {"metric_regex": metric.replace("<name>", "[^/]+")} if "<name>" in metric else {"y": [metric]}
        return wr.LinePlot(title=metric, x=STEP, smoothing_type="average", smoothing_factor=0.6, **several)

    def section(name: str, runset: Any, panels: list[Any]) -> list[Any]:
        for place, panel in enumerate(panels):
            # W&B's grid has 24 columns: three panels of width 8 in a row.
            panel.layout = wr.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)
        return [wr.H2(text=name), wr.PanelGrid(runsets=[runset], panels=panels)]

    blocks = [
        wr.P(text="Acc@0.5 on MIG-Bench in percent, by phase; bars are means over runs with their standard deviation."),
        *section("Pipeline", runs("all phases"), [bars(metric) for metric in STAGE_METRICS]),
        *section("Tasks", runs("all phases"), [bars(f"mig_bench/{task}") for task in TASKS]),
    ]
    for phase, names in CURVES.items():
        blocks += section(f"Curves: {phase}", runs(phase, [phase]), [curve(metric) for metric in names])
    table = wr.WeavePanelSummaryTable(table_name="previews")
    blocks += section("Answers", runs("all phases"), [table])
    blocks += section("Settings that differ", runs("all phases"), [wr.RunComparer(diff_only=True)])
    return wr.Report(title=title, project=project, entity=entity, blocks=blocks, width="fluid")


def _library() -> ModuleType:
    try:
        import wandb_workspaces.reports.v2 as library
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("wandb_workspaces"):
            raise
        raise ValueError("the package wandb-workspaces is missing: pip install -e '.[dashboards]'") from error
    return library


@command(failed="no report")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make dashboard`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiments", nargs="*", default=[], help="W&B groups; none: all of the project")
    parser.add_argument("--project", default=PROJECT)
    parser.add_argument("--entity", default="", help="W&B user or team; none: your default one")
    parser.add_argument("--title", default="Multi-image grounding: ablations")
    options = parser.parse_args(args)
    _library()
    if not has_key():
        raise ValueError("no W&B key: `wandb login`, or set WANDB_API_KEY. `make compare` needs none")
    entity = options.entity or _default_entity()
    print(build_report(options.title, options.project, entity, options.experiments).save().url)


def _default_entity() -> str:
    import wandb

    return wandb.Api().default_entity


if __name__ == "__main__":
    main()
