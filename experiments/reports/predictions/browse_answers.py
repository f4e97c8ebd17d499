"""Write a page that shows an evaluation's answers: images with true and predicted boxes, filters, two models.

    make predictions RUNS="outputs/nano/grpo outputs/nano/cot_sft" BENCH=mig_bench
    python -m experiments.reports.predictions.browse_answers --runs outputs/eval/models--nano-base --bench blink

The page is one file that opens offline. It says how many questions and images are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.benchmarks import mig_bench
from datamodules.metrics.result_files import PREDICTIONS, RESULT, read_predictions, read_result, same_questions
from datamodules.persistence.files import write_atomic
from datamodules.persistence.user_error import UserError
from experiments.reports.predictions.answer_page import Answers, render_answers
from experiments.reports.stored_answers import load_questions
from experiments.runs.commands import command
from experiments.runs.results import benchmark_folders, preference
from experiments.runs.usage_errors import PlainParser, suggest

MOST_MODELS = 2


class NoAnswers(UserError, ValueError):
    """There are no answers to show. The message names the folder and its evaluations."""


def write_page(
    runs: Sequence[str | Path],
    output: Path,
    bench: str = "",
    max_questions: int = 600,
    max_megabytes: float = 24.0,
) -> Path:
    """Write the page; returns its path.

    Args:
        runs: one or two folders: of a phase, of a model in outputs/eval, or of one benchmark's results.
        output: file of the page.
        bench: folder name of the benchmark, where a folder has several; "" takes MIG-Bench, or the only one.
        max_questions: largest number of questions on the page.
        max_megabytes: largest size of the pictures on the page.

    Raises:
        NoAnswers: a folder has no such evaluation, or the two models answered different benchmarks.
    """
    if not 1 <= len(runs) <= MOST_MODELS:
        raise NoAnswers(f"--runs={' '.join(map(str, runs))}: give one or two folders, not {len(runs)}")
    if max_questions < 1 or max_megabytes < 0:
        raise NoAnswers(f"--max_questions={max_questions} must be at least 1, --max_megabytes={max_megabytes} 0")
    models = [_read(find_evaluation(Path(run), bench)) for run in runs]
    if len({model.label for model in models}) < len(models):
        models = [replace(model, label=str(model.folder)) for model in models]
    names = [model.result["benchmark"] for model in models]
    if len(set(names)) > 1:
        raise NoAnswers(f"--runs: {models[0].folder} has {names[0]} and {models[1].folder} {names[1]}: compare one")
    if not same_questions(models[0].result, models[-1].result):
        asked = " and ".join(f"{model.folder} those of {model.result['data_root']}" for model in models)
        raise NoAnswers(f"--runs: the models were asked different questions, {asked}: compare answers to the same ones")
    benchmark, missing = load_questions(models[0].result)
    write_atomic(output, render_answers(models, benchmark, missing, max_questions, max_megabytes))
    return output


def find_evaluation(run: Path, bench: str = "") -> Path:
    """The folder of one benchmark's results in a phase, in a model's folder in outputs/eval, or `run` itself.

    Raises NoAnswers.
    """
    if (run / RESULT).is_file():
        return run
    found = benchmark_folders(run)
    if not found:
        cure = f"make eval MODEL={run / 'merged'}" if (run / "merged").is_dir() else "make eval MODEL=folder makes some"
        raise NoAnswers(f"--runs={run}: no evaluation with a {RESULT} is there; {cure}")
    if not bench:
        named = [name for name in found if name.startswith(mig_bench.NAME)]
        if len(found) > 1 and not named:
            raise NoAnswers(f"--runs={run} has several benchmarks: name one with --bench: {', '.join(found)}")
        return found[min(named, key=lambda name: preference(found[name]))] if named else next(iter(found.values()))
    if bench not in found:
        raise NoAnswers(f"--bench={bench}: {run} has only {', '.join(found)}{suggest(bench, found)}")
    return found[bench]


def _read(folder: Path) -> Answers:
    parts = [part for part in folder.resolve().parts[-4:] if part not in ("benchmarks", "outputs", "eval")]
    label = "/".join(parts[-3:-1]) or folder.name
    return Answers(label, folder, read_result(folder / RESULT), read_predictions(folder / PREDICTIONS))


@command(failed="no page of answers")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make predictions`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, help="one or two folders of phases or evaluations")
    parser.add_argument("--bench", default="", help="folder name of the benchmark, such as mig_bench or ref_l4-limit2")
    parser.add_argument("--output", type=Path, default=Path("outputs/predictions.html"), help="file of the page")
    parser.add_argument("--max_questions", type=int, default=600, help="questions on the page, evenly over the file")
    parser.add_argument("--max_megabytes", type=float, default=24.0, help="size of all pictures on the page")
    given = parser.parse_args(args)
    path = write_page(given.runs, given.output, given.bench, given.max_questions, given.max_megabytes)
    print(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
