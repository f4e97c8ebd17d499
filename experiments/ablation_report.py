"""ablations.json, ablations.md and ablations.html: the ladder over seeds, and what the rows differ by.

Figures come from the results.json of each seed, so from rows that the last command there has found finished; the single
answers, for the paired bootstrap, from the rows' predictions.jsonl.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.artefacts import write_atomic, write_json
from datamodules.benchmarks.mig_bench_suite import RULE
from experiments import charts
from experiments.paper_tables import markdown_table, phase_predictions
from experiments.report import STYLE, html_table
from experiments.results import Results, Stage, read_results
from experiments.significance import TRANSFER, paired_differences

FIGURES = ("avg", "in_domain", "out_of_domain", "format_rate")
NAMES = {"avg": "AVG", "in_domain": "in-domain", "out_of_domain": "out-of-domain", "format_rate": "format %"}
NOTE = (
    "AVG is the mean over tasks of Acc@0.5, in percent. ± is the standard deviation over seeds, in brackets stand the"
    " smallest and the largest. Differences are in points, paired by seed and question, with 95 % bootstrap intervals"
    " over questions and seeds; of one seed, over questions alone. An aim is reached when the mean difference reaches"
    " it; sure says whether the whole interval does."
)


@dataclass(frozen=True)
class Comparison:
    """`row` minus `over`, and the aim for their AVG, if any: a difference `at_least` or `more_than` so many points.

    or_both_at_most: the aim is reached too where neither row's AVG is above this.
    """

    row: str
    over: str
    at_least: float | None = None
    more_than: float | None = None
    or_both_at_most: float | None = None

    @property
    def aim(self) -> str:
        """The aim in words; "" without one."""
        parts = [f">= {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"> {self.more_than:g}"] if self.more_than is not None else []
        text = " and ".join(parts)
        if self.or_both_at_most is not None:
            text = f"{text} or both AVG <= {self.or_both_at_most:g}".removeprefix(" or ")
        return text

    def holds(self, difference: float) -> bool:
        """Whether a difference of so many points reaches the aim, apart from `or_both_at_most`."""
        limits = [difference >= self.at_least] if self.at_least is not None else []
        limits += [difference > self.more_than] if self.more_than is not None else []
        return bool(limits) and all(limits)


@dataclass(frozen=True)
class SeedRow:
    """One row at one seed: its stage, and per task which questions were answered rightly; None where unknown."""

    stage: Stage
    hits: Mapping[str, Mapping[str, bool]] | None


Found = dict[str, dict[int, SeedRow]]  # row -> seed -> what is there


def write(
    home: Path, folders: Mapping[int, Path], starts: Mapping[str, str], comparisons: Sequence[Comparison]
) -> str:
    """Write all three files into `home`; returns the tables as Markdown text.

    `folders` has each seed's experiment folder, `starts` every row, in the order of the tables, with that which it
    starts from.
    """
    results = {seed: read_results(f / "results.json") for seed, f in folders.items() if (f / "results.json").is_file()}
    found = {name: {} for name in starts}
    for seed, result in results.items():
        for stage in result.stages:
            if stage.name in found:
                found[stage.name][seed] = SeedRow(stage, row_hits(folders[seed] / stage.name, stage))
    summary = summarise(found, starts, comparisons, results, list(folders))
    write_json(home / "ablations.json", summary)
    sections = [(title, rows) for title, rows in tables(summary).items() if len(rows) > 1]
    text = "\n".join([f"# {home.name}", "", NOTE, *_missing(summary), *map(_markdown_section, sections)])
    write_atomic(home / "ablations.md", text)
    write_atomic(home / "ablations.html", _page(home.name, summary, sections))
    return text


def row_hits(phase: Path, stage: Stage) -> Mapping[str, Mapping[str, bool]] | None:
    """task -> question -> right?, from the phase's predictions, where they are those of the stage's figures."""
    hits: dict[str, dict[str, bool]] = {}
    for prediction in phase_predictions(phase).values():
        hits.setdefault(prediction.task, {})[prediction.id] = prediction.iou > RULE.threshold
    shares = {task: 100 * statistics.mean(right.values()) for task, right in hits.items()}
    same = shares.keys() == stage.mig_bench["tasks"].keys() and all(
        abs(share - stage.mig_bench["tasks"][task]) < 1e-6 for task, share in shares.items()
    )
    return hits if same else None


def summarise(
    found: Found,
    starts: Mapping[str, str],
    comparisons: Sequence[Comparison],
    results: Mapping[int, Results],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """What ablations.json holds: {"seeds", "commits": {seed: commit}, "rows": [row], "comparisons": [comparison]}.

    A row is {"name", "start", "seeds": {seed: {figure: value, "tasks", "n", "minutes"}}, "mean", "std", "low", "high"},
    the last four by figure; std is null of one seed. A comparison is {"row", "over", "aim", "seeds", "differences":
    {average: {"value", "low", "high", "p"}}, "by_seed": {seed: AVG's}, "reached", "sure", "missing"}; reached is null
    without an aim or a figure, and `missing` says why differences have no interval.
    """
    return {
        "seeds": list(seeds),
        "commits": {str(seed): result.commit for seed, result in results.items()},
        "rows": [_row(name, starts[name], by_seed) for name, by_seed in found.items()],
        "comparisons": [_compare(comparison, found) for comparison in comparisons],
    }


def _row(name: str, start: str, by_seed: Mapping[int, SeedRow]) -> dict[str, Any]:
    seeds = {}
    for seed, row in sorted(by_seed.items()):
        bench = row.stage.mig_bench
        seeds[str(seed)] = {key: bench[key] for key in (*FIGURES, "tasks", "n")} | {"minutes": row.stage.seconds / 60}
    values = {key: [s[key] for s in seeds.values() if s[key] is not None] for key in (*FIGURES, "minutes")}
    values = {key: found for key, found in values.items() if found}
    return {
        "name": name,
        "start": start,
        "seeds": seeds,
        "mean": {key: statistics.mean(v) for key, v in values.items()},
        "std": {key: statistics.stdev(v) if len(v) > 1 else None for key, v in values.items()},
        "low": {key: min(v) for key, v in values.items()},
        "high": {key: max(v) for key, v in values.items()},
    }


def _compare(comparison: Comparison, found: Found) -> dict[str, Any]:
    row, over = found[comparison.row], found[comparison.over]
    seeds = sorted(row.keys() & over.keys())
    by_seed = {s: row[s].stage.mig_bench["avg"] - over[s].stage.mig_bench["avg"] for s in seeds}
    record: dict[str, Any] = {"row": comparison.row, "over": comparison.over, "aim": comparison.aim, "seeds": seeds}
    record |= {"by_seed": {str(s): value for s, value in by_seed.items()}, "differences": {}, "missing": ""}
    record |= {"reached": None, "sure": None}
    if not seeds:
        return record | {"missing": "no seed has both rows"}
    sides = [[side[s].hits for s in seeds] for side in (row, over)]
    if any(hits is None for side in sides for hits in side):
        record["missing"] = "the single answers are not there, or not those of the figures"
    elif len({_questions(hits) for side in sides for hits in side}) > 1:
        record["missing"] = "the rows were asked different questions"
    else:
        differences = paired_differences(*(_stack(side) for side in sides))
        record["differences"] = {name: asdict(difference) for name, difference in differences.items()}
    if comparison.aim:
        low_enough = comparison.or_both_at_most is not None and all(
            statistics.mean(side[s].stage.mig_bench["avg"] for s in seeds) <= comparison.or_both_at_most
            for side in (row, over)
        )
        record["reached"] = low_enough or comparison.holds(statistics.mean(by_seed.values()))
        if "avg" in record["differences"]:
            record["sure"] = comparison.holds(record["differences"]["avg"]["low"])
    return record


def _questions(hits: Mapping[str, Mapping[str, bool]]) -> tuple:
    return tuple((task, *sorted(right)) for task, right in sorted(hits.items()))


def _stack(seeds: Sequence[Mapping[str, Mapping[str, bool]]]) -> dict[str, np.ndarray]:
    """task -> bool [seeds, questions], questions in the order of their ids."""
    return {
        task: np.array([[right for _, right in sorted(hits[task].items())] for hits in seeds]) for task in seeds[0]
    }


def tables(summary: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Title -> rows of text cells, header first."""
    rows = [row for row in summary["rows"] if row["seeds"]]
    ladder = [["row", "from", "seeds", *NAMES.values(), "minutes"]]
    every = [["row", "seed", *NAMES.values(), "questions", "minutes"]]
    for row in rows:
        ladder.append([row["name"], row["start"] if row["start"] != row["name"] else "", str(len(row["seeds"]))])
        ladder[-1] += [_spread(row, key) for key in FIGURES] + [f"{row['mean']['minutes']:.1f}"]
        for seed, values in row["seeds"].items():
            figures = [_number(values[key]) for key in FIGURES]
            every.append([row["name"], seed, *figures, str(values["n"]), f"{values['minutes']:.1f}"])
    names = list(dict.fromkeys(task for row in rows for seed in row["seeds"].values() for task in seed["tasks"]))
    tasks = [["task", *(row["name"] for row in rows)]]
    tasks += [[task, *(_number(task_means(row).get(task)) for row in rows)] for task in names]
    return {
        "Ladder": ladder,
        "Aims": _aim_rows(summary),
        "Differences": _difference_rows(summary),
        "Tasks, mean over seeds": tasks,
        "Every seed": every,
    }


def task_means(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's accuracy by task, the mean over its seeds."""
    seeds = list(row["seeds"].values())
    return {task: statistics.mean(seed["tasks"][task] for seed in seeds) for task in seeds[0]["tasks"]} if seeds else {}


def _aim_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["aim for AVG", "reached", "difference", "95 % interval", "p", "sure", "seeds"]]
    words = {True: "yes", False: "NO", None: "not measured"}
    for record in (record for record in summary["comparisons"] if record["aim"]):
        values = list(record["by_seed"].values())
        seeds = f"{len(values)} of {len(summary['seeds'])}"
        figure = f"{statistics.mean(values):+.2f}" if values else "–"
        interval, p = _interval(record["differences"].get("avg"))
        sure = words[record["sure"]] if record["sure"] is not None else "–"
        aim = f"{record['row']} − {record['over']} {record['aim']}"
        rows.append([aim, words[record["reached"]], figure, interval, p, sure, seeds])
    return rows


def _difference_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["difference", "of", "points", "95 % interval", "p", "by seed", "seeds"]]
    for record in summary["comparisons"]:
        title, seeds = f"{record['row']} − {record['over']}", ", ".join(map(str, record["seeds"]))
        by_seed = ", ".join(f"{value:+.2f}" for value in record["by_seed"].values())
        for key, difference in record["differences"].items():
            what = "out-of-domain − in-domain" if key == TRANSFER else NAMES[key]
            cells = [f"{difference['value']:+.2f}", *_interval(difference), by_seed if key == "avg" else "", seeds]
            rows.append([title, what, *cells])
        if record["missing"]:
            rows.append([title, record["missing"], "–", "–", "–", by_seed, seeds])
    return rows


def _interval(difference: Mapping[str, float] | None) -> tuple[str, str]:
    if difference is None:
        return "–", "–"
    return f"[{difference['low']:+.2f}, {difference['high']:+.2f}]", f"{difference['p']:.3f}"


def _spread(row: Mapping[str, Any], key: str) -> str:
    if key not in row["mean"]:
        return "–"
    std = row["std"][key]
    spread = "" if std is None else f" ± {std:.2f} [{row['low'][key]:.2f}, {row['high'][key]:.2f}]"
    return f"{row['mean'][key]:.2f}{spread}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """A line for every row that some seed has not finished yet."""
    lines = []
    for row in summary["rows"]:
        absent = [str(seed) for seed in summary["seeds"] if str(seed) not in row["seeds"]]
        lines += ["", f"Not there yet: {row['name']} at seed {', '.join(absent)}."] if absent else []
    return lines


def _markdown_section(section: tuple[str, list[list[str]]]) -> str:
    title, rows = section
    return f"\n## {title}\n\n{markdown_table(rows)}\n"


def _page(title: str, summary: Mapping[str, Any], sections: Sequence[tuple[str, list[list[str]]]]) -> str:
    bars = {row["name"]: task_means(row) for row in summary["rows"] if row["seeds"]}
    names = list(dict.fromkeys(task for tasks in bars.values() for task in tasks))
    commits = ", ".join(f"seed {seed}: {commit}" for seed, commit in summary["commits"].items())
    body = [f"<h1>{escape(title)}</h1><p>{escape(NOTE)}</p><p>Commits: {escape(commits or 'nothing is finished')}</p>"]
    body += [f"<p>{escape(line)}</p>" for line in _missing(summary) if line]
    for heading, rows in sections:
        body.append(f'<h2>{escape(heading)}</h2><div class="scroll">{html_table(rows)}</div>')
    if names:
        body.append(f'<div class="scroll">{charts.bar_chart("Acc@0.5 by task, mean over seeds", names, bars)}</div>')
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"
