"""Score stored answers again without model and data, with another threshold, choice of box or average.

python -m experiments.evaluation.rescore --predictions outputs/eval/models--nano-base/ref_l4 --threshold 0.3

By default, the benchmark's own rule is used. The result is printed and written to rescored.json beside the predictions
(`--output` names another file); result.json is not changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from datamodules.benchmarks.registry import benchmark_rules
from datamodules.metrics.extraction import with_extractor
from datamodules.metrics.result_files import PREDICTIONS, RESULT, format_result, read_predictions, read_result
from datamodules.metrics.scoring import rescore
from datamodules.persistence.files import write_json
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.results import benchmark_folders
from lightning_modules.metrics.summary import summarise


def rescore_predictions(
    predictions: str,
    threshold: float | None = None,
    inclusive: bool | None = None,
    box: Literal["first", "last", "best"] | None = None,
    within: Literal["micro", "macro"] | None = None,
    across: Literal["micro", "macro"] | None = None,
    seed: int = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Score stored answers again; returns the result in the format of result.json.

    Args:
        predictions: folder of one benchmark's results, with predictions.jsonl and result.json; or the folder of a phase
            or a model that has only one
        threshold: IoU above which a box counts
        inclusive: an IoU equal to the threshold counts too
        box: which of several boxes counts; best uses the true box
        within: a column's accuracy over its questions (micro) or the mean of its units (macro)
        across: averages over columns (macro) or over their questions (micro)
        seed: seed of the bootstrap
        output: output file; null means rescored.json in the folder
    """
    folder = only_results(Path(predictions))
    result = read_result(folder / RESULT)
    stored = read_predictions(folder / PREDICTIONS)
    try:
        own, official, averages = benchmark_rules(result["benchmark"], (prediction.column for prediction in stored))
    except ValueError as error:
        raise ValueError(f"{folder / RESULT}: {error}") from error
    asked = {"threshold": threshold, "inclusive": inclusive, "box": box, "within": within, "across": across}
    changes = {name: value for name, value in asked.items() if value is not None}
    if changes:
        changes["source"] = f"{own.source}; changed: {', '.join(f'{n}={v}' for n, v in changes.items())}"
    rule = replace(own, **changes)
    official = with_extractor(official, (result.get("extractor") or {}).get("model"))
    scored = [rescore(prediction, rule, official) for prediction in stored]
    rescored = result | summarise(scored, rule, official, averages, seed)
    write_json(Path(output) if output else folder / "rescored.json", rescored)
    print(format_result(rescored))
    return rescored


def only_results(folder: Path) -> Path:
    """`folder` itself, or the only folder with results in a phase or in a model's folder.

    Raises ValueError if there is none, or more than one.
    """
    found = list(benchmark_folders(folder).values())
    if not found:
        raise ValueError(f"predictions={str(folder)!r}: no {RESULT} is there; make eval MODEL=folder makes one")
    if len(found) > 1:
        raise ValueError(f"predictions={str(folder)!r} has several results: name one of {', '.join(map(str, found))}")
    return found[0]


@command(failed="not rescored")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make rescore`."""
    run_cli(rescore_predictions, args)


if __name__ == "__main__":
    main()
