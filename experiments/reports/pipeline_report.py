"""report.html of an experiment: the ladder, curves, bars per task and drawn examples in one file that opens offline.

python -m experiments.reports.pipeline_report --folder outputs/nano
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from datamodules.persistence.files import write_atomic
from experiments.reports import paper_tables, svg_charts
from experiments.runs import metrics_csv
from experiments.runs.commands import command
from experiments.runs.results import Results, read_mig_bench, read_results, started_from
from experiments.runs.run_identity import CONFIG, read_field, trained_commit
from lightning_modules.serving.generation_rules import note

# Title of a chart -> the logged metrics in it. A chart whose metrics were not logged is left out.
CHARTS = {
    "Loss": ("train/loss", "grpo/loss"),
    "Token accuracy": ("train/token_accuracy",),
    "Reward": ("reward/total", "reward/accuracy", "reward/format"),
    "KL to the stage-1 model": ("grpo/kl",),
    "Groups without advantage": ("grpo/frac_zero_advantage",),
    "Completion length (tokens)": ("grpo/completion_length",),
    "Entropy (nats a token)": ("grpo/entropy",),
    "MIG-Bench subset in training": ("mig_bench_val/avg", "mig_bench_val/in_domain", "mig_bench_val/out_of_domain"),
    "Learning rate": ("train/learning_rate",),
}
MAX_EXAMPLES = 12  # drawn examples of one phase
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .3em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
tbody tr:nth-child(odd) { background: #f4f5f7; } figure { display: inline-block; margin: .4em; vertical-align: top; }
figure img { max-width: 100%; } svg text { font: 11px system-ui, sans-serif; } svg { max-width: 100%; }
.grid { stroke: #ddd; } .paper { fill: #fff; stroke: #e4e4e4; } .scroll { overflow-x: auto; }
"""


def ladder_rows(results: Results, starts: Mapping[str, str] | None = None) -> list[list[str]]:
    """The ladder as text cells, header first: each stage's averages, and its gain over the stage that it starts from,
    by `starts`, or else the stage before."""
    rows = [["stage", "AVG", "gain", "over", "in-domain", "out-of-domain", "format %", "questions", "seconds"]]
    names = [stage.name for stage in results.stages]
    known = {stage.name: stage for stage in results.stages}
    for name, stage in known.items():
        bench = stage.mig_bench
        before = names[names.index(name) - 1] if name != names[0] else ""
        over = (starts or {}).get(name, before)
        gain = f"{bench['avg'] - known[over].mig_bench['avg']:+.2f}" if over in known else ""
        averages = [number(bench[key]) for key in ("in_domain", "out_of_domain")]
        last = [f"{bench['format_rate']:.1f}", str(bench["n"]), f"{stage.seconds:.0f}"]
        rows.append([name, f"{bench['avg']:.2f}", gain, over if gain else "", *averages, *last])
    return rows


def stage_starts(folder: Path, results: Results) -> dict[str, str]:
    """Each trained stage -> the stage whose model it was trained from, as the phases' config.yaml say."""
    starts = {}
    for stage in results.stages:
        phase = Path(folder) / stage.name
        if (phase / CONFIG).is_file():
            starts[stage.name] = started_from(read_field(phase, "model.init_args.model"))
    return starts


def ladder_text(results: Results, starts: Mapping[str, str] | None = None) -> str:
    """The ladder as a table for the terminal."""
    rows = ladder_rows(results, starts)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def render_report(folder: Path) -> str:
    """The whole page for an experiment folder that holds a results.json, of whichever stages are there."""
    folder = Path(folder)
    results = read_results(folder / "results.json")
    tasks = list(dict.fromkeys(task for stage in results.stages for task in stage.mig_bench["tasks"]))
    bars = {stage.name: stage.mig_bench["tasks"] for stage in results.stages}
    title = f"{results.experiment}, seed {results.seed}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_commits(folder, results))}</p>",
        "<p>Accuracies are Acc@0.5 in percent; AVG is the mean over the tasks.</p>",
        *_decoding(folder, results),
        "<h2>Ladder</h2>",
        html_table(ladder_rows(results, stage_starts(folder, results))),
        "<h2>Tasks</h2>",
        f'<div class="scroll">{svg_charts.bar_chart("Acc@0.5 by task", tasks, bars)}</div>' if tasks else "",
        html_table([["task", *bars], *([task, *(number(b.get(task)) for b in bars.values())] for task in tasks)]),
        *_failures(results),
        *_paper_tables(folder),
        *(_phase_section(phase) for phase in _phases(folder, results)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _decoding(folder: Path, results: Results) -> list[str]:
    """Which stages were not decoded by the common rules."""
    found = {stage.name: read_mig_bench(folder / stage.name) for stage in results.stages}
    notes = {name: note(result["generation"]) for name, result in found.items() if result}
    return [f"<p>MIG-Bench of {escape(name + how)}.</p>" for name, how in notes.items() if how]


def _commits(folder: Path, results: Results) -> str:
    """Which code trained each stage; results.json says only which the last command ran."""
    trained = {stage.name: trained_commit(folder / stage.name) for stage in results.stages}
    words = ", ".join(f"{name} at {commit}" for name, commit in trained.items() if commit)
    return f"Last command at commit {results.commit}" + (f"; trained: {words}." if words else ".")


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html; its path."""
    path = Path(folder) / "report.html"
    write_atomic(path, render_report(folder))
    return path


def _phases(folder: Path, results: Results) -> list[Path]:
    """Phase folders: those of the stages in their order, then others that logged something."""
    staged = [folder / stage.name for stage in results.stages]
    others = [path for path in sorted(folder.iterdir()) if (path / "attempts").is_dir() and path not in staged]
    return [path for path in staged + others if path.is_dir() and "." not in path.name]


def _phase_section(phase: Path) -> str:
    rows = metrics_csv.read_rows(phase)
    drawn = []
    for title, names in CHARTS.items():
        drawn.append(svg_charts.line_chart(title, {name: metrics_csv.read_curve(rows, name) for name in names}))
    drawings = sorted((phase / "previews").glob("step_*"))[-1:]  # those of the last step
    figures = [_figure(image) for folder in drawings for image in sorted(folder.glob("*.png"))[:MAX_EXAMPLES]]
    if not any(drawn) and not figures:
        return ""
    return f"<h2>{escape(phase.name)}</h2>" + "".join(drawn) + "".join(figures)


def _figure(image: Path) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(image.stem)}"></figure>'


def _failures(results: Results) -> list[str]:
    failures = {stage.name: stage.mig_bench["parse_failures"] for stage in results.stages}
    kinds = list(dict.fromkeys(kind for counts in failures.values() for kind in counts))
    rows = [[kind, *(str(counts.get(kind, 0)) for counts in failures.values())] for kind in kinds]
    return [html_table([["answers without a box", *failures], *rows])] if kinds else []


def _paper_tables(folder: Path) -> list[str]:
    """The paper's tables that this experiment has measured cells for."""
    measured = paper_tables.phase_measured(folder)
    source, tables = paper_tables.load_paper_tables()
    shown = [t for t in paper_tables.with_measured(tables, measured) if any(row.measured for row in t.rows)]
    if not shown:
        return []
    sections = [f"<h2>The paper's tables</h2><p>Paper: {escape(source.strip())}. {escape(paper_tables.NOTE)}</p>"]
    for table in shown:
        sections.append(f"<h3>Table {table.number}: {escape(table.title)}</h3>")
        sections.append(f'<div class="scroll">{html_table(paper_tables.text_rows(table))}</div>')
    return sections


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text cells, header first, as a table."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def number(value: float | None) -> str:
    """A cell of a table: two decimals, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.2f}"


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make report`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/nano"), help="the experiment's folder")
    folder = parser.parse_args(args).folder
    try:
        path = write_report(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"no report: {error}")
    results = read_results(folder / "results.json")
    print(ladder_text(results, stage_starts(folder, results)))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
