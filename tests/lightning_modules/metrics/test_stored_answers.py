"""The scores of stored answers are those that both earlier evaluation stacks gave them.

stored_answers/ was written by the code of commit 0ba6a13, which had a stack for MIG-Bench and another one for all seven
benchmarks. It holds 301 scripted answers to small nano replicas (right, near, wrong, unreadable, refused, cut short)
with the scores of that code, and its summaries in scores.json. MIG-Bench's answers are in thousandths, so that its
official reader finds boxes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.benchmarks.registry import BENCHMARKS
from datamodules.metrics.predictions import Prediction, Reply, answer_from_json
from datamodules.metrics.result_files import read_predictions, write_evaluation
from datamodules.metrics.scoring import rescore, score_reply
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import ImagePart, Sample, TextPart
from lightning_modules.metrics.summary import summarise

STORED = Path(__file__).with_name("stored_answers")
SCORES = json.loads((STORED / "scores.json").read_text())


def stored(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STORED / f"{name}.jsonl").read_text().splitlines()]


def predictions(name: str) -> list[Prediction]:
    """The stored answers, scored by the code as it is now."""
    module, box_format = BENCHMARKS[name], BoxFormat(SCORES[name]["box_format"])
    found = []
    for record in stored(name):
        given = record["reply"]
        extra = {"column": given["column"]} | ({"size": given["size"]} if "size" in given else {})
        parts = (ImagePart(0), TextPart("?"))
        answer = answer_from_json(given["answer"])
        sample = Sample(given["id"], name, given["unit"], ("a",), parts, answer, extra=extra)
        prediction = score_reply(sample, Reply.from_json(given), box_format, module.RULE, module.OFFICIAL)
        if "extracted" in given:
            extracted = replace(prediction, extracted=given["extracted"])
            prediction = rescore(extracted, module.RULE, module.OFFICIAL)
        found.append(prediction)
    return found


def summary(name: str, some: list[Prediction]) -> dict[str, Any]:
    module = BENCHMARKS[name]
    return summarise(some, module.RULE, module.OFFICIAL, module.AVERAGES)


def assert_same(new: Any, old: Any, where: str) -> None:
    """Equal, floats apart from their last bits: MIG-Bench's stack had 100 * 7 / 25 = 28.0 where the other one had
    100 * (7 / 25) = 28.000000000000004, so no number equals both. The first is the number now."""
    if isinstance(old, dict):
        for key in old:
            assert_same(new[key], old[key], f"{where}.{key}")
    elif isinstance(old, float):
        assert math.isclose(new, old, rel_tol=1e-15, abs_tol=1e-13), (where, new, old)
    else:
        assert new == old, (where, new, old)


@pytest.mark.parametrize("name", SCORES)
def test_every_answer_is_read_and_scored_as_before(name: str) -> None:
    records = stored(name)
    assert len(records) >= 28
    for prediction, record in zip(predictions(name), records, strict=True):
        now = json.loads(json.dumps(prediction.to_json()))
        assert {key: now[key] for key in record["scored"]} == record["scored"], prediction.id


@pytest.mark.parametrize("name", SCORES)
def test_the_numbers_of_every_benchmark_are_those_of_before(name: str) -> None:
    old, new = SCORES[name]["result"], summary(name, predictions(name))
    assert_same(json.loads(json.dumps(new)), old, name)
    assert new["n"] == len(stored(name)) and new["failures"] == old["failures"]
    for now, before in ((new, old), (new["official"], old["official"])):
        for kind in ("columns", "averages"):
            assert list(now[kind]) == list(before[kind]), "the same columns, in the table's order"
            for cell, old_cell in zip(now[kind].values(), before[kind].values(), strict=True):
                assert (cell["low"], cell["high"], cell["n"]) == (old_cell["low"], old_cell["high"], old_cell["n"])


def test_mig_bench_has_exactly_the_numbers_of_the_stack_of_its_own() -> None:
    """Apart from answers in a form that only other models use, which that stack did not read."""
    before = SCORES["mig_bench"]["own_stack"]
    found, records = predictions("mig_bench"), stored("mig_bench")
    otherwise = [record["reply"]["id"] for record in records if record["own_stack"].keys() - {"well_formed"}]
    assert otherwise == before["read_otherwise"] and len(otherwise) == 6
    for prediction, record in zip(found, records, strict=True):
        assert prediction.well_formed == record["own_stack"]["well_formed"]
        if prediction.id in otherwise:
            assert prediction.text.startswith(("(", "<box>")) and record["own_stack"]["failure"] == "no_json"

    old = before["summary_of_the_others"]
    new = summary("mig_bench", [p for p in found if p.id not in otherwise])
    for now, then in ((new, old), (new["official"], old["official"])):
        assert {task: cell["score"] for task, cell in now["columns"].items()} == then["tasks"]
        for name in ("avg", "in_domain", "out_of_domain"):
            assert now["averages"][name]["score"] == then[name]
        for name in ("acc_0.3", "acc_0.7", "mean_iou"):
            assert now["details"][name] == then[name]
    for name in ("format_rate", "truncated_rate", "mean_tokens", "n"):
        assert new[name] == old[name]
    assert new["failures"] == old["parse_failures"]


@pytest.mark.parametrize("name", SCORES)
def test_predictions_that_were_written_give_the_same_numbers_when_they_are_scored_again(name: str, tmp_path) -> None:
    module, found = BENCHMARKS[name], predictions(name)
    write_evaluation(tmp_path, found, summary(name, found))
    again = [rescore(p, module.RULE, module.OFFICIAL) for p in read_predictions(tmp_path / "predictions.jsonl")]
    assert again == found and summary(name, again) == summary(name, found)
