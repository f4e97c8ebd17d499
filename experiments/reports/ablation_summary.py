"""The results of an ablation's rows at each seed, and their differences: the content of ablations.json.

The numbers come from the results.json of each seed, which lists only finished rows. The answers for the paired
bootstrap come from the predictions.jsonl of the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.metrics.result_files import PREDICTIONS, RESULT, read_predictions, same_questions
from datamodules.persistence.files import read_json
from experiments.reports.significance import TRANSFER, holm, paired_differences
from experiments.runs.results import Stage, find_mig_bench, read_results
from experiments.runs.run_identity import trained_commit

FIGURES = ("avg", "in_domain", "out_of_domain", "format_rate")
FINDING_FIGURES = ("avg", "in_domain", "out_of_domain", TRANSFER)


@dataclass(frozen=True)
class Comparison:
    """A comparison: `row` minus `over`.

    Args:
        row: name of a row.
        over: name of the row that it is compared with.
        at_least: the aim: the smallest difference of AVG in points.
        more_than: the aim: the difference of AVG is larger than this number of points.
        or_both_at_most: the aim is also reached if the AVG of both rows is at most this.
        examples: number of questions that the page draws, whose answer became right.
    """

    row: str
    over: str
    at_least: float | None = None
    more_than: float | None = None
    or_both_at_most: float | None = None
    examples: int = 0

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
        """Whether a difference in points reaches the aim, without `or_both_at_most`."""
        difference = round(difference, 6)  # a mean of accuracies has rounding errors in its last bits
        limits = [difference >= self.at_least] if self.at_least is not None else []
        limits += [difference > self.more_than] if self.more_than is not None else []
        return bool(limits) and all(limits)


@dataclass(frozen=True)
class Finding:
    """A finding of the paper: `row` is better than `over` in `figure`, by more than `more_than` points.

    Args:
        text: the finding in words.
        row: name of a row.
        over: name of the row that it is compared with.
        figure: avg, in_domain, out_of_domain, or "out_of_domain - in_domain": the difference of the two gains.
        more_than: points.
        paper: the paper's difference in points, if it reports one.
    """

    text: str
    row: str
    over: str
    figure: str = "avg"
    more_than: float = 0.0
    paper: float | None = None

    def verdict(self, difference: Mapping[str, float] | None) -> str:
        """ "shown", "opposite", "not shown" or "not measured", by the 95 % interval of the difference."""
        if difference is None:
            return "not measured"
        if difference["low"] > self.more_than:
            return "shown"
        return "opposite" if difference["high"] < self.more_than else "not shown"


@dataclass(frozen=True)
class SeedRow:
    """One row at one seed: its stage, the correctness of each answer by task (None if unknown), the image set of each
    question, the commit of its training (None for a model that was not trained here), and the result.json, which tells
    which questions were asked ({} if it is not there).
    """

    stage: Stage
    hits: Mapping[str, Mapping[str, bool]] | None
    image_sets: Mapping[str, str]  # question -> its image set
    commit: str | None
    asked: Mapping[str, Any] = field(default_factory=dict)


Found = dict[str, dict[int, SeedRow]]  # row -> seed -> its results


def read_rows(folders: Mapping[int, Path], names: Iterable[str]) -> Found:
    """Read the results of the rows `names`, in this order. `folders` maps each seed to its experiment folder."""
    found: Found = {name: {} for name in names}
    for seed, folder in folders.items():
        for stage in read_results(folder / "results.json").stages if (folder / "results.json").is_file() else ():
            if stage.name in found:
                phase = folder / stage.name
                found[stage.name][seed] = SeedRow(stage, *row_hits(phase, stage), trained_commit(phase), _asked(phase))
    return found


def _asked(phase: Path) -> dict[str, Any]:
    folder = find_mig_bench(phase)
    return {} if folder is None else read_json(folder / RESULT)


def row_hits(phase: Path, stage: Stage) -> tuple[Mapping[str, Mapping[str, bool]] | None, Mapping[str, str]]:
    """(task -> question -> whether the answer is right, question -> its image set), from the phase's predictions.

    The first is None if they do not match the stage's results.
    """
    hits: dict[str, dict[str, bool]] = {}
    image_sets: dict[str, str] = {}
    folder = find_mig_bench(phase)
    there = folder is not None and (folder / PREDICTIONS).is_file()
    for prediction in read_predictions(folder / PREDICTIONS) if there else ():
        hits.setdefault(prediction.column, {})[prediction.id] = prediction.correct
        image_sets[prediction.id] = prediction.image_set or prediction.id
    # The predictions may come from a later evaluation. They are used only if they give the percentages in results.json.
    shares = {task: 100 * statistics.mean(right.values()) for task, right in hits.items()}
    same = shares.keys() == stage.mig_bench["tasks"].keys() and all(
        abs(share - stage.mig_bench["tasks"][task]) < 1e-6 for task, share in shares.items()
    )
    return (hits if same else None), image_sets


def summarise(
    found: Found,
    starts: Mapping[str, str],
    comparisons: Sequence[Comparison],
    seeds: Sequence[int],
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """The content of ablations.json: {"seeds", "rows": [row], "comparisons": [comparison], "findings": [finding]}.

    A row is {"name", "start", "seeds": {seed: {figure: value, "tasks", "n", "minutes", "commit"}}, "mean", "std",
    "low", "high"}, the last four for each figure. std is null with one seed. commit is that of the training; it is null
    for a model that was not trained here. A comparison is {"row", "over", "aim", "seeds", "differences": {average:
    {"value", "low", "high", "p", "p_holm"}}, "by_seed": {seed: AVG's}, "reached", "sure", "missing"}; reached is null
    without an aim or a number, and `missing` is the reason why differences have no interval. p_holm is p corrected for
    the number of comparisons of the same average. A finding is {"text", "row", "over", "figure", "more_than", "paper",
    "difference", "verdict"}.
    """
    records = [_compare(comparison, found) for comparison in comparisons]
    for average in dict.fromkeys(name for record in records for name in record["differences"]):
        differences = [record["differences"][average] for record in records if average in record["differences"]]
        for difference, corrected in zip(differences, holm([d["p"] for d in differences]), strict=True):
            difference["p_holm"] = corrected
    return {
        "seeds": list(seeds),
        "rows": [_row(name, starts[name], by_seed) for name, by_seed in found.items()],
        "comparisons": records,
        "findings": [_judge(finding, records) for finding in findings],
    }


def _row(name: str, start: str, by_seed: Mapping[int, SeedRow]) -> dict[str, Any]:
    seeds = {}
    for seed, row in sorted(by_seed.items()):
        bench = row.stage.mig_bench
        seeds[str(seed)] = {key: bench[key] for key in (*FIGURES, "tasks", "n")}
        seeds[str(seed)] |= {"minutes": row.stage.seconds / 60, "commit": row.commit}
    # A number may be missing at a seed if no task of that average was measured. Then the mean is over the other seeds.
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
    # 1. Differences of AVG in points for each seed that both rows have.
    seeds = sorted(row.keys() & over.keys())
    by_seed = {s: row[s].stage.mig_bench["avg"] - over[s].stage.mig_bench["avg"] for s in seeds}
    record: dict[str, Any] = {"row": comparison.row, "over": comparison.over, "aim": comparison.aim, "seeds": seeds}
    record |= {"by_seed": {str(s): value for s, value in by_seed.items()}, "differences": {}, "missing": ""}
    record |= {"reached": None, "sure": None}
    if not seeds:
        return record | {"missing": "no seed has both rows"}
    # 2. Intervals from pairs of answers. Both rows must have the same questions.
    sides = [[side[s].hits for s in seeds] for side in (row, over)]
    if any(hits is None for side in sides for hits in side):
        record["missing"] = "the single answers are not there, or not those of the figures"
    elif len({_questions(hits) for side in sides for hits in side}) > 1 or not _same(row, over, seeds):
        return record | {"missing": "the rows were asked different questions"}  # no aim is judged by them either
    elif len(seeds) == 1 and min(map(len, map(set, _clusters(row[seeds[0]]).values()))) < 2:
        # Every resample of one question is the question itself: the interval would have no width.
        record["missing"] = "a task has too few questions for an interval with one seed"
    else:
        clusters = _clusters(row[seeds[0]])
        differences = paired_differences(*(_stack(side) for side in sides), clusters)
        record["differences"] = {name: asdict(difference) for name, difference in differences.items()}
    # 3. The aim: `reached` if the mean difference reaches it, `sure` if the lower end of the interval reaches it too.
    if comparison.aim:
        low_enough = comparison.or_both_at_most is not None and all(
            statistics.mean(side[s].stage.mig_bench["avg"] for s in seeds) <= comparison.or_both_at_most
            for side in (row, over)
        )
        by_difference = comparison.holds(statistics.mean(by_seed.values()))
        record["reached"] = low_enough or by_difference
        if "avg" in record["differences"] and (by_difference or not low_enough):
            record["sure"] = comparison.holds(record["differences"]["avg"]["low"])
    return record


def _judge(finding: Finding, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a finding, from the comparison of the same two rows."""
    compared = next(record for record in records if (record["row"], record["over"]) == (finding.row, finding.over))
    difference = compared["differences"].get(finding.figure)
    return asdict(finding) | {"difference": difference, "verdict": finding.verdict(difference)}


def _same(row: Mapping[int, SeedRow], over: Mapping[int, SeedRow], seeds: Sequence[int]) -> bool:
    """Whether both rows were asked the same questions at all seeds. Ids alone do not tell: they are positions."""
    first, *others = [side[seed].asked for side in (row, over) for seed in seeds]
    return all(same_questions(first, asked) for asked in others)


def _questions(hits: Mapping[str, Mapping[str, bool]]) -> tuple:
    return tuple((task, *sorted(right)) for task, right in sorted(hits.items()))


def _stack(seeds: Sequence[Mapping[str, Mapping[str, bool]]]) -> dict[str, np.ndarray]:
    """task -> bool [seeds, questions], questions in the order of their ids."""
    return {task: np.array([[right for _, right in sorted(hits[task].items())] for hits in seeds]) for task in seeds[0]}


def _clusters(row: SeedRow) -> dict[str, np.ndarray]:
    """task -> the number of each question's image set, questions in the order of `_stack`."""
    return {
        task: np.unique([row.image_sets[name] for name in sorted(right)], return_inverse=True)[1]
        for task, right in row.hits.items()
    }
