"""Ask the questions of one benchmark. Each process has a fixed share and a journal, and no question is asked twice.

    <home>/answers/<benchmark>-<key>/rank0.jsonl, rank1.jsonl, …
        {"id", "text", "image_sizes": [[w, h, resized w, resized h], …], "num_tokens", "finished", "refused"}

The name of the folder contains a hash of everything that answers depend on, so the folder is also a cache. A later
evaluation with the same model, data and settings finds the answers there, for any limit and any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Benchmark, column_of
from datamodules.metrics.predictions import Reply
from datamodules.persistence.files import Journal, fingerprint, read_journal
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import Sample
from lightning_modules.predictors.base import UNANSWERED, Predictor, split_chunks

MANY_LOST = 8  # number of questions without an answer; if fewer questions have an answer, asking the rest is useless


class QuestionsLost(UserError, RuntimeError):
    """More questions of a benchmark have no answer than have one, so a score would be meaningless."""


def questions_key(benchmark: Benchmark) -> str:
    """Hash of the questions and their images (by name and size)."""
    return fingerprint([sample.to_json() for sample in benchmark.samples], benchmark.data)


def answers_key(benchmark: Benchmark, predictor: Predictor) -> str:
    """Hash of the questions, their images (by name and size) and the predictor.

    It does not depend on the number of questions that are asked.
    """
    return fingerprint([sample.to_json() for sample in benchmark.samples], benchmark.data, predictor.identity())


def answers_folder(home: Path, name: str, key: str) -> Path:
    """The folder of the journals of a benchmark's answers with this key."""
    return home / "answers" / f"{name}-{key}"


def read_answers(folder: Path, key: str) -> dict[str, Reply]:
    """Sample id -> reply, from the journals of all processes, including earlier evaluations."""
    replies: dict[str, Reply] = {}
    for file in sorted(folder.glob("rank*.jsonl")):
        for record in read_journal(file, key):
            reply = Reply.from_json(record)
            # A question that one process has lost may be answered in the journal of another one.
            if reply.refused != UNANSWERED or record["id"] not in replies:
                replies[record["id"]] = reply
    return replies


def share_of(samples: Sequence[Sample], predictor: Predictor, rank: int, world_size: int) -> list[Sequence[Sample]]:
    """The chunks for this process: every `world_size`-th chunk, starting with number `rank`.

    The samples are sorted by number of images, most images first, and then cut into chunks. So similar lengths share a
    batch, a lack of memory appears at once, and the displayed time left is not too short.
    """
    ordered = sorted(samples, key=lambda sample: (-len(sample.images), column_of(sample), sample.task))
    return split_chunks(ordered, predictor.chunk_size)[rank::world_size]


def ask_share(
    predictor: Predictor,
    samples: Sequence[Sample],
    benchmark: Benchmark,
    folder: Path,
    key: str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Ask this process's share of `samples` and journal the replies, chunk by chunk.

    Yields the number of additional replies, first for the existing replies. A chunk with all replies is done. Any other
    chunk is asked completely, so that the same questions always share a batch. A lost question (`UNANSWERED`) counts as
    wrong, and the next call asks it again.

    Args:
        predictor: the model that answers.
        samples: the questions for all processes together, some or all of the benchmark.
        benchmark: loads their images.
        folder, key: folder and key of the journals (`answers_folder`, `answers_key`).
        rank, world_size: this process, and the number of processes.

    Raises QuestionsLost as soon as most questions were lost.
    """
    # 1. Find the chunks of this process that are not answered yet.
    done = {name for name, reply in read_answers(folder, key).items() if reply.refused != UNANSWERED}
    mine = share_of(samples, predictor, rank, world_size)
    waiting = [chunk for chunk in mine if not all(sample.id in done for sample in chunk)]
    yield sum(map(len, mine)) - sum(map(len, waiting))
    # 2. Ask them. The replies of a chunk are written together.
    journal = Journal(folder / f"rank{rank}.jsonl", key)
    records: list[dict[str, Any]] = []
    answered, lost = len(done), 0
    for sample, reply in predictor.answers([sample for chunk in waiting for sample in chunk], benchmark.load):
        records.append({"id": sample.id} | reply.to_json())
        lost += reply.refused == UNANSWERED
        answered += reply.refused != UNANSWERED
        if len(records) >= predictor.chunk_size:
            journal.append(records)
            yield len(records)
            records = []
        if lost >= MANY_LOST:
            _require_answers(benchmark, answered, lost)
    journal.append(records)
    yield len(records)
    _require_answers(benchmark, answered, lost)


def _require_answers(benchmark: Benchmark, answered: int, lost: int) -> None:
    if lost > answered:
        raise QuestionsLost(
            f"{benchmark.name}: {lost} questions got no answer in all attempts, and {answered} got one. The server "
            "answers others: endpoint.timeout may be too short. The same command asks the missing ones again"
        )
