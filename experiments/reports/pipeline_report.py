"""report.html of an experiment or an evaluation: stages, tasks, curves, answers, settings, in one file without network.

python -m experiments.reports.pipeline_report --folder outputs/nano
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.metrics.result_files import RESULT
from datamodules.persistence.files import read_json, write_atomic
from datamodules.persistence.message_text import listed
from experiments.reports import paper_tables, report_sections
from experiments.reports.drawing import charts
from experiments.reports.drawing.templates import render
from experiments.runs import metrics_csv
from experiments.runs.commands import command
from experiments.runs.results import (
    EVALUATION,
    Results,
    find_phases,
    find_results,
    read_mig_bench,
    stages_first,
    started_from,
)
from experiments.runs.run_identity import CONFIG, read_field, read_settings, trained_commit
from experiments.runs.usage_errors import PlainParser
from lightning_modules.serving.generation_rules import note

# Title of a chart -> the logged metrics in it; `<name>` stands for the name of every reward. A chart without logged
# metrics is skipped.
CHARTS = {
    "Loss": ("train/loss", "grpo/loss"),
    "Token accuracy": ("train/token_accuracy",),
    "Reward": ("reward/total", "reward/<name>"),
    "KL to the reference": ("grpo/kl",),
    "Groups without advantage": ("grpo/frac_zero_advantage",),
    "Completion length (tokens)": ("grpo/completion_length",),
    "Entropy (nats a token)": ("grpo/entropy",),
    "MIG-Bench subset in training": ("mig_bench_val/avg", "mig_bench_val/in_domain", "mig_bench_val/out_of_domain"),
    "Learning rate": ("train/learning_rate",),
}


def stage_rows(results: Results, starts: Mapping[str, str] | None = None) -> list[list[str]]:
    """A row of text cells for each stage, header first: its averages, and its gain over its start stage.

    `starts`: stage -> the stage that it was trained from, or ""; by default the previous stage.
    """
    rows = [["stage", "AVG", "gain", "over", "in-domain", "out-of-domain", "format %", "questions", "seconds"]]
    names = [stage.name for stage in results.stages]
    known = {stage.name: stage for stage in results.stages}
    for name, stage in known.items():
        bench = stage.mig_bench
        # Without a recorded start, a stage is compared with the previous stage.
        before = names[names.index(name) - 1] if name != names[0] else ""
        over = (starts or {}).get(name, before)
        gain = f"{bench['avg'] - known[over].mig_bench['avg']:+.2f}" if over in known else ""
        averages = [number(bench[key]) for key in ("in_domain", "out_of_domain")]
        seconds = f"{stage.seconds:.0f}" if stage.seconds else "–"
        last = [f"{bench['format_rate']:.1f}", str(bench["n"]), seconds]
        rows.append([name, f"{bench['avg']:.2f}", gain, over if gain else "", *averages, *last])
    return rows


def stage_starts(folder: Path, results: Results) -> dict[str, str]:
    """Each trained stage -> the stage whose model it was trained from, from the config.yaml of the phases.

    "" for a stage that was trained from a model of another experiment.
    """
    starts = {}
    for stage in results.stages:
        phase = Path(folder) / stage.name
        if (phase / CONFIG).is_file():
            settings = read_settings(phase)
            experiment = settings.get("experiment", Path(folder).name)
            starts[stage.name] = started_from(read_field(phase, "model.init_args.model"), experiment) or ""
    return starts


def stage_text(results: Results, starts: Mapping[str, str] | None = None) -> str:
    """The stages as a table for the terminal."""
    rows = stage_rows(results, starts)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def render_report(folder: Path) -> str:
    """The whole page of the folder of an experiment, or of evaluations, such as outputs/eval/models--nano-base."""
    return render("pipeline.html.j2", **report_values(folder))


def report_values(folder: Path) -> dict[str, Any]:
    """The values of the template of such a page.

    It shows all phases, finished or not, and all evaluations. Raises FileNotFoundError if the folder has neither.
    """
    folder = Path(folder)
    results, found = find_results(folder), find_phases(folder)
    homes = {phase.name: phase / "benchmarks" for phase in found}
    if not found and not results.stages:
        homes = {folder.name: folder}
    measured = report_sections.evaluations(homes)
    if not (found or measured or (folder / "results.json").is_file()):
        raise FileNotFoundError(f"--folder={folder} has neither a phase nor an evaluation{_others_text(folder)}")
    # The stages may have different tasks. The page shows all of them, in the order of their first appearance.
    tasks = list(dict.fromkeys(task for stage in results.stages for task in stage.mig_bench["tasks"]))
    scores = {stage.name: stage.mig_bench["tasks"] for stage in results.stages}
    phases = [shown for path in stages_first(folder, results) if (shown := _phase(path))]
    settings = report_sections.settings(found)
    if homes == {folder.name: folder}:
        settings = [report_sections.described("evaluation", read_json(folder / EVALUATION))]
    paper = _paper_tables(folder) if found else {"paper_tables": [], "paper_note": ""}
    names = {"pipeline": "Pipeline"} if found or (folder / "results.json").is_file() else {}
    names |= {"tasks": "Tasks"} if tasks else {}
    names |= {phase["id"]: phase["name"] for phase in phases}
    names |= {"evaluations": "Evaluations"} if measured else {}
    names |= {"settings": "Settings"} if settings else {}
    names |= {"paper": "The paper's tables"} if paper["paper_tables"] else {}
    return {
        "title": f"{results.experiment}, seed {results.seed}" if results.commit else results.experiment,
        "sections": names,
        "notes": _stage_notes(folder, results),
        "stages": stage_rows(results, stage_starts(folder, results)) if results.stages else [],
        "task_chart": charts.bar_chart("Acc@0.5 by task, in percent", tasks, _bars(folder, results)),
        "tasks": [["task", *scores], *([task, *(number(s.get(task)) for s in scores.values())] for task in tasks)],
        "failures": _failures(results),
        "phases": phases,
        "evaluations": measured,
        "settings": settings,
        **paper,
    }


def _others_text(folder: Path) -> str:
    """A sentence with the folders beside `folder` that have something to report; "" without any."""
    outputs = folder.parent.parent if folder.parent.name == "eval" else folder.parent
    names = [str(path) for path in reportable(outputs)]
    return f". There is: {listed(names)}" if names else ". `make pipeline`, `make sft` and `make eval` make one"


def reportable(outputs: Path) -> list[Path]:
    """The folders below outputs/ of which there is something to report, the latest change first."""
    folders = [path for path in outputs.glob("*") if path.is_dir() and "." not in path.name]
    found = [path for path in folders if find_phases(path) or (path / "results.json").is_file()]
    found += [path for path in (outputs / "eval").glob("*") if any(path.glob(f"*/{RESULT}"))]
    return sorted(found, key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    """The time of the last change of the folders in `folder`, in seconds since 1970; a report is no change."""
    return max((path.stat().st_mtime for path in folder.iterdir() if path.is_dir()), default=0.0)


def _stage_notes(folder: Path, results: Results) -> list[str]:
    if not results.stages:
        return ["No phase was evaluated on MIG-Bench yet: make eval MODEL=<folder of the phase>/merged."]
    scale = "Accuracies are Acc@0.5 in percent; AVG is the mean over the tasks. Lines on bars: 95 % intervals."
    return [_commits(folder, results), scale, *_decoding(folder, results)]


def _bars(folder: Path, results: Results) -> dict[str, dict[str, charts.Bar]]:
    """The tasks of each stage with their intervals, if the result in its folder has the score that is shown."""
    bars = {}
    for stage in results.stages:
        cells = read_mig_bench(folder / stage.name).get("columns", {})
        bars[stage.name] = {}
        for task, score in stage.mig_bench["tasks"].items():
            cell = cells.get(task, {})
            limits = (cell["low"], cell["high"]) if cell.get("score") == score else ()
            bars[stage.name][task] = charts.Bar(score, *limits)
    return bars


def _decoding(folder: Path, results: Results) -> list[str]:
    """A note about stages that were decoded by other rules than greedy decoding."""
    found = {stage.name: read_mig_bench(folder / stage.name) for stage in results.stages}
    notes = {name: note(result["generation"]) for name, result in found.items() if result}
    return [f"MIG-Bench of {name}{how}." for name, how in notes.items() if how]


def _commits(folder: Path, results: Results) -> str:
    """A note about the commits that trained the stages; results.json only has the commit of the last command."""
    last = f"Last command at commit {results.commit}" if results.commit else "No pipeline has run here"
    trained = {stage.name: trained_commit(folder / stage.name) for stage in results.stages}
    words = ", ".join(f"{name} at {commit}" for name, commit in trained.items() if commit)
    return last + (f"; trained: {words}." if words else ".")


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html; returns its path."""
    path = Path(folder) / "report.html"
    write_atomic(path, render_report(folder))
    return path


def _phase(folder: Path) -> dict[str, Any] | None:
    """Name, charts and previews of a phase; None if it has neither."""
    rows = metrics_csv.read_rows(folder)
    curves = {
        title: {name: metrics_csv.read_curve(rows, name) for name in _spelt_out(names, rows)}
        for title, names in CHARTS.items()
    }
    drawn = [chart for title in curves if (chart := charts.line_chart(title, curves[title]))]
    shown = report_sections.previews(folder)
    return (
        {"id": f"phase-{folder.name}", "name": folder.name, "charts": drawn, "previews": shown}
        if drawn or shown["items"]
        else None
    )


def _spelt_out(names: Sequence[str], rows: metrics_csv.Rows) -> list[str]:
    """The names, where a name with `<name>` is replaced by the matching logged names."""
    logged = sorted({name for row in rows for name in row})
    found: dict[str, None] = {}
    for name in names:
        pattern = re.compile(re.escape(name).replace("<name>", "[^/]+"))
        found |= dict.fromkeys(filter(pattern.fullmatch, logged) if "<name>" in name else [name])
    return list(found)


def _failures(results: Results) -> list[list[str]]:
    """Numbers of answers without a box, by reason and stage, as rows, header first; [] if all answers have a box."""
    failures = {stage.name: stage.mig_bench["parse_failures"] for stage in results.stages}
    kinds = list(dict.fromkeys(kind for counts in failures.values() for kind in counts))
    rows = [[kind, *(str(counts.get(kind, 0)) for counts in failures.values())] for kind in kinds]
    return [["answers without a box", *failures], *rows] if kinds else []


def _paper_tables(folder: Path) -> dict[str, Any]:
    """The paper's tables with measured cells of this experiment, as (heading, rows), and a note about them."""
    source, tables = paper_tables.load_paper_tables()
    measured = paper_tables.with_measured(tables, paper_tables.phase_measured(folder))
    shown = [
        (f"Table {table.number}: {table.title}", paper_tables.text_rows(table))
        for table in measured
        if any(row.measured for row in table.rows)
    ]
    return {"paper_tables": shown, "paper_note": f"Paper: {source.strip()}. {paper_tables.NOTE}"}


def number(value: float | None) -> str:
    """A cell of a table: two decimals, or a dash if it was not measured."""
    return "–" if value is None else f"{value:.2f}"


@command(failed="no report")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make report`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder of an experiment or of evaluations; the latest by default")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder that holds all of them")
    given = parser.parse_args(args)
    folder = given.folder or next(iter(reportable(given.outputs)), given.outputs / "nano")
    path = write_report(folder)
    results = find_results(folder)
    if results.stages:
        print(stage_text(results, stage_starts(folder, results)))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
