"""Asking a benchmark's questions: each once, whatever the number of processes and kills; and the native predictor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.benchmarks.base import Benchmark, limit_columns
from datamodules.benchmarks.registry import load_benchmark
from datamodules.encoding.encoder import Encoder
from datamodules.metrics.predictions import Reply
from datamodules.persistence.files import Journal
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Sample
from datamodules.synthetic.benchmark_replicas.write import write_replica
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.ask import (
    MANY_LOST,
    QuestionsLost,
    answers_key,
    ask_share,
    questions_key,
    read_answers,
)
from lightning_modules.predictors.base import UNANSWERED, Decoding, Predictor
from lightning_modules.predictors.policy import PolicyPredictor, policy_fingerprint
from lightning_modules.rollouts.native.engine import NativeEngine
from tests.callbacks.conftest import FakePolicy

SIZES = ImageSizes((64, 48), (56, 56))


class Scripted:
    """Answers with what depends on the batch: its text names all questions of its chunk. Dies after `dies_after`;
    gives no answer to those in `lost`."""

    box_format = BoxFormat.NORMALIZED

    def __init__(
        self, chunk_size: int = 3, dies_after: int | None = None, name: str = "scripted", lost: Sequence[str] = ()
    ) -> None:
        self.chunk_size, self.dies_after, self.name, self.lost = chunk_size, dies_after, name, lost
        self.asked: list[str] = []

    def identity(self) -> dict[str, str]:
        return {"name": self.name}

    def answers(self, samples, load) -> Iterator[tuple[Sample, Reply]]:
        for start in range(0, len(samples), self.chunk_size):
            chunk = samples[start : start + self.chunk_size]
            text = ",".join(sample.id for sample in chunk)
            for sample in reversed(chunk):  # any order will do
                if self.dies_after is not None and len(self.asked) >= self.dies_after:
                    raise KeyboardInterrupt
                self.asked.append(sample.id)
                load(sample)
                if sample.id in self.lost:
                    yield sample, Reply("", (), refused=UNANSWERED)
                    continue
                yield sample, Reply(text, (SIZES,) * len(sample.images), num_tokens=1)


@pytest.fixture
def bench(tmp_path: Path) -> Benchmark:
    write_replica("blink", tmp_path, count=2)  # 14 questions: four chunks of three and one of two
    return load_benchmark("blink", tmp_path)


def ask(
    predictor: Predictor, bench: Benchmark, folder: Path, rank: int = 0, world: int = 1, limit: int | None = None
) -> int:
    key = answers_key(bench, predictor)
    return sum(ask_share(predictor, limit_columns(bench.samples, limit), bench, folder, key, rank, world))


def texts(predictor: Predictor, bench: Benchmark, folder: Path) -> dict[str, Reply]:
    return read_answers(folder, answers_key(bench, predictor))


def test_two_processes_ask_each_question_once_and_get_the_answers_of_one(bench, tmp_path: Path) -> None:
    one, first, second = Scripted(), Scripted(), Scripted()
    assert ask(one, bench, tmp_path / "one") == 14
    assert ask(first, bench, tmp_path / "two", 0, 2) + ask(second, bench, tmp_path / "two", 1, 2) == 14
    assert sorted(first.asked + second.asked) == sorted(one.asked) == sorted(s.id for s in bench.samples)
    assert len(first.asked) == 8 and len(second.asked) == 6
    assert texts(one, bench, tmp_path / "one") == texts(one, bench, tmp_path / "two")


def test_a_killed_evaluation_asks_the_broken_chunk_again_and_no_other(bench, tmp_path: Path) -> None:
    whole = Scripted()
    ask(whole, bench, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ask(Scripted(dies_after=7), bench, tmp_path / "killed")
    again = Scripted()
    assert ask(again, bench, tmp_path / "killed", 0, 2) + ask(again, bench, tmp_path / "killed", 1, 2) == 14
    assert len(again.asked) == 8  # the third chunk had come in part
    assert texts(whole, bench, tmp_path / "killed") == texts(whole, bench, tmp_path / "whole")


def test_answers_are_found_again_by_model_data_and_settings(bench, tmp_path: Path) -> None:
    ask(Scripted(), bench, tmp_path / "a")
    cached = Scripted()
    assert ask(cached, bench, tmp_path / "a") == 14 and cached.asked == []
    assert answers_key(bench, Scripted(name="other")) != answers_key(bench, Scripted())
    write_replica("blink", tmp_path, count=3)
    assert answers_key(load_benchmark("blink", tmp_path), Scripted()) != answers_key(bench, Scripted())


def test_the_key_sees_a_changed_image(tmp_path: Path) -> None:
    write_replica("lisa", tmp_path, count=1)
    before = answers_key(load_benchmark("lisa", tmp_path), Scripted())
    image = tmp_path / "ReasonSeg/val/00000.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert answers_key(load_benchmark("lisa", tmp_path), Scripted()) != before


def test_the_key_of_the_questions_sees_an_image_and_an_answer_and_no_model(tmp_path: Path) -> None:
    write_replica("lisa", tmp_path, count=2)
    bench = load_benchmark("lisa", tmp_path)
    before = questions_key(bench)
    assert questions_key(load_benchmark("lisa", tmp_path)) == before
    first, *others = bench.samples
    moved = replace(first, answer=replace(first.answer, box=(0.0, 0.0, 0.5, 0.25)))
    assert questions_key(replace(bench, samples=(moved, *others))) != before
    image = tmp_path / "ReasonSeg/val/00000.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert questions_key(load_benchmark("lisa", tmp_path)) != before


def test_a_limited_look_leaves_answers_that_the_whole_evaluation_keeps_apart(bench, tmp_path: Path) -> None:
    single = Scripted(chunk_size=1)
    assert ask(single, bench, tmp_path / "a", limit=1) == 7
    rest = Scripted(chunk_size=1)
    ask(rest, bench, tmp_path / "a")
    assert len(rest.asked) == 7 and set(rest.asked).isdisjoint(single.asked)


def test_a_lost_question_is_asked_again_by_the_next_evaluation_and_by_no_other(bench, tmp_path: Path) -> None:
    lost = bench.samples[3].id
    for _ in range(2):  # the second time it is the only one, and the others' answers say that the server is well
        assert ask(Scripted(chunk_size=1, lost=[lost]), bench, tmp_path / "a") == 14
        assert {i: r.refused for i, r in texts(Scripted(), bench, tmp_path / "a").items() if r.refused} == {
            lost: UNANSWERED
        }
    again = Scripted(chunk_size=1)
    assert ask(again, bench, tmp_path / "a") == 14 and again.asked == [lost]
    whole = Scripted(chunk_size=1)
    ask(whole, bench, tmp_path / "b")
    assert texts(again, bench, tmp_path / "a") == texts(whole, bench, tmp_path / "b")


@pytest.mark.parametrize(("limit", "num_asked"), [(None, MANY_LOST), (1, 7)])
def test_an_evaluation_that_loses_most_questions_ends_with_an_error(bench, tmp_path, limit, num_asked) -> None:
    lost = Scripted(chunk_size=1, lost=[sample.id for sample in bench.samples])
    with pytest.raises(QuestionsLost, match=f"blink: {num_asked} questions got no answer.*and 0 got one"):
        ask(lost, bench, tmp_path / "a", limit=limit)
    assert len(lost.asked) == num_asked
    assert ask(Scripted(chunk_size=1), bench, tmp_path / "a") == 14


def native(model_dir: Path, generation: str = "greedy", **limits) -> PolicyPredictor:
    decoding = Decoding(max_new_tokens=4, prompts_per_batch=2, generation=generation)
    encoder = Encoder(str(model_dir), "absolute_pixels", "think", 4096, 4, with_target=False, **limits)
    policy = QwenVL(str(model_dir)).eval()
    return PolicyPredictor(policy, NativeEngine(policy), encoder, decoding, batches_per_chunk=2)


def test_the_policy_predictor_gives_the_same_answers_in_two_shares(tiny_model_dir: Path, bench, tmp_path: Path) -> None:
    predictor = native(tiny_model_dir)
    ask(predictor, bench, tmp_path / "one")
    for rank in range(2):
        ask(predictor, bench, tmp_path / "two", rank, 2)
    one = texts(predictor, bench, tmp_path / "one")
    assert one == texts(predictor, bench, tmp_path / "two")
    assert len(one) == 14 and all(reply.num_tokens and reply.refused is None for reply in one.values())
    sample = bench.samples[0]
    assert len(one[sample.id].image_sizes) == len(sample.images)


def test_a_question_that_is_too_long_is_refused_by_its_rule(tiny_model_dir: Path, bench, tmp_path: Path) -> None:
    predictor = native(tiny_model_dir)
    predictor.encoder.max_prompt_tokens = 150
    ask(predictor, bench, tmp_path / "a")
    refused = {reply.refused for reply in texts(predictor, bench, tmp_path / "a").values()}
    assert "prompt_too_long" in refused
    lines = [json.loads(line) for line in (tmp_path / "a/rank0.jsonl").read_text().splitlines()]
    assert all(line["image_sizes"] == [] for line in lines if line["refused"])


def test_identity_tells_settings_and_weights_apart(tiny_model_dir: Path) -> None:
    first, other = native(tiny_model_dir), native(tiny_model_dir, label_images=True)
    assert first.identity() == native(tiny_model_dir).identity() != other.identity()
    assert "processor" not in first.identity()["form"]
    assert first.chunk_size == 4 and native(tiny_model_dir, "model").chunk_size == 1
    assert first.identity() != native(tiny_model_dir, "model").identity()
    wider = PolicyPredictor(first.policy, first.engine, first.encoder, first.decoding)
    assert wider.identity() != first.identity(), "answers depend a little on the questions that are asked with them"


def test_the_policys_hash_follows_what_is_trained() -> None:
    policy = FakePolicy("owner/name").to(torch.bfloat16)
    before = policy_fingerprint(policy)
    assert policy_fingerprint(policy) == before
    with torch.no_grad():
        policy.model.weight[0, 0] += 1
    assert policy_fingerprint(policy) != before


def test_an_answer_counts_more_than_that_another_process_got_none(tmp_path: Path) -> None:
    lost, found = Reply("", (), 0, refused=UNANSWERED), Reply("here", (SIZES,), 3)
    for rank, reply in enumerate((found, lost)):
        Journal(tmp_path / f"rank{rank}.jsonl", "key").append([{"id": "q", **reply.to_json()}])
    assert read_answers(tmp_path, "key")["q"] == found
