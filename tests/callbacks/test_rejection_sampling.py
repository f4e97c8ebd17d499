"""Rejection sampling: what is kept, that it is reused, and that an interruption changes nothing."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Barrier

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks import rejection_sampling
from callbacks.checkpoints import RunStopped
from callbacks.rejection_sampling import RejectionSampling
from datamodules.persistence.user_error import UserError
from datamodules.samples.answer_text import AnswerForm, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.grpo import GRPO
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.rl import prompt_selection
from lightning_modules.rl.prompt_selection import RejectionSettings, rejection_key, rejection_sample
from lightning_modules.rollouts.base import SamplingSettings
from tests.callbacks.conftest import FakeEngine, FakeModule, FakePolicy, read_rows, resuming, true_answer
from tests.lightning_modules.grpo_modules import build_grpo

SETTINGS = RejectionSettings(num_samples=4, temperature=0.7, max_new_tokens=8, prompts_per_batch=3)


def right_number_mod_5(item, k: int) -> str:
    """Candidate c<n> is solved in n mod 5 of 4 samples."""
    return true_answer(item) if k < int(item.sample.id[1:]) % 5 else "(0,0),(1,1)"


def kept_ids(folder: Path) -> list[str]:
    reader = ShardReader(folder)
    return [reader.read(number).sample.id for number in range(reader.count)]


@pytest.fixture
def run(pool, encoder, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_selection, "POLL_SECONDS", 0.01)
    policy = FakePolicy(str(tiny_model_dir))
    given = {"encoder": encoder, "source": str(pool), "settings": SETTINGS, "folder": tmp_path / "rs"}
    return partial(rejection_sample, policy, **given)


def test_always_and_never_solved_prompts_are_dropped(run, tmp_path: Path) -> None:
    shards = run(FakeEngine(right_number_mod_5))
    # 0 of 4 and 4 of 4 go; c19 cannot be read.
    assert kept_ids(shards) == [f"c{n}" for n in range(19) if 0 < n % 5 < 4]
    histogram = json.loads((tmp_path / "rs/histogram.json").read_text())
    assert histogram["num_correct"] == [4, 4, 4, 4, 3]
    assert (histogram["candidates"], histogram["kept"]) == (19, 12)
    assert sum(histogram["rejected"].values()) == 1
    assert sum(histogram["tasks"]["diff"]) + sum(histogram["tasks"]["region"]) == 19
    kept = [json.loads(line) for line in (tmp_path / "rs/kept.jsonl").read_text().splitlines()]
    assert kept[0]["id"] == "c1" and kept[0]["correct"] == 1
    assert kept[0]["mean_iou"] == pytest.approx(0.25, abs=0.02)


def test_how_many_correct_completions_are_kept_can_be_set(run) -> None:
    for bounds, right in (({"min_correct": 2}, (2, 3)), ({"max_correct": 2}, (1, 2)), ({"min_correct": 3}, (3,))):
        shards = run(FakeEngine(right_number_mod_5), settings=replace(SETTINGS, **bounds))
        assert kept_ids(shards) == [f"c{n}" for n in range(19) if n % 5 in right], bounds


@pytest.mark.parametrize(("least", "most"), [(3, 2), (-1, None), (4, None), (1, 5)])
def test_bounds_that_keep_nothing_are_refused(least: int, most: int | None) -> None:
    with pytest.raises(ValueError, match=f"min_correct={least}, max_correct={most}"):
        RejectionSettings(num_samples=4, min_correct=least, max_correct=most)


def test_a_finished_choice_is_used_again_unless_something_changed(run, encoder, tiny_model_dir, tmp_path: Path) -> None:
    run(FakeEngine(right_number_mod_5))
    again = FakeEngine(right_number_mod_5)
    run(again)
    assert again.asked == []
    for changed in (
        {"settings": replace(SETTINGS, temperature=0.9)},
        {"settings": SETTINGS},
    ):
        engine = FakeEngine(right_number_mod_5)
        run(engine, **changed)
        assert len(engine.asked) == 19


def test_an_interrupted_choice_goes_on_with_the_same_seeds(run, tmp_path: Path) -> None:
    whole = FakeEngine(right_number_mod_5)
    expected = kept_ids(run(whole, folder=tmp_path / "other"))

    class Dying(FakeEngine):
        def generate(self, request):
            if len(self.asked) >= 9:
                raise KeyboardInterrupt
            return super().generate(request)

    first, second = Dying(right_number_mod_5), FakeEngine(right_number_mod_5)
    with pytest.raises(KeyboardInterrupt):
        run(first)
    assert kept_ids(run(second)) == expected
    assert first.asked + second.asked == whole.asked
    assert first.seeds + second.seeds == whole.seeds
    assert len(set(whole.seeds)) == 7


def run_on_two_ranks(run, engines: list[FakeEngine], **given) -> list[list[str]]:
    """What each of two ranks returns, as ids."""
    barrier = Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        given = {"world_size": 2, "barrier": barrier.wait} | given
        ranks = [pool.submit(run, engine, rank=rank, **given) for rank, engine in enumerate(engines)]
    return [kept_ids(rank.result()) for rank in ranks]


def test_ranks_share_the_work_and_one_writes(run, tmp_path: Path) -> None:
    expected = kept_ids(run(FakeEngine(right_number_mod_5), folder=tmp_path / "other"))
    engines = [FakeEngine(right_number_mod_5) for _ in range(2)]
    assert run_on_two_ranks(run, engines) == [expected, expected]
    assert sorted(engines[0].asked + engines[1].asked) == sorted(f"c{n}" for n in range(19))
    assert len(engines[0].seeds) == 4 and len(engines[1].seeds) == 3


def test_ranks_share_what_an_interruption_has_left_to_do(run, tmp_path: Path) -> None:
    expected = kept_ids(run(FakeEngine(right_number_mod_5)))
    journal = tmp_path / "rs/journal-0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[::2]))  # rank 0 of two was done, and rank 1 had done nothing
    (tmp_path / "rs/histogram.json").unlink()
    engines = [FakeEngine(right_number_mod_5) for _ in range(2)]
    assert run_on_two_ranks(run, engines) == [expected, expected]
    assert len(engines[0].seeds) == 2 and len(engines[1].seeds) == 1


def test_a_rank_waits_for_a_slower_one_longer_than_a_collective_would(run, tmp_path: Path) -> None:
    expected = kept_ids(run(FakeEngine(right_number_mod_5), folder=tmp_path / "other"))
    barrier = Barrier(2, timeout=60)

    class Slow(FakeEngine):
        def generate(self, request):
            time.sleep(0.1)
            return super().generate(request)

    def wait_briefly_when_sampling_has_begun() -> None:
        barrier.wait(0.05 if any(engine.asked for engine in engines) else 60)

    engines = [FakeEngine(right_number_mod_5), Slow(right_number_mod_5)]
    assert run_on_two_ranks(run, engines, barrier=wait_briefly_when_sampling_has_begun) == [expected, expected]


def test_keeping_nothing_is_an_error_that_shows_the_counts(run) -> None:
    with pytest.raises(RunStopped, match="none of 19 candidates"):
        run(FakeEngine(lambda item, k: "no box"))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0, ["none has 1 to 3 right of 4", "0 right 19", "truncated_image 1", "start from a better model"]),
        (4, ["none has 1 to 3 right of 4", "4 right 19", "truncated_image 1", "take harder candidates"]),
    ],
)
def test_why_nothing_was_kept_is_told_in_a_few_lines(run, share: int, words: list[str]) -> None:
    for _ in range(2):  # a finished choice that kept nothing ends the next start in the same way
        with pytest.raises(RunStopped) as caught:
            run(FakeEngine(lambda item, k: true_answer(item) if k < share else "no box"))
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert len(str(caught.value).splitlines()) <= 5


BOX = BoxAnswer(0, (0.2, 0.2, 0.7, 0.8), "ring")
UNUSABLE = {1: BoxesAnswer((BOX, BOX)), 4: ChoiceAnswer("A", ("left", "right"))}


def with_unusable(pool: Path, folder: Path, numbers: Sequence[int]) -> str:
    """The pool's candidates; those with these numbers have an answer of two boxes, or of a choice."""
    reader = ShardReader(pool)
    with ShardWriter(folder) as writer:
        for number in range(reader.count):
            loaded = reader.read(number)
            if number in numbers:
                answer = UNUSABLE[1 if number % 2 else 4]
                loaded = replace(loaded, sample=replace(loaded.sample, answer=answer))
            writer.add(loaded)
    return str(folder)


def test_a_candidate_without_one_box_is_rejected_by_name(run, pool, tmp_path: Path, caplog) -> None:
    engine = FakeEngine(right_number_mod_5)
    shards = run(engine, source=with_unusable(pool, tmp_path / "mixed", [1, 4]))
    assert kept_ids(shards) == [f"c{n}" for n in range(19) if 0 < n % 5 < 4 and n != 1]
    assert not {"c1", "c4"} & set(engine.asked)
    histogram = json.loads((tmp_path / "rs/histogram.json").read_text())
    assert histogram["rejected"] == {"no_box_answer": 2, "truncated_image": 1} and histogram["candidates"] == 17
    assert "'no_box_answer': 2" in caplog.text


def test_several_boxes_are_right_together_or_from_a_chosen_f1_on(run, encoder, pool, tmp_path: Path) -> None:
    """Candidates are shown in the form that names images; one of two boxes has F1 2/3."""
    named = copy.copy(encoder)
    named.answer_form = AnswerForm.NAMED_IMAGE
    both = BoxesAnswer((BOX, BoxAnswer(0, (0.75, 0.0, 1.0, 0.2), "ring")))
    with ShardWriter(tmp_path / "both") as writer:
        for number in range(10):
            loaded = ShardReader(pool).read(number)
            writer.add(replace(loaded, sample=replace(loaded.sample, answer=both)))

    def some_right(item, k: int) -> str:
        """Both boxes in number mod 5 of 4 completions, else one of them."""
        values = [item.image_sizes[box.image].to_model(box.box, encoder.box_format) for box in both.boxes]
        boxes = [ParsedBox(four, "ring", box.image + 1) for four, box in zip(values, both.boxes, strict=True)]
        return render_boxes(boxes if k < int(item.sample.id[1:]) % 5 else boxes[:1], "t")

    asked = {"encoder": named, "source": str(tmp_path / "both")}
    assert kept_ids(run(FakeEngine(some_right), **asked)) == [f"c{n}" for n in range(10) if 0 < n % 5 < 4]
    lower = replace(SETTINGS, min_f1=0.6)
    with pytest.raises(RunStopped, match="4 right 10"):
        run(FakeEngine(some_right), **asked, settings=lower)
    key = partial(rejection_key, str(pool), encoder, str(pool))
    assert key(SETTINGS) == key(replace(SETTINGS, min_f1=1.0)) != key(lower)


def test_rejected_candidates_are_told_while_others_are_sampled(run, pool, tmp_path: Path, caplog) -> None:
    reported_when_asked: list[int] = []  # reports before each request to the engine

    def reports() -> list[str]:
        return [record.getMessage() for record in caplog.records if "so far" in record.getMessage()]

    class Engine(FakeEngine):
        def generate(self, request):
            reported_when_asked.append(len(reports()))
            return super().generate(request)

    run(Engine(right_number_mod_5), source=with_unusable(pool, tmp_path / "mixed", [1, 4, 10, 11]))
    assert reported_when_asked[0] == 1 and "1 samples rejected: no_box_answer 1 (c1)" in reports()[0]
    assert len(reports()) == 3, "at 1, 2 and 4 rejected candidates"


def test_a_pool_of_which_nothing_can_be_used_is_told_of(run, pool, tmp_path: Path) -> None:
    source = with_unusable(pool, tmp_path / "none", range(20))
    with pytest.raises(RunStopped, match="no candidate can be used; rejected: no_box_answer 20"):
        run(FakeEngine(right_number_mod_5), source=source)


def test_all_bad_settings_are_named_before_weights_are_read() -> None:
    bad = {"num_samples": 1, "temperature": 0, "max_new_tokens": 0, "prompts_per_batch": 0, "threshold": 1.5}
    with pytest.raises(ValueError) as caught:
        RejectionSampling(**bad)
    assert all(f"{name}={value}" in str(caught.value) for name, value in bad.items())


def test_candidates_are_sampled_as_in_training_unless_told_otherwise(fit, tiny_model_dir) -> None:
    class Asked(FakeEngine):
        def generate(self, request):
            self.sampling = request.sampling
            return super().generate(request)

    for given, expected in (({}, (0.9, 6)), ({"temperature": 0.5, "max_new_tokens": 8}, (0.5, 8))):
        module = FakeModule(str(tiny_model_dir), Asked(right_number_mod_5))
        module.rollout_settings = SamplingSettings(temperature=0.9, max_new_tokens=6)
        fit(module, [RejectionSampling(num_samples=4, **given)], max_steps=1)
        assert (module.engine.sampling.temperature, module.engine.sampling.max_new_tokens) == expected


@resuming
def test_the_callback_trains_on_what_was_kept(fit, tiny_model_dir, tmp_path: Path) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(right_number_mod_5))
    callback = RejectionSampling(num_samples=4, temperature=0.7, max_new_tokens=8)
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=1)
    fit(module, [callback, checkpoints], max_steps=4, enable_checkpointing=True)
    kept = [f"c{n}" for n in range(19) if 0 < n % 5 < 4]
    assert len(module.seen) == 8 and set(module.seen) <= set(kept)

    engine = FakeEngine(right_number_mod_5)
    resumed = FakeModule(str(tiny_model_dir), engine)
    again = {"enable_checkpointing": True, "max_steps": 6, "ckpt_path": tmp_path / "ckpt/last.ckpt"}
    fit(resumed, [callback, checkpoints], **again)
    assert engine.asked == []
    assert sorted(module.seen + resumed.seen) == sorted(kept)


class RealTokens(FakeEngine):
    """Answers in real tokens, and notes whether the policy had moved from stage 1 when candidates were sampled."""

    def __init__(self, module: GRPO) -> None:
        super().__init__(right_number_mod_5)
        self.module, self.had_moved = module, []

    def generate(self, request):
        if request.features is None:  # in training they are known
            self.had_moved += [bool(p.any()) for name, p in self.module.named_parameters() if "lora_B" in name]
        ids = self.module.policy.tokenizer.encode("ring", return_tensors="pt")[0]
        groups = super().generate(request)
        return [[replace(rollout, token_ids=ids) for rollout in group] for group in groups]


class Records(Callback):
    """Writes a rank's sample ids, and saves a checkpoint behind the second batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        with (self.folder / f"seen-{trainer.global_rank}").open("a") as file:
            file.writelines(f"{name}\n" for name in batch.sample_ids)
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.folder / "second.ckpt")

    def on_train_end(self, trainer, module) -> None:
        (rate,) = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
        (self.folder / f"rate-{trainer.global_rank}").write_text(str(rate))

    def read(self) -> list[str]:
        return sorted("".join(path.read_text() for path in self.folder.glob("seen-*")).split())


@pytest.fixture
def grpo(tiny_model_dir):
    def build() -> GRPO:
        lora = LoraSettings(rank=4, alpha=8)
        module = build_grpo(
            str(tiny_model_dir), lora=lora, group_size=4, max_new_tokens=8, kl_beta=0.0, learning_rate=1e-2
        )
        module.engine = RealTokens(module)
        return module

    return build


KEPT = sorted(f"c{n}" for n in range(19) if 0 < n % 5 < 4)
ONE_EPOCH = {"max_epochs": 1, "max_steps": -1, "log_every_n_steps": 1}


@pytest.mark.parametrize("ranks", [{}, {"strategy": "ddp_fork", "devices": 2}], ids=["one", "two"])
def test_grpo_trains_an_epoch_of_what_was_kept_and_its_schedule_ends_there(fit, grpo, tmp_path: Path, ranks) -> None:
    records = Records(tmp_path)
    fit(
        grpo(),
        [RejectionSampling(num_samples=4, temperature=0.7, max_new_tokens=8, prompts_per_batch=3), records],
        **ONE_EPOCH,
        **ranks,
    )
    assert records.read() == KEPT
    assert float((tmp_path / "rate-0").read_text()) == pytest.approx(0, abs=1e-12)


def test_a_cache_without_room_is_refused_before_candidates_are_sampled(fit, grpo) -> None:
    module = grpo()
    module.rollout_settings = replace(module.rollout_settings, kv_cache_gib=1e-5)
    with pytest.raises(UserError, match=r"rollout\.kv_cache_gib=1e-05 is less than .* \(data\.max_prompt_tokens\)"):
        fit(module, [RejectionSampling(num_samples=4)], max_steps=1)
    assert module.engine.asked == []


@pytest.mark.parametrize("ranks", [{}, {"strategy": "ddp_fork", "devices": 2}], ids=["one", "two"])
def test_runs_with_the_same_candidates_share_one_choice(fit, grpo, tmp_path: Path, ranks) -> None:
    records, given = (
        Records(tmp_path),
        {"num_samples": 4, "temperature": 0.7, "max_new_tokens": 8, "prompts_per_batch": 3},
    )
    shared = str(tmp_path / "shared")
    fit(grpo(), [RejectionSampling(shared=shared, **given), records], **ONE_EPOCH, **ranks)
    assert records.read() == KEPT
    (choice,) = Path(shared).iterdir()
    assert not (tmp_path / "run/rejection_sampling").exists(), "it has moved"
    written = (choice / "histogram.json").stat().st_mtime_ns

    module = grpo()
    fit(module, [RejectionSampling(shared=shared, **given)], **ONE_EPOCH | {"max_steps": 1})
    assert module.engine.had_moved == [], "nothing was sampled before training"
    assert [path.stat().st_mtime_ns for path in Path(shared).glob("*/histogram.json")] == [written]

    fit(grpo(), [RejectionSampling(shared=shared, **given | {"temperature": 0.9})], **ONE_EPOCH | {"max_steps": 1})
    assert len(list(Path(shared).iterdir())) == 2, "another temperature is another choice"


def test_a_choice_that_another_run_has_published_meanwhile_is_kept(tmp_path: Path) -> None:
    for name in ("run", "shared/key"):
        (tmp_path / name / "shards").mkdir(parents=True)
        (tmp_path / name / "histogram.json").write_text(name)
    rejection_sampling._publish(tmp_path / "run", tmp_path / "shared/key")
    assert (tmp_path / "shared/key/histogram.json").read_text() == "shared/key" and not (tmp_path / "run").exists()


@resuming
def test_a_lost_choice_is_made_again_by_the_stage_1_model_and_logged_once(fit, grpo, tmp_path: Path) -> None:
    records, logger = Records(tmp_path), CSVLogger(tmp_path / "log")
    callbacks = [RejectionSampling(num_samples=4, temperature=0.7, max_new_tokens=8), records]
    first = grpo()
    fit(first, callbacks, **ONE_EPOCH | {"max_steps": 2}, logger=logger)
    shares = [row.get("rejection_sampling/kept_share") for row in read_rows(logger)]
    assert [float(share) for share in shares if share] == [pytest.approx(12 / 19)]
    assert any(p.any() for name, p in first.named_parameters() if "lora_B" in name)

    rmtree(tmp_path / "run/rejection_sampling")
    second, logger = grpo(), CSVLogger(tmp_path / "log")
    fit(second, callbacks, **ONE_EPOCH, ckpt_path=tmp_path / "second.ckpt", logger=logger)
    assert records.read() == KEPT
    assert second.engine.had_moved and not any(second.engine.had_moved)
    assert not any(row.get("rejection_sampling/kept_share") for row in read_rows(logger))
