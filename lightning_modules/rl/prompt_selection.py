"""Select prompts that a policy solves sometimes, but neither always nor never: sample completions, count the correct
ones, and write the selected prompts as shards.

GRPO learns nothing from other prompts, because all completions of a group would get about the same reward.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.persistence.files import Journal, fingerprint, read_journal, read_json, write_atomic, write_json
from datamodules.persistence.problems import Problems
from datamodules.persistence.progress_lines import Counted
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.samples.scores import require_boxes, score_text
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import source_list
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.base import split_chunks
from lightning_modules.predictors.encode_ahead import encode_ahead
from lightning_modules.rollouts.base import RolloutEngine, RolloutRequest, SamplingSettings
from lightning_modules.training.endings import RunStopped
from lightning_modules.training.seeds import derive_seed

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class RejectionSettings:
    """Settings of rejection sampling (paper, section 3.3): which candidates are kept.

    Args:
        num_samples: number of completions of each candidate.
        min_correct, max_correct: a candidate is kept with this number of correct completions, both included. By default
            from one to all but one, as in the paper (null: num_samples - 1). If a box can be found by chance, a larger
            `min_correct` is useful.
        temperature, max_new_tokens: of sampling, the second in tokens; null takes those of the rollouts in training.
        prompts_per_batch: number of prompts sampled together. Another number draws other samples.
        threshold: the IoU, 0-1, above which a box is right.
        seed: of sampling.
        min_f1: with several boxes, a completion is correct if F1 at `threshold` is at least this, 0-1. By default all
            boxes are right, and no other is written.

    Raises:
        ValueError: a setting cannot work.
    """

    num_samples: int = 8
    min_correct: int = 1
    max_correct: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    prompts_per_batch: int = 32
    threshold: float = 0.5
    seed: int = 0
    min_f1: float = 1.0

    def __post_init__(self) -> None:
        problems, most = Problems(), self.num_samples
        problems.require(most >= 2, ": to be solved sometimes takes at least 2", num_samples=most)
        problems.positive_or_null(temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        problems.positive(prompts_per_batch=self.prompts_per_batch)
        problems.require(0 <= self.threshold < 1, "must be in [0, 1)", threshold=self.threshold)
        problems.require(0 < self.min_f1 <= 1, "must be in (0, 1]", min_f1=self.min_f1)
        in_range = 0 <= self.min_correct <= self.most_correct <= most
        correct = {"min_correct": self.min_correct, "max_correct": self.max_correct}
        problems.require(in_range, f"is no range within num_samples={most}", **correct)
        problems.raise_all("rejection sampling")

    @property
    def most_correct(self) -> int:
        return self.num_samples - 1 if self.max_correct is None else self.max_correct


def rejection_sample(
    policy: QwenVL,
    engine: RolloutEngine,
    encoder: Encoder,
    source: str | list[str],
    settings: RejectionSettings,
    folder: str | Path,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], Any] = lambda: None,
    reader: Callable[[], ShardReader] | None = None,
) -> Path:
    """Sample every candidate, write the kept ones as shards and return their folder.

    An interrupted call continues from its journals with exactly the same samples. A finished choice in `folder` for the
    same weights, candidates and settings is used again. An unusable candidate is skipped and counted by rule: an answer
    without a box, or in the one-box form with several; a damaged image. Every rank calls this function. The ranks wait
    for each other's files after sampling.

    Args:
        policy: the policy as loaded from its path; its files are hashed, not its weights in memory.
        engine: samples the completions.
        encoder: turns candidates into prompts.
        source: shard folders with the candidates.
        settings: number of completions, and the rule for kept candidates.
        folder: output folder for shards/, kept.jsonl, histogram.json and journal*.jsonl; all ranks must see it.
        rank, world_size: this process, and the number of processes.
        barrier: called before sampling; all ranks wait in it for each other.
        reader: reads the candidates; by default `ShardReader` of `source`.

    Raises RunStopped if no candidate is kept.
    """
    folder = Path(folder)
    key = rejection_key(policy.processor_path, encoder, source, settings)
    if not is_finished(folder, key):
        reader = reader() if reader is not None else ShardReader(source)
        # The seed of a chunk is its number, so the samples do not depend on ranks or interruptions.
        chunks = list(enumerate(split_chunks(range(reader.count), settings.prompts_per_batch)))
        journal = Journal(folder / f"journal-{rank}.jsonl", key)
        done = _read_chunks(folder, key)  # finished chunks of all ranks, including earlier runs
        barrier()  # no rank samples before all ranks have read, so that all ranks divide the same list
        mine = [chunk for chunk in chunks if chunk[0] not in done][rank::world_size]
        _sample_chunks(policy, engine, encoder, reader, mine, settings, journal, show_progress=rank == 0)
        if rank == 0:
            _wait_until(lambda: len(_read_chunks(folder, key)) == len(chunks))
            _write_kept(folder, reader, _read_chunks(folder, key), settings, key)
        else:
            _wait_until(lambda: is_finished(folder, key))
    histogram = read_json(folder / "histogram.json")
    if histogram["kept"] == 0:
        raise RunStopped(_explain_nothing_kept(histogram, settings))
    return folder / "shards"


def _explain_nothing_kept(histogram: Mapping[str, Any], settings: RejectionSettings) -> str:
    least, most, num_samples = settings.min_correct, settings.most_correct, settings.num_samples
    rejected = ", ".join(f"{rule} {count}" for rule, count in histogram["rejected"].items())
    if not histogram["candidates"]:
        return f"rejection sampling: no candidate can be used; rejected: {rejected or 'none, there is none'}"
    counts = ", ".join(f"{correct} right {count}" for correct, count in enumerate(histogram["num_correct"]) if count)
    never, cure = histogram["num_correct"][0], "take harder candidates"
    if 2 * never >= histogram["candidates"]:
        cure = "start from a better model (CoT-SFT), take easier candidates, or lower threshold"
    return (
        f"rejection sampling kept none of {histogram['candidates']} candidates: none has {least} to {most} right of "
        f"{num_samples} completions (IoU above threshold={settings.threshold})\n"
        f"counted: {counts}; rejected: {rejected or 'none'}\n"
        f"GRPO cannot learn from such prompts: {cure}"
    )


def rejection_key(model: str, encoder: Encoder, source: str | list[str], settings: RejectionSettings) -> str:
    """Hash of everything that the choice depends on: weights, candidates, prompts and settings."""
    candidates = [path_fingerprint(path) for path in source_list(source)]
    facts = asdict(settings)
    if settings.min_f1 == 1.0:  # choices of earlier versions, which had no such setting, stay valid
        del facts["min_f1"]
    return fingerprint(path_fingerprint(model), candidates, encoder.form(), facts)


def is_finished(folder: str | Path, key: str) -> bool:
    return read_json(Path(folder) / "histogram.json").get("key") == key


def _read_chunks(folder: Path, key: str) -> dict[int, dict[str, Any]]:
    records = [record for path in sorted(folder.glob("journal-*.jsonl")) for record in read_journal(path, key)]
    return {record["window"]: record for record in records}  # the name of the field in existing journals


def _wait_until(is_so: Callable[[], bool]) -> None:
    """Wait by polling, because a collective operation has a timeout of half an hour, and another rank may sample or
    write for longer. `RankWatch` checks that the other ranks are alive.
    """
    while not is_so():
        time.sleep(POLL_SECONDS)


def _sample_chunks(
    policy: QwenVL,
    engine: RolloutEngine,
    encoder: Encoder,
    reader: ShardReader,
    chunks: list[tuple[int, range]],
    settings: RejectionSettings,
    journal: Journal,
    show_progress: bool,
) -> None:
    """Append one record per chunk to `journal`: {"window": its number, "outcomes": [...], "rejected": {id: rule}}."""
    sampling = SamplingSettings(
        settings.num_samples, settings.temperature, settings.max_new_tokens, settings.prompts_per_batch
    )

    def read(number: int) -> LoadedSample:
        loaded = reader.read(number)
        require_boxes(loaded.sample, encoder.answer_form)
        return loaded

    rejections = Rejections()  # rejections of this call; `_write_kept` counts those of all calls and ranks
    # A thread encodes the next chunk while the engine samples this one.
    encoded = encode_ahead(encoder, [numbers for _, numbers in chunks], read)
    total = sum(len(numbers) for _, numbers in chunks)
    with Counted(total, "rejection sampling", "prompt", is_shown=show_progress) as progress:
        for (number, _), members in zip(chunks, encoded, strict=True):
            errors = [error for _, error in members if isinstance(error, SampleError)]
            for error in errors:
                rejections.add(error)
            if rejections.report_is_due():  # reported now, not after hours of sampling
                log.warning("rejection sampling so far: %s", rejections.summary())
            known = [(place, item) for place, item in members if isinstance(item, EncodedSample)]
            # Seeded with the chunk's number, so a resumed call draws the same samples as an uninterrupted call.
            generator = torch.Generator(policy.device).manual_seed(derive_seed(settings.seed, number))
            items = [item.to(policy.device) for _, item in known]
            groups = engine.generate(RolloutRequest(items, sampling, generator=generator))
            outcomes = [
                _outcome(place, item, [rollout.text for rollout in group], encoder, settings)
                for (place, item), group in zip(known, groups, strict=True)
            ]
            rejected = {error.sample_id: error.rule for error in errors}
            journal.append([{"window": number, "outcomes": outcomes, "rejected": rejected}])
            progress.update(len(members))


def _outcome(
    number: int, item: EncodedSample, texts: list[str], encoder: Encoder, settings: RejectionSettings
) -> dict[str, Any]:
    how = (item.sample.answer, item.image_sizes, encoder.box_format)
    scores = [score_text(text, *how, form=encoder.answer_form) for text in texts]
    correct = sum(score.is_right(settings.threshold, settings.min_f1) for score in scores)
    fields = {"number": number, "id": item.sample.id, "task": item.sample.task}
    return fields | {
        "correct": correct,
        "samples": len(scores),
        "mean_iou": sum(score.iou for score in scores) / len(scores),
    }


def _write_kept(
    folder: Path, reader: ShardReader, chunks: dict[int, dict[str, Any]], settings: RejectionSettings, key: str
) -> None:
    """Write shards/ and kept.jsonl in the order of the source, and then histogram.json, which marks completion."""
    # 1. Kept candidates: those that are solved sometimes, so that rewards differ and advantages are not all 0.
    outcomes = [outcome for number in sorted(chunks) for outcome in chunks[number]["outcomes"]]
    rejected = Counter(rule for chunk in chunks.values() for rule in chunk["rejected"].values())
    kept = [outcome for outcome in outcomes if settings.min_correct <= outcome["correct"] <= settings.most_correct]
    (folder / "histogram.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "shards", ignore_errors=True)
    # 2. Their samples, in the order of the source.
    with ShardWriter(folder / "shards") as writer:
        for outcome in list(kept):
            try:
                writer.add(reader.read(outcome["number"]))
            except SampleError as error:  # its shard was readable when it was sampled
                rejected[error.rule] += 1
                kept.remove(outcome)
    if rejected:
        log.warning("%d candidates cannot be used: %s", rejected.total(), dict(rejected))
    write_atomic(folder / "kept.jsonl", "".join(json.dumps(outcome) + "\n" for outcome in kept))
    # 3. Counts by task and by number of correct completions; the key marks the folder as finished.
    histogram = {
        "key": key,
        "candidates": len(outcomes),
        "kept": len(kept),
        "rejected": dict(rejected),
        "num_correct": _count_correct(outcomes, settings.num_samples),
        "tasks": {
            task: _count_correct([outcome for outcome in outcomes if outcome["task"] == task], settings.num_samples)
            for task in sorted({outcome["task"] for outcome in outcomes})
        },
        "settings": asdict(settings),
    }
    write_json(folder / "histogram.json", histogram)


def _count_correct(outcomes: list[dict[str, Any]], num_samples: int) -> list[int]:
    """Numbers of candidates with 0, 1, …, `num_samples` correct completions."""
    counts = Counter(outcome["correct"] for outcome in outcomes)
    return [counts[number] for number in range(num_samples + 1)]
