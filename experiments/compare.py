"""Write a page that compares runs: stages, tasks, curves, settings, and all completions of logged prompts.

    python -m experiments.compare --runs outputs/nano outputs/nano-seed1/grpo

Open outputs/compare/index.html in a browser. It needs the files in the same folder, but no network.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from datamodules.persistence.files import write_atomic
from experiments.reports.compare_page import render_page
from experiments.reports.find_runs import find_runs
from experiments.reports.rollout_pages import write_rollouts
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser

MARKER = "comparison.txt"  # only a folder with this file may be overwritten


def compare(paths: Sequence[str | Path], output: Path, max_groups: int = 5000, max_pictures: int = 4000) -> Path:
    """Write the comparison of runs; the path of its index.html.

    Args:
        paths: folders of phases or of whole experiments.
        output: the folder of the page.
        max_groups: largest number of rollout groups that are written for one run, spread evenly over the run.
        max_pictures: largest number of picture files for one run.

    Raises ValueError for a path without a run, and for an `output` folder with other files.
    """
    if min(max_groups, max_pictures) < 0:
        raise ValueError(f"max_groups={max_groups}, max_pictures={max_pictures} must not be negative")
    runs = find_runs(paths)
    output = Path(output)
    if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise ValueError(f"output={output} holds files that are not of a comparison: choose another folder")
    # The marker comes first: after a kill the unfinished folder may be overwritten.
    write_atomic(output / MARKER, "".join(f"{run.folder}\n" for run in runs))
    if (output / "rollouts").exists():
        shutil.rmtree(output / "rollouts")
    logs = {
        place: write_rollouts(run, output / "rollouts" / str(place), str(place), max_groups, max_pictures)
        for place, run in enumerate(runs)
        if run.groups
    }
    page = output / "index.html"
    write_atomic(page, render_page(runs, logs))
    for place, log in logs.items():
        print(f"{runs[place].label}: {log.num_written:,} of {log.num_groups:,} groups, {log.num_pictures:,} pictures")
        print(*(f"  {note}" for note in log.notes), sep="\n", end="\n" if log.notes else "")
    return page


@command(failed="no comparison")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make compare`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, help="folders of phases or of whole experiments")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="folder of the page")
    parser.add_argument("--max_groups", type=int, default=5000, help="groups of one run, evenly over it")
    parser.add_argument("--max_pictures", type=int, default=4000, help="picture files of one run")
    options = parser.parse_args(args)
    print(f"wrote {compare(options.runs, options.output, options.max_groups, options.max_pictures)}")


if __name__ == "__main__":
    main()
