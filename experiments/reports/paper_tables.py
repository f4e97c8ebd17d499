"""The paper's Tables 2 to 9, with the paper's rows and the measured rows.

Measured rows come from the result.json files of `make eval` and of pipelines below an outputs folder. Results with a
limit on the number of questions are skipped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from datamodules.benchmarks.base import Rule
from datamodules.metrics.result_files import RESULT, OtherVersion, read_result, result_folder
from datamodules.persistence.message_text import markdown_table
from lightning_modules.metrics.bootstrap import bootstrap_intervals
from lightning_modules.serving.generation_rules import note

DATA = Path(__file__).with_name("paper_tables.yaml")
NOTE = (
    "Measured cells have 95 % bootstrap intervals (of no width at 0 and 100 %); n is the number of questions. Rows"
    " measured on nano replicas (data/nano) are not comparable with the paper's."
)
Cells = dict[str, dict[str, Any]]  # "<benchmark>/<column or average>" -> {"score", "low", "high", "n"}


@dataclass(frozen=True)
class Row:
    """`cells` has one entry per column of its table: a number of the paper, a measured cell, or None."""

    label: str
    measured: bool
    cells: tuple[float | Mapping[str, Any] | None, ...]


@dataclass(frozen=True)
class Table:
    number: int
    title: str
    columns: tuple[tuple[str, str], ...]  # (heading, measured cell or "mean")
    rows: tuple[Row, ...]


def load_paper_tables() -> tuple[str, list[Table]]:
    """The name of the paper and its tables. Raises ValueError if a row does not fit the columns of its table."""
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    tables = []
    for table in data["tables"]:
        columns = tuple((heading, key) for heading, key in table["columns"])
        rows = tuple(Row(label, False, tuple(values)) for label, *values in table["rows"])
        if wrong := [row.label for row in rows if len(row.cells) != len(columns)]:
            raise ValueError(f"{DATA.name}, table {table['number']}: {wrong} do not have {len(columns)} numbers")
        tables.append(Table(table["number"], table["title"], columns, rows))
    return data["source"], tables


def with_measured(tables: Sequence[Table], measured: Mapping[str, Cells]) -> list[Table]:
    """Add a row for each label that has at least one cell of a table."""
    return [replace(table, rows=table.rows + tuple(_measured_rows(table, measured))) for table in tables]


def _measured_rows(table: Table, measured: Mapping[str, Cells]) -> list[Row]:
    rows = []
    for label, cells in measured.items():
        row = [cells.get(key) for _, key in table.columns]
        if any(cell is not None for cell in row):
            parts = [key for _, key in table.columns if key != "mean"]
            # A mean over only some columns would look like the paper's number but have another meaning.
            whole = all(key in cells for key in parts)
            mean = mean_cell([cells[key] for key in parts]) if whole else None
            filled = [mean if key == "mean" else cell for (_, key), cell in zip(table.columns, row, strict=True)]
            rows.append(Row(label, True, tuple(filled)))
    return rows


def mean_cell(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of columns from different benchmarks, with its interval. The columns must be averages over questions."""
    # (hits, questions) of each column, from its score in %. The bootstrap resamples the questions within each column.
    counts = {str(k): {"": (round(cell["score"] * cell["n"] / 100), cell["n"])} for k, cell in enumerate(cells)}
    low, high = bootstrap_intervals(counts, Rule(source="mean over columns"), {"avg": tuple(counts)})["avg"]
    score = sum(cell["score"] for cell in cells) / len(cells)
    return {"score": score, "low": low, "high": high, "n": sum(cell["n"] for cell in cells)}


def find_measured(outputs: Path) -> dict[str, Cells]:
    """Label -> cells, for all results below `outputs`: evaluated models, and phases of experiments."""
    # 1. Models that were evaluated without a pipeline: a row for each folder, as one model may have been asked in two
    # ways (on a server too, in another prompt form). Rows of one label are told apart by their folders.
    found: dict[str, dict[str, Cells]] = {}  # label -> folder -> cells
    for file, result in _whole_results(outputs.glob(f"eval/*/*/{RESULT}")):
        label = f"{result['model']} ({result['data_root']}){note(result['generation'])}"
        folder = file.parents[1].name
        found.setdefault(label, {}).setdefault(folder, {}).update(result_cells(result))
    measured = {
        label if len(folders) == 1 else f"{label}, in {folder}": cells
        for label, folders in found.items()
        for folder, cells in folders.items()
    }
    # 2. Phases of experiments, with benchmarks in their folders.
    for experiment in sorted(path for path in outputs.iterdir() if path.is_dir()):
        measured |= phase_measured(experiment)
    return measured


def phase_measured(experiment: Path) -> dict[str, Cells]:
    """The same for the phases of an experiment, as "<experiment>/<phase> (<data_root>)", for each decoding method."""
    measured: dict[str, Cells] = {}
    phases = [path for path in sorted(experiment.iterdir()) if "." not in path.name]  # a dot means a renamed old run
    for phase in phases:
        for _, result in _whole_results(phase.glob(f"benchmarks/*/{RESULT}")):
            label = f"{experiment.name}/{phase.name} ({result['data_root']}){note(result['generation'])}"
            measured.setdefault(label, {}).update(result_cells(result))
    return measured


def _whole_results(files: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The results of complete benchmarks with their files, in the order of their paths.

    Results of earlier versions are reported and skipped. Evaluations of a phase with other settings, which have their
    own folders, are skipped too.
    """
    for file in sorted(files):
        try:
            result = read_result(file)
        except OtherVersion as error:
            print(f"left out: {error}", flush=True)
            continue
        if file.parent.name == result_folder(result["benchmark"], None, result["generation"]):
            yield file, result


def result_cells(result: Mapping[str, Any]) -> Cells:
    """The cells of a result: "<benchmark>/<column or average>" -> cell."""
    return {f"{result['benchmark']}/{name}": cell for name, cell in (result["columns"] | result["averages"]).items()}


def text_rows(table: Table) -> list[list[str]]:
    """Header and rows as text. Measured rows are marked; they have intervals and the number of questions."""
    rows = [["", *(heading for heading, _ in table.columns), "n"]]
    for row in table.rows:
        asked = [cell["n"] for cell in row.cells if isinstance(cell, Mapping)]
        label = f"measured: {row.label}" if row.measured else row.label
        rows.append([label, *map(_text, row.cells), str(max(asked)) if asked else ""])
    return rows


def markdown(source: str, tables: Sequence[Table]) -> str:
    lines = ["# The paper's tables and what was measured", "", f"Paper: {source.strip()}.", NOTE]
    for table in tables:
        lines += ["", f"## Table {table.number}: {table.title}", "", markdown_table(text_rows(table))]
    return "\n".join(lines) + "\n"


def comma_separated(tables: Sequence[Table]) -> str:
    """One line per cell: table, row, measured or paper, column, score, low, high, n."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "kind", "column", "score", "low", "high", "n"])
    for table in tables:
        for row in table.rows:
            for (heading, _), cell in zip(table.columns, row.cells, strict=True):
                if isinstance(cell, Mapping):
                    numbers = [*(f"{cell[key]:.4f}" for key in ("score", "low", "high")), cell["n"]]
                    writer.writerow([table.number, row.label, "measured", heading, *numbers])
                elif cell is not None:
                    writer.writerow([table.number, row.label, "paper", heading, cell, "", "", ""])
    return file.getvalue()


def _text(cell: float | Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Mapping):
        return f"{cell['score']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
    return f"{cell:.2f}"
