"""Turn a teacher's responses into training samples: choose the questions, and one response as the rationale of each.

A question is kept if all its responses are correct: the IoU of each first box with the true box is above the threshold
(paper §3.2.1: all of four responses). Its rationale is the thinking of one well-formed response. That response is drawn
with a seed made of (seed, sample id), so the order in which responses arrived does not matter. The answer of the sample
stays the true box.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.persistence.files import write_atomic
from datamodules.persistence.message_text import markdown_table
from datamodules.samples.answer_text import ParsedAnswer, parse_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Sample, SampleError
from datamodules.samples.scores import score_text
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter


@dataclass(frozen=True)
class Verdict:
    """The decision about one question."""

    ious: tuple[float, ...]  # IoU of each response with the true box, 0-1
    num_correct: int
    chosen: int | None  # index of the response whose thinking is the rationale
    thinking: str | None
    # Why the question is not kept: "not_all_correct", "no_rationale" (no response is well-formed and has thinking), or
    # the rule that the sample breaks with this rationale. None if it is kept.
    dropped: str | None


def judge(
    sample: Sample,
    texts: Sequence[str],
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    threshold: float,
    seed: int,
) -> Verdict:
    """Decide whether a question is kept, and with which rationale.

    Args:
        sample: the question, with the true box.
        texts: the responses in the order of their numbers.
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: the format of the teacher's boxes.
        threshold: a response is correct if its IoU is above this.
        seed: seed of the choice among responses.
    """
    # 1. All responses must be correct.
    scores = [score_text(text, sample.answer, image_sizes, box_format) for text in texts]
    ious = tuple(score.iou for score in scores)
    num_correct = sum(iou > threshold for iou in ious)
    if num_correct < len(texts):
        return Verdict(ious, num_correct, None, None, "not_all_correct")
    # 2. Choose one of the well-formed responses that have thinking.
    thoughts = {k: _thinking(texts[k]) for k, score in enumerate(scores) if score.well_formed}
    candidates = [k for k, thinking in thoughts.items() if thinking]
    if not candidates:
        return Verdict(ious, num_correct, None, None, "no_rationale")
    chosen = random.Random(f"{seed}/{sample.id}").choice(candidates)
    # 3. The sample must be valid with this thinking; it may contain special tokens, for example.
    try:
        Sample.from_json(replace(sample, thinking=thoughts[chosen]).to_json())
    except SampleError as error:
        return Verdict(ious, num_correct, None, None, error.rule)
    return Verdict(ious, num_correct, chosen, thoughts[chosen], None)


def _thinking(text: str) -> str:
    """The thinking of a response, or ""."""
    parsed = parse_answer(text)
    return (parsed.thinking or "").strip() if isinstance(parsed, ParsedAnswer) else ""


def group_responses(records: Sequence[Mapping[str, Any]], count: int) -> dict[int, list[Mapping[str, Any]]]:
    """{number of the question: its responses in order} for the first `count` questions, without rejected ones."""
    rejected = {record["number"] for record in records if "rule" in record}  # records of rejections have a rule
    groups: defaultdict[int, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        if "rule" not in record and record["number"] < count and record["number"] not in rejected:
            groups[record["number"]].setdefault(record["response"], record)  # the first record of a response counts
    return {number: [groups[number][k] for k in sorted(groups[number])] for number in sorted(groups)}


def write_rationales(
    folder: Path, reader: ShardReader, verdicts: Mapping[int, Verdict], teacher: str
) -> dict[int, str]:
    """Write the kept samples with thinking to <folder>/shards, and all decisions to <folder>/outcomes.jsonl.

    Both are in the order of the questions. Each kept sample names its teacher and response in `extra.synthesis`.
    Returns {number: task} for all questions.

    Args:
        folder: the output folder.
        reader: the questions.
        verdicts: {number of the question: its decision}.
        teacher: name of the teacher.
    """
    shutil.rmtree(folder / "shards", ignore_errors=True)
    lines, tasks = [], {}
    with ShardWriter(folder / "shards") as writer:
        for number in sorted(verdicts):
            verdict, loaded = verdicts[number], reader.read(number)
            tasks[number], ious = loaded.sample.task, [round(iou, 4) for iou in verdict.ious]
            outcome = {"number": number, "id": loaded.sample.id, "task": loaded.sample.task}
            outcome |= {"correct": verdict.num_correct, "ious": ious, "chosen": verdict.chosen}
            lines.append(json.dumps(outcome | {"dropped": verdict.dropped}, ensure_ascii=False) + "\n")
            if verdict.dropped is None:
                origin = {"synthesis": {"teacher": teacher, "response": verdict.chosen, "ious": ious}}
                extra = dict(loaded.sample.extra) | origin
                sample = replace(loaded.sample, thinking=verdict.thinking, extra=extra)
                writer.add(replace(loaded, sample=sample))
    write_atomic(folder / "outcomes.jsonl", "".join(lines))
    return tasks


def summarise(
    verdicts: Mapping[int, Verdict],
    tasks: Mapping[int, str],
    records: Sequence[Mapping[str, Any]],
    count: int,
    num_responses: int,
) -> dict[str, Any]:
    """The counts of one synthesis: questions, kept, dropped and rejected by rule, tokens, and difficulty.

    Args:
        verdicts: {number of the question: its decision}.
        tasks: {number of the question: its task}.
        records: the records of the journal.
        count: number of questions.
        num_responses: number of responses to each question.
    """

    def histogram(numbers: Sequence[int]) -> list[int]:
        # Entry k is the number of questions with k correct responses.
        counts = Counter(verdicts[number].num_correct for number in numbers)
        return [counts[correct] for correct in range(num_responses + 1)]

    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for number in sorted(verdicts):
        by_task[tasks[number]].append(number)
    records = [record for record in records if record["number"] < count]
    answered = [record for record in records if "text" in record]
    return {
        "questions": count,
        "judged": len(verdicts),
        "kept": sum(verdict.dropped is None for verdict in verdicts.values()),
        "dropped": dict(Counter(verdict.dropped for verdict in verdicts.values() if verdict.dropped)),
        "rejected": dict(Counter(record["rule"] for record in records if "rule" in record)),
        "difficulty": histogram(sorted(verdicts)),
        "tasks": {task: histogram(numbers) for task, numbers in sorted(by_task.items())},
        "responses": len(answered),
        "cut_short": sum(record["finish"] == "length" for record in answered),
        "prompt_tokens": sum(record["prompt_tokens"] for record in answered),
        "completion_tokens": sum(record["completion_tokens"] for record in answered),
    }


def format_report(summary: Mapping[str, Any], title: str) -> str:
    """The summary, which also has `failed` and `cost`, as Markdown: counts, and the histogram of difficulty."""
    lines = [f"# {title}", ""]
    for name in ("questions", "judged", "kept", "responses", "cut_short", "prompt_tokens", "completion_tokens", "cost"):
        lines.append(f"- {name.replace('_', ' ')}: {summary[name]}")
    for name in ("dropped", "rejected"):
        counts = ", ".join(f"{rule} {number}" for rule, number in summary[name].items())
        lines.append(f"- {name}: {counts or 'none'}")
    lines.append(f"- without an answer: {len(summary['failed'])}")
    header = ["correct responses", *(str(number) for number in range(len(summary["difficulty"])))]
    # The histogram as a table by task, and as bars for all tasks together.
    lines += ["", "## Difficulty", "", "Number of questions by number of correct responses.", ""]
    tasks = {"all": summary["difficulty"], **summary["tasks"]}
    lines.append(markdown_table([header, *([name, *map(str, counts)] for name, counts in tasks.items())]))
    widest = max(summary["difficulty"], default=0) or 1
    bars = [f"{k} {'#' * round(40 * count / widest)} {count}" for k, count in enumerate(summary["difficulty"])]
    return "\n".join([*lines, "", "```", *bars, "```", ""])
