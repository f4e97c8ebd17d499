"""Asking one benchmark's questions: a fixed share for each process, a journal for each, and nothing asked twice.

    <folder>/rank0.jsonl, rank1.jsonl, …   {"id", "text", "image_sizes": [[w, h, resized w, resized h], …], …}

The folder is named by the key of what answers depend on, so it is also the cache: any later evaluation of the same
model, data and settings finds its answers there, whatever it was limited to and however many processes it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Benchmark, column_of
from datamodules.persistence.files import Journal, fingerprint, read_journal
from datamodules.predictors import UNANSWERED, Predictor, Reply, split_windows
from datamodules.samples.boxes import image_sizes_from_json, image_sizes_to_json
from datamodules.samples.sample import Sample

LOSSES = 8  # so many questions without an answer, and more than have one: it is no use to ask the rest


class QuestionsLost(RuntimeError):
    """More questions of a benchmark got no answer than got one: a score of that would say nothing of the model."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Answers of at most `max_new_tokens`, to `batch_prompts` questions at a time."""

    max_new_tokens: int = 1024
    batch_prompts: int = 32

    def __post_init__(self) -> None:
        require_positive("evaluation", max_new_tokens=self.max_new_tokens, batch_prompts=self.batch_prompts)


def require_positive(owner: str, **settings: int | None) -> None:
    """Raises ValueError that names every setting that is neither null nor greater than 0."""
    if wrong := [f"{name}={value}" for name, value in settings.items() if value is not None and not value > 0]:
        raise ValueError(f"{owner}: {', '.join(wrong)} must be greater than 0")


def answers_key(benchmark: Benchmark, predictor: Predictor) -> str:
    """Hash of the questions, their images (by name and size) and the predictor. Not of how many are asked."""
    return fingerprint([sample.to_json() for sample in benchmark.samples], benchmark.data, predictor.identity())


def read_answers(folder: Path, key: str) -> dict[str, Reply]:
    """Sample id -> reply, from the journals of all processes, also of earlier evaluations."""
    replies: dict[str, Reply] = {}
    for file in sorted(folder.glob("rank*.jsonl")):
        replies |= {record["id"]: _reply(record) for record in read_journal(file, key)}
    return replies


def ask_share(
    predictor: Predictor,
    samples: Sequence[Sample],
    benchmark: Benchmark,
    folder: Path,
    key: str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Ask this process's share of `samples` and journal the replies, window by window.

    Windows are cut from all samples in a fixed order, many images first (memory is tested at once, and the time left is
    not flattered). A window whose replies are all there is done; any other is asked whole, so that the questions which
    share a batch are always the same. Yields how many more replies are there, those found first.

    A question that was lost on the way (`UNANSWERED`) counts as wrong, and is asked again by the next call. Raises
    QuestionsLost as soon as it is most of them.
    """
    done = {name for name, reply in read_answers(folder, key).items() if reply.refused != UNANSWERED}
    ordered = sorted(samples, key=lambda sample: (-len(sample.images), column_of(sample), sample.task))
    mine = split_windows(ordered, predictor.window)[rank::world_size]
    waiting = [window for window in mine if not all(sample.id in done for sample in window)]
    yield sum(map(len, mine)) - sum(map(len, waiting))
    journal = Journal(folder / f"rank{rank}.jsonl", key)
    records: list[dict[str, Any]] = []
    answered, lost = len(done), 0
    for sample, reply in predictor.answers([sample for window in waiting for sample in window], benchmark.load):
        records.append(_record(sample, reply))
        lost += reply.refused == UNANSWERED
        answered += reply.refused != UNANSWERED
        if len(records) >= predictor.window:
            journal.append(records)
            yield len(records)
            records = []
        if lost >= LOSSES:
            _require_answers(benchmark, answered, lost)
    journal.append(records)
    yield len(records)
    _require_answers(benchmark, answered, lost)


def _require_answers(benchmark: Benchmark, answered: int, lost: int) -> None:
    if lost > answered:
        raise QuestionsLost(
            f"{benchmark.name}: {lost} questions got no answer in all attempts, and {answered} got one. The server "
            "answers others: endpoint.timeout may be too short. The same command asks again what is missing"
        )


def _record(sample: Sample, reply: Reply) -> dict[str, Any]:
    return {
        "id": sample.id,
        "text": reply.text,
        "image_sizes": image_sizes_to_json(reply.image_sizes),
        "num_tokens": reply.num_tokens,
        "finished": reply.finished,
        "refused": reply.refused,
    }


def _reply(record: Mapping[str, Any]) -> Reply:
    return Reply(
        text=record["text"],
        image_sizes=image_sizes_from_json(record["image_sizes"]),
        num_tokens=record["num_tokens"],
        finished=record["finished"],
        refused=record["refused"],
    )
