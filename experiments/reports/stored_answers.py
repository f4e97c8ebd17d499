"""Stored answers of evaluations with their questions, and drawn examples of those that changed between two rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Benchmark
from datamodules.benchmarks.registry import load_benchmark
from datamodules.benchmarks.shard_folders import PREFIX
from datamodules.images.image_loading import MAX_IMAGE_PIXELS
from datamodules.metrics.drawing import describe_preview, draw_previews
from datamodules.metrics.result_files import PREDICTIONS, RESULT, read_predictions, read_result, same_questions
from experiments.reports.drawing.pictures import data_uri
from experiments.reports.rollout_pages import thin
from experiments.runs.results import find_mig_bench


def load_questions(result: Mapping[str, Any]) -> tuple[Benchmark | None, str]:
    """(the benchmark of an evaluation's result.json, ""); (None, why) if its files cannot be read."""
    name, root = result["benchmark"], result["data_root"]
    try:
        return load_benchmark(root if name.startswith(PREFIX) else name, root), ""
    except (OSError, ValueError) as error:
        return None, f"the benchmark cannot be read ({str(error).splitlines()[0][:200]})"


@dataclass(frozen=True)
class ChangedAnswers:
    """What changed from one row to another at one seed.

    num_won, num_lost: questions that became right, and that became wrong.
    previews: for each drawn question the answer before and the answer after, as the macro `preview` shows them.
    missing: why nothing is drawn; "" if something is.
    """

    num_won: int
    num_lost: int
    previews: Sequence[dict[str, Any]]
    missing: str


def changed_answers(before: Path, after: Path, limit: int) -> ChangedAnswers | None:
    """What changed on MIG-Bench from the phase in `before` to the one in `after`; None if the questions differ.

    Nobody picks the drawn questions: each is the first won question of its task, and their tasks are evenly spaced in
    the order of the benchmark.

    Args:
        before, after: folders of evaluated phases.
        limit: largest number of drawn questions.
    """
    folders = [find_mig_bench(before), find_mig_bench(after)]
    if any(folder is None or not (folder / PREDICTIONS).is_file() for folder in folders):
        return None
    old, new = ({each.id: each for each in read_predictions(folder / PREDICTIONS)} for folder in folders)
    first, second = (read_result(folder / RESULT) for folder in folders)
    if old.keys() != new.keys() or not same_questions(first, second):
        return None
    # 1. Count, and take the first won question of each task.
    won = [name for name in old if new[name].correct and not old[name].correct]
    num_lost = sum(old[name].correct and not new[name].correct for name in old)
    first: dict[str, str] = {}
    for name in won:
        first.setdefault(old[name].column, name)
    chosen = thin(list(first.values()), limit)
    # 2. Draw both answers to each.
    benchmark, missing = load_questions(second)
    if benchmark is None:
        return ChangedAnswers(len(won), num_lost, [], missing)
    samples = {sample.id: sample for sample in benchmark.samples}
    answers = [(phase.name, side[name]) for name in chosen for phase, side in ((before, old), (after, new))]
    if any(name not in samples or samples[name].answer != new[name].answer for name in chosen):
        return ChangedAnswers(len(won), num_lost, [], "the questions have changed since")
    asked = [samples[answer.id] for _, answer in answers]
    drawn = draw_previews(asked, [answer for _, answer in answers], benchmark.load, MAX_IMAGE_PIXELS)
    if len(drawn) < len(answers):
        return ChangedAnswers(len(won), num_lost, [], "an image cannot be read")
    previews = []
    for (phase, _), (sample, answer, picture) in zip(answers, drawn, strict=True):
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        alt = f"{sample.id}: images with the true box and the box of {phase}"
        previews.append(
            {"uri": data_uri(file.getvalue()), "alt": alt, "by": phase, "text": describe_preview(sample, answer)}
        )
    return ChangedAnswers(len(won), num_lost, previews, "")
