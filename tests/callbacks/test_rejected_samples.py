"""Samples that a phase cannot use: the share, the warnings, and the same rules in every phase."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer

from callbacks.checkpoints import WholeCheckpoints
from callbacks.rejected_samples import RejectedSamples
from callbacks.rejection_sampling import RejectionSampling
from datamodules.multi_image import MultiImageData
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.grpo import GRPO
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.rl.grpo_settings import RolloutSettings
from tests.callbacks.conftest import FakeEngine, FakeModule, true_answer
from tests.conftest import random_png
from tests.documented_metrics import documented_names

BOX = BoxAnswer(0, (0.1, 0.2, 0.6, 0.9), "ring")
UNUSABLE = {"no_box_answer": 2, "prompt_too_long": 1, "unreadable_image": 1}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """16 usable samples and four others: two without one box, one with a long question, one with a damaged image."""
    rng, folder = random.Random(0), tmp_path / "shards"
    with ShardWriter(folder, max_samples=5) as writer:
        for number in range(20):
            answer = {3: BoxesAnswer((BOX, BOX)), 9: ChoiceAnswer("A", ("yes", "no"))}.get(number, BOX)
            question = "Where is the ring? " * (400 if number == 12 else 1)
            sample = Sample(
                f"s/{number}", "test", "diff", ("a.png",), (ImagePart(0), TextPart(question)), answer, thinking="Here."
            )
            writer.add(LoadedSample(sample, (b"no image" if number == 17 else random_png(rng, (56, 56)),)))
    return folder


class Shares(Callback):
    """What was logged with each batch."""

    def __init__(self) -> None:
        self.values: list[float | None] = []

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        value = trainer.logged_metrics.get("data/rejected_share")
        self.values.append(None if value is None else float(value))


@pytest.fixture
def fit(tiny_model_dir: Path, tmp_path: Path):
    def run(module, shards: Path, callbacks: list[Callback], ckpt_path=None, with_target: bool = False, **settings):
        data = MultiImageData(
            str(shards), str(tiny_model_dir), batch_size=2, with_target=with_target, max_prompt_tokens=500
        )
        defaults = {"max_epochs": 1, "max_steps": -1, "enable_checkpointing": False, "logger": False}
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            callbacks=callbacks,
            default_root_dir=tmp_path / "run",
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **defaults | settings,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return data

    return run


def fake(tiny_model_dir: Path) -> FakeModule:
    return FakeModule(str(tiny_model_dir), FakeEngine(true_answer))


def test_the_share_is_that_of_the_samples_read(fit, shards, tiny_model_dir) -> None:
    shares = Shares()
    fit(fake(tiny_model_dir), shards, [RejectedSamples(), shares])
    # Ten batches an epoch: 16 usable samples fill eight, and the walk starts over for the others.
    values = shares.values
    assert "data/rejected_share" in documented_names()
    assert len(values) == 10 and 0.1 <= values[-1] <= 0.25
    reads = [2 * (batch + 1) / (1 - value) for batch, value in enumerate(values)]
    assert all(abs(read - round(read)) < 1e-4 for read in reads) and reads == sorted(reads)


def test_rejections_are_named_while_training_goes_on(fit, shards, tiny_model_dir, caplog) -> None:
    class Ended(Callback):
        def on_train_end(self, *_) -> None:
            logging.getLogger("callbacks.rejected_samples").warning("the end of training")

    with caplog.at_level(logging.WARNING):
        fit(fake(tiny_model_dir), shards, [RejectedSamples(), Ended()])
    during = [r.getMessage() for r in caplog.records if r.name == "callbacks.rejected_samples"]
    assert during[-1] == "the end of training" and len(during) <= 4  # at 1, 2 and 4 rejected ones
    assert during[0].startswith("rank 0 so far: ")
    assert any(rule in during[0] for rule in UNUSABLE)


@pytest.mark.parametrize("last", [4, 8])  # behind batch 8, only the last one of the epoch is left
def test_a_resumed_run_logs_what_an_undisturbed_one_logs(fit, shards, tiny_model_dir, tmp_path: Path, last) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx == last and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt", weights_only=False)

    more = {"plugins": [WholeCheckpoints()], "max_epochs": 2}
    whole, resumed = Shares(), Shares()
    fit(fake(tiny_model_dir), shards, [RejectedSamples(), whole, Saves()], **more)
    fit(fake(tiny_model_dir), shards, [RejectedSamples(), resumed], ckpt_path=tmp_path / "middle.ckpt", **more)
    assert len(whole.values) == 20 and resumed.values == whole.values[last + 1 :]


def test_every_phase_counts_the_same_samples_by_the_same_rules(fit, shards, tiny_model_dir, tmp_path: Path) -> None:
    lora = LoraSettings(rank=2, alpha=4)
    sft = fit(CoTSFT(str(tiny_model_dir), lora=lora), shards, [], with_target=True)
    assert sft.rejections.counts == UNUSABLE
    settings = {"rollout": RolloutSettings(group_size=2, max_new_tokens=4, temperature=1.0)}
    grpo = fit(GRPO(str(tiny_model_dir), lora=lora, **settings), shards, [])
    assert grpo.rejections.counts == UNUSABLE
    assert {rule: sorted(ids) for rule, ids in grpo.rejections.examples.items()} == {
        rule: sorted(ids) for rule, ids in sft.rejections.examples.items()
    }
    choosing = RejectionSampling(num_samples=2, max_correct=2, min_correct=0, folder=str(tmp_path / "choice"))
    fit(GRPO(str(tiny_model_dir), lora=lora, **settings), shards, [choosing], max_steps=1)
    assert json.loads((tmp_path / "choice/histogram.json").read_text())["rejected"] == UNUSABLE
