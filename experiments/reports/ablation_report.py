"""Write ablations.json, .md and .html: the mean of each row over its seeds, and the differences between rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.persistence.files import read_json, write_atomic, write_json
from datamodules.persistence.message_text import markdown_table
from experiments.reports.ablation_summary import FIGURES, Comparison, Finding, read_rows, summarise
from experiments.reports.drawing import charts
from experiments.reports.drawing.templates import render
from experiments.reports.pipeline_report import number
from experiments.reports.significance import TRANSFER
from experiments.reports.stored_answers import changed_answers

NAMES = {"avg": "AVG", "in_domain": "in-domain", "out_of_domain": "out-of-domain", "format_rate": "format %"}
NOTE = (
    "AVG is the mean over tasks of Acc@0.5, in percent. ± is the standard deviation over seeds, in brackets stand the"
    " smallest and the largest. Differences are in points, paired by seed and question, with 95 % bootstrap intervals"
    " over questions and seeds; of one seed, over questions alone. Questions about the same images are drawn together."
    " p (Holm) is p corrected for the number of comparisons of the same figure. An aim is reached when the mean"
    " difference reaches it; sure says whether the whole interval does. A finding is shown if its whole interval is on"
    " the paper's side, and opposite if it is on the other side."
)

EXAMPLES_NOTE = (
    "Each question here is the first of its task that became right; the tasks are evenly spaced in the order of the"
    " benchmark. `make predictions` with both folders shows all answers, those that became wrong too."
)


def write(
    home: Path,
    folders: Mapping[int, Path],
    starts: Mapping[str, str],
    comparisons: Sequence[Comparison],
    findings: Sequence[Finding] = (),
) -> str:
    """Write all three files into `home`; returns the tables as Markdown text.

    `folders` maps each seed to its experiment folder. `starts` maps each row to the row it starts from, in the order of
    the tables.
    """
    summary = summarise(read_rows(folders, starts), starts, comparisons, list(folders), findings)
    write_json(home / "ablations.json", summary)
    sections = [(title, rows) for title, rows in tables(summary).items() if len(rows) > 1]
    text = "\n".join(
        [
            f"# {home.name}",
            "",
            NOTE,
            *_missing(summary),
            *(f"\n## {title}\n\n{markdown_table(rows)}\n" for title, rows in sections),
        ]
    )
    write_atomic(home / "ablations.md", text)
    means = {row["name"]: task_means(row) for row in summary["rows"] if row["seeds"]}
    names = list(dict.fromkeys(task for tasks in means.values() for task in tasks))
    chart = charts.bar_chart("Acc@0.5 by task, mean over seeds", names, means)
    notes = [NOTE, " ".join(filter(None, _missing(summary)))]
    drawn = [
        _examples(comparison, folders[record["seeds"][0]])
        for comparison, record in zip(comparisons, summary["comparisons"], strict=True)
        if comparison.examples and record["seeds"]
    ]
    page = render(
        "ablations.html.j2",
        title=home.name,
        notes=notes,
        tables=sections,
        task_chart=chart,
        examples=[each for each in drawn if each],
    )
    write_atomic(home / "ablations.html", page)
    return text


def figures(home: Path) -> tuple[dict[str, float], dict[str, list[list[str]]]]:
    """Values and tables of `home`/ablations.json for W&B: "<row>/<figure>", "<row>/avg_std" and differences."""
    summary = read_json(home / "ablations.json")
    values = {}
    for row in summary["rows"]:
        values |= {f"{row['name']}/{key}": value for key, value in row["mean"].items()}
        if row["std"].get("avg") is not None:
            values[f"{row['name']}/avg_std"] = row["std"]["avg"]
    for record in summary["comparisons"]:
        for key in record["differences"].keys() - {TRANSFER}:
            name = f"{record['row']}-{record['over']}/{key}"
            values |= {name: record["differences"][key]["value"], f"{name}_p": record["differences"][key]["p"]}
    return values, tables(summary)


def tables(summary: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The tables: title -> rows of text cells, header first."""
    rows = [row for row in summary["rows"] if row["seeds"]]
    means = [["row", "from", "seeds", *NAMES.values(), "minutes"]]
    every = [["row", "seed", *NAMES.values(), "questions", "minutes", "trained at"]]
    for row in rows:
        means.append([row["name"], row["start"] if row["start"] != row["name"] else "", str(len(row["seeds"]))])
        means[-1] += [_spread(row, key) for key in FIGURES] + [f"{row['mean']['minutes']:.1f}"]
        for seed, values in row["seeds"].items():
            figures = [number(values[key]) for key in FIGURES]
            last = [str(values["n"]), f"{values['minutes']:.1f}", values["commit"] or "–"]
            every.append([row["name"], seed, *figures, *last])
    names = list(dict.fromkeys(task for row in rows for seed in row["seeds"].values() for task in seed["tasks"]))
    tasks = [["task", *(row["name"] for row in rows)]]
    tasks += [[task, *(number(task_means(row).get(task)) for row in rows)] for task in names]
    return {
        "Rows": means,
        "The paper's findings": _finding_rows(summary),
        "Aims": _aim_rows(summary),
        "Differences": _difference_rows(summary),
        "Tasks, mean over seeds": tasks,
        "Every seed": every,
    }


def task_means(row: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy of a row by task: the mean over the seeds at which the task was measured."""
    by_task: dict[str, list[float]] = {}
    for seed in row["seeds"].values():
        for task, accuracy in seed["tasks"].items():
            by_task.setdefault(task, []).append(accuracy)
    return {task: statistics.mean(values) for task, values in by_task.items()}


def _examples(comparison: Comparison, folder: Path) -> dict[str, Any] | None:
    """The section of drawn examples of a comparison, from the experiment folder of one seed."""
    changed = changed_answers(folder / comparison.over, folder / comparison.row, comparison.examples)
    if changed is None:
        return None
    note = (
        f"{folder.name}: {changed.num_won} answers became right from {comparison.over} to {comparison.row}, and"
        f" {changed.num_lost} became wrong. "
    )
    note += f"No pictures: {changed.missing}." if changed.missing else EXAMPLES_NOTE
    title = f"Answers that changed from {comparison.over} to {comparison.row}"
    return {"title": title, "note": note, "previews": changed.previews}


def _finding_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["finding", "here", "comparison", "of", "points", "95 % interval", "p (Holm)", "paper"]]
    for record in summary["findings"]:
        difference = record["difference"]
        points = "–" if difference is None else f"{difference['value']:+.2f}"
        interval, _, corrected = _interval(difference)
        limit = f" > {record['more_than']:g}" if record["more_than"] else ""
        compared = [f"{record['row']} − {record['over']}{limit}", _figure_name(record["figure"])]
        paper = "" if record["paper"] is None else f"{record['paper']:+.2f}"
        rows.append([record["text"], record["verdict"], *compared, points, interval, corrected, paper])
    return rows


def _figure_name(figure: str) -> str:
    return "out-of-domain − in-domain" if figure == TRANSFER else NAMES[figure]


def _aim_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["aim for AVG", "reached", "difference", "95 % interval", "p", "p (Holm)", "sure", "seeds"]]
    words = {True: "yes", False: "no", None: "not measured"}
    for record in (record for record in summary["comparisons"] if record["aim"]):
        values = list(record["by_seed"].values())
        seeds = f"{len(values)} of {len(summary['seeds'])}"
        figure = f"{statistics.mean(values):+.2f}" if values else "–"
        interval, p, corrected = _interval(record["differences"].get("avg"))
        sure = words[record["sure"]] if record["sure"] is not None else "–"
        aim = f"{record['row']} − {record['over']} {record['aim']}"
        rows.append([aim, words[record["reached"]], figure, interval, p, corrected, sure, seeds])
    return rows


def _difference_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["difference", "of", "points", "95 % interval", "p", "p (Holm)", "by seed", "seeds"]]
    for record in summary["comparisons"]:
        title, seeds = f"{record['row']} − {record['over']}", ", ".join(map(str, record["seeds"]))
        by_seed = ", ".join(f"{value:+.2f}" for value in record["by_seed"].values())
        for key, difference in record["differences"].items():
            cells = [f"{difference['value']:+.2f}", *_interval(difference), by_seed if key == "avg" else "", seeds]
            rows.append([title, _figure_name(key), *cells])
        if record["missing"]:
            rows.append([title, record["missing"], "–", "–", "–", "–", by_seed, seeds])
    return rows


def _interval(difference: Mapping[str, float] | None) -> tuple[str, str, str]:
    """The interval, p and the corrected p as text."""
    if difference is None:
        return "–", "–", "–"
    interval = f"[{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return interval, f"{difference['p']:.3f}", f"{difference['p_holm']:.3f}"


def _spread(row: Mapping[str, Any], key: str) -> str:
    if key not in row["mean"]:
        return "–"
    std = row["std"][key]
    spread = "" if std is None else f" ± {std:.2f} [{row['low'][key]:.2f}, {row['high'][key]:.2f}]"
    return f"{row['mean'][key]:.2f}{spread}"


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """A line for every row that is not finished at all seeds."""
    lines = []
    for row in summary["rows"]:
        absent = [str(seed) for seed in summary["seeds"] if str(seed) not in row["seeds"]]
        lines += ["", f"Not there yet: {row['name']} at seed {', '.join(absent)}."] if absent else []
    return lines
