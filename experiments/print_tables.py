"""Print the paper's Tables 2 to 9 together with the measured numbers.

Writes <outputs>/tables/tables.md and tables.csv, and rewrites report.html of every experiment with the rows of the
experiment.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.persistence.files import write_atomic
from experiments.reports import paper_tables
from experiments.reports.pipeline_report import write_report
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser


def make_tables(outputs: Path) -> str:
    """Write all files; returns the Markdown text."""
    source, tables = paper_tables.load_paper_tables()
    tables = paper_tables.with_measured(tables, paper_tables.find_measured(outputs))
    text = paper_tables.markdown(source, tables)
    write_atomic(outputs / "tables" / "tables.md", text)
    write_atomic(outputs / "tables" / "tables.csv", paper_tables.comma_separated(tables))
    for folder in reported(outputs):
        write_report(folder)
    return text


def reported(outputs: Path) -> list[Path]:
    """The experiments whose report.html has the tables."""
    return sorted(results.parent for results in outputs.glob("*/results.json"))


@command(failed="no tables")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make tables`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder of all experiments")
    outputs = parser.parse_args(args).outputs
    print(make_tables(outputs))
    reports = [str(folder / "report.html") for folder in reported(outputs)]
    print(f"wrote {', '.join([str(outputs / 'tables'), *reports])}")


if __name__ == "__main__":
    main()
