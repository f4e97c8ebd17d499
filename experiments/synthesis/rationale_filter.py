"""From a teacher's responses to training samples: which questions are kept, and which response becomes the rationale.

A question is kept when every response's first box has an IoU above the threshold with the true box (the paper, §3.2.1:
accuracy 1 of four responses). Its rationale is the thinking of one of its well-formed responses that hold thinking,
drawn by a generator seeded with (seed, sample id): the order in which answers came has no say in it. The true box stays
the answer.
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
from datamodules.samples.answer_text import ParsedAnswer, parse_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Sample, SampleError
from datamodules.samples.scores import score_text
from datamodules.streaming.shards import ShardReader, ShardWriter


@dataclass(frozen=True)
class Verdict:
    """What became of one question. `dropped` says why it is not kept: "not_all_correct", "no_rationale" (no response is
    well formed with thinking), or the rule that the sample breaks with this rationale."""

    ious: tuple[float, ...]  # of each response, 0-1
    num_correct: int
    chosen: int | None  # the response whose thinking is the rationale
    thinking: str | None
    dropped: str | None


def judge(
    sample: Sample,
    texts: Sequence[str],
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    threshold: float,
    seed: int,
) -> Verdict:
    """`texts` are the responses in the order of their numbers; `image_sizes` one for each image of the sample."""
    scores = [score_text(text, sample.answer, image_sizes, box_format) for text in texts]
    ious = tuple(score.iou for score in scores)
    num_correct = sum(iou > threshold for iou in ious)
    if num_correct < len(texts):
        return Verdict(ious, num_correct, None, None, "not_all_correct")
    thoughts = {k: _thinking(texts[k]) for k, score in enumerate(scores) if score.well_formed}
    candidates = [k for k, thinking in thoughts.items() if thinking]
    if not candidates:
        return Verdict(ious, num_correct, None, None, "no_rationale")
    chosen = random.Random(f"{seed}/{sample.id}").choice(candidates)
    try:
        Sample.from_json(replace(sample, thinking=thoughts[chosen]).to_json())
    except SampleError as error:
        return Verdict(ious, num_correct, None, None, error.rule)
    return Verdict(ious, num_correct, chosen, thoughts[chosen], None)


def _thinking(text: str) -> str:
    parsed = parse_answer(text)
    return (parsed.thinking or "").strip() if isinstance(parsed, ParsedAnswer) else ""


def group_responses(records: Sequence[Mapping[str, Any]], count: int) -> dict[int, list[Mapping[str, Any]]]:
    """{number: its responses in the order of their numbers} of the first `count` questions, without the rejected."""
    rejected = {record["number"] for record in records if "rule" in record}
    groups: defaultdict[int, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        if "rule" not in record and record["number"] < count and record["number"] not in rejected:
            groups[record["number"]].setdefault(record["response"], record)
    return {number: [groups[number][k] for k in sorted(groups[number])] for number in sorted(groups)}


def write_rationales(
    folder: Path, reader: ShardReader, verdicts: Mapping[int, Verdict], teacher: str, max_samples: int = 1000
) -> dict[int, str]:
    """Write <folder>/shards, the kept samples with thinking, and <folder>/outcomes.jsonl, in the order of the source.

    Each kept sample says in `extra.synthesis` which teacher and response its thinking is from. Returns each question's
    task.
    """
    shutil.rmtree(folder / "shards", ignore_errors=True)
    lines, tasks = [], {}
    with ShardWriter(folder / "shards", max_samples) as writer:
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
    """Counts of one synthesis: questions, kept, dropped and rejected by rule, tokens, and the histogram of difficulty:
    how many questions had 0, 1, … `num_responses` correct responses, in all and by task."""

    def histogram(numbers: Sequence[int]) -> list[int]:
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
    """The summary, with `failed` and `cost`, as Markdown: totals, and the histogram of difficulty."""
    lines = [f"# {title}", ""]
    for name in ("questions", "judged", "kept", "responses", "cut_short", "prompt_tokens", "completion_tokens", "cost"):
        lines.append(f"- {name.replace('_', ' ')}: {summary[name]}")
    for name in ("dropped", "rejected"):
        counts = ", ".join(f"{rule} {number}" for rule, number in summary[name].items())
        lines.append(f"- {name}: {counts or 'none'}")
    lines.append(f"- without an answer: {len(summary['failed'])}")
    header = ["correct responses", *(str(number) for number in range(len(summary["difficulty"])))]
    lines += ["", "## Difficulty", "", "How many questions had so many correct responses.", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, counts in {"all": summary["difficulty"], **summary["tasks"]}.items():
        lines.append("| " + " | ".join([name, *(str(count) for count in counts)]) + " |")
    widest = max(summary["difficulty"], default=0) or 1
    bars = [f"{k} {'#' * round(40 * count / widest)} {count}" for k, count in enumerate(summary["difficulty"])]
    return "\n".join([*lines, "", "```", *bars, "```", ""])
