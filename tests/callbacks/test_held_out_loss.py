"""Held-out loss in supervised training: its numbers, that training stays the same, ranks, and the best checkpoint."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks.checkpoints import WholeCheckpoints, WindowCheckpoint
from callbacks.held_out_loss import HeldOutLoss
from datamodules.multi_image import MultiImageData, encode_for_training
from datamodules.samples.sample import BoxAnswer, ChoiceAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.training.fsdp_strategy import ShardedStrategy
from tests.callbacks.conftest import read_rows
from tests.conftest import random_png
from tests.documented_metrics import documented_names
from tests.lightning_modules.conftest import trained_weights
from tests.lightning_modules.ranks import run_ranks

TASKS = ("diff", "referring", "own task")


def write_shards(folder: Path, count: int, seed: int, choices: int = 0) -> Path:
    """`count` samples of three tasks, and `choices` more whose answer is no box."""
    rng = random.Random(seed)
    with ShardWriter(folder, max_samples=5) as writer:
        for number in range(count + choices):
            images = tuple(random_png(rng, (84, 56 + 28 * (number % 2))) for _ in range(1 + number % 2))
            parts = tuple(ImagePart(index) for index in range(len(images)))
            box = BoxAnswer(0, (0.1, 0.2, 0.3 + 0.6 * rng.random(), 0.9), "ring")
            answer = box if number < count else ChoiceAnswer("A", ("yes", "no"))
            sample = Sample(
                f"{seed}/{number}",
                "test",
                TASKS[number % 3],
                tuple(f"{index}.png" for index in range(len(images))),
                (*parts, TextPart("Where is the ring?")),
                answer,
                thinking="The ring is here. " * (1 + number % 3),
            )
            writer.add(LoadedSample(sample, images))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Path]:
    """(training, held out)."""
    return write_shards(tmp_path / "train", 12, seed=1), write_shards(tmp_path / "held", 7, seed=2)


@pytest.fixture
def train(tiny_model_dir: Path, shards, tmp_path: Path):
    """train(callbacks, accumulate=1, …) fits CoT-SFT on the training shards; (module, trainer)."""

    def run(callbacks: list[Callback], max_steps: int = 4, dropout: float = 0.0, ckpt_path=None, **settings):
        module_settings = {"accumulate": settings.pop("accumulate", 1), "max_tokens_per_row": 300}
        lora = LoraSettings(rank=4, alpha=8, dropout=dropout)
        learning_rate = settings.pop("learning_rate", 3e-3)
        module = CoTSFT(str(tiny_model_dir), lora=lora, learning_rate=learning_rate, **module_settings)
        data = MultiImageData(str(shards[0]), str(tiny_model_dir), batch_size=2, shuffle_buffer=4)
        defaults = {"logger": False, "enable_checkpointing": False, "devices": 1}
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            callbacks=callbacks,
            default_root_dir=tmp_path / "run",
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **defaults | settings,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, trainer

    return run


def plain_values(module: CoTSFT, encoder, folder: Path) -> dict[str, float]:
    """The values, sample by sample, through transformers' own forward pass."""
    sums: dict[str, list[float]] = {}
    policy = module.policy.eval()
    reader = ShardReader(str(folder))
    for number in range(reader.count):
        item = encode_for_training(encoder, reader.read(number))
        ids = torch.cat([item.input_ids, item.completion_ids])[None]
        with torch.no_grad():
            logits = policy.base(
                input_ids=ids,
                mm_token_type_ids=(ids == policy.image_token_id).long(),
                pixel_values=item.pixel_values,
                image_grid_thw=item.grid_thw,
            ).logits[0, len(item.input_ids) - 1 : -1]
        loss = F.cross_entropy(logits, item.completion_ids, reduction="sum").item()
        hits = (logits.argmax(-1) == item.completion_ids).sum().item()
        row = sums.setdefault(item.sample.task, [0.0, 0, 0])
        sums[item.sample.task] = [
            a + b for a, b in zip(row, (loss, hits, len(ids[0]) - len(item.input_ids)), strict=True)
        ]
    loss, hits, count = (sum(column) for column in zip(*sums.values(), strict=True))
    values = {"val/loss": loss / count, "val/token_accuracy": hits / count}
    return values | {f"val/loss/{task}": total / n for task, (total, _, n) in sums.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_values_are_those_of_plain_forward_passes(train, shards, batch_size: int) -> None:
    callback = HeldOutLoss(str(shards[1]), batch_size=batch_size)
    module, trainer = train([callback])
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert found == pytest.approx(plain_values(module, trainer.datamodule.encoder, shards[1]), rel=1e-4)
    assert set(found) == {"val/loss", "val/token_accuracy", *(f"val/loss/{task}" for task in TASKS)}
    documented = documented_names()
    assert all(name.replace("own task", "diff").replace("referring", "diff") in documented for name in found)


class Noted(Callback):
    """The losses of all batches, the ids of their samples, and the state of the random numbers behind each."""

    def __init__(self) -> None:
        self.rows: list = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self.rows.append((loss, tuple(batch.sample_ids), torch.random.get_rng_state().sum().item(), random.random()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_with_and_without_it(train, shards, accumulate: int) -> None:
    def run(*callbacks: Callback):
        random.seed(0)
        torch.manual_seed(0)
        noted = Noted()
        module, _ = train([noted, *callbacks], accumulate=accumulate, dropout=0.2)
        return noted.rows, trained_weights(module.policy)

    rows, weights = run()
    measured_rows, measured_weights = run(HeldOutLoss(str(shards[1]), every_n_steps=1))
    assert measured_rows == rows
    assert all(torch.equal(weights[name], measured_weights[name]) for name in weights)


def test_it_measures_between_updates_at_multiples_and_at_the_end(train, shards, tmp_path: Path, capsys) -> None:
    logger = CSVLogger(tmp_path / "log")
    train([HeldOutLoss(str(shards[1]), every_n_steps=2)], max_steps=5, accumulate=2, logger=logger)
    steps = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "held-out loss" in line]
    assert steps == ["step 2", "step 4", "step 5"]
    assert len([row for row in read_rows(logger) if row.get("val/loss")]) == 3


def test_a_run_that_ends_early_is_measured_too(train, shards, capsys) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.global_step == 3

    train([HeldOutLoss(str(shards[1])), Stops()], max_steps=9)
    assert capsys.readouterr().out.count("step 3: held-out loss") == 1


def test_the_lowest_loss_decides_which_checkpoint_is_kept(train, shards, tmp_path: Path) -> None:
    class Spoils(Callback):
        """Makes the weights bad after the second update."""

        def on_train_batch_start(self, trainer, module, *_) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    for parameter in module.policy.trainable_parameters():
                        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    checkpoints = WindowCheckpoint(str(tmp_path / "kept"), every_n_steps=1, monitor="val/loss", mode="min")
    held_out = HeldOutLoss(str(shards[1]), every_n_steps=1)
    train([held_out, Spoils(), checkpoints], max_steps=5, enable_checkpointing=True, plugins=[WholeCheckpoints()])
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == ["step-00000002.ckpt", "step-00000005.ckpt"]
    best = checkpoints.scores["step-00000002.ckpt"]
    assert best == min(checkpoints.scores.values()) < checkpoints.scores["step-00000005.ckpt"]


def test_a_resumed_run_measures_and_scores_as_an_undisturbed_one(train, shards, tmp_path: Path) -> None:
    def run(folder: str, max_steps: int, ckpt_path: Path | None = None):
        checkpoints = WindowCheckpoint(str(tmp_path / folder), every_n_steps=1, keep_last=9, monitor="val/loss")
        more = {"enable_checkpointing": True, "plugins": [WholeCheckpoints()], "ckpt_path": ckpt_path}
        module, trainer = train([HeldOutLoss(str(shards[1]), every_n_steps=2), checkpoints], max_steps, **more)
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        return trained_weights(module.policy), values, checkpoints.scores

    weights, values, scores = run("whole", 6)
    resumed_weights, resumed_values, resumed_scores = run("resumed", 6, tmp_path / "whole/step-00000003.ckpt")
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert resumed_values == values
    assert resumed_scores == scores  # step 4 to 6, and what the checkpoint knew of those before


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_ranks_with_uneven_shares_measure_what_one_process_measures(train, shards, strategy: str) -> None:
    """Seven samples on two ranks; with rows of at most 300 tokens the ranks differ in their passes too."""

    def work(**ranks):
        torch.set_num_threads(1)
        # A learning rate near 0: rounding in the sums of gradients cannot move the weights.
        _, trainer = train([HeldOutLoss(str(shards[1]), batch_size=2)], max_steps=1, learning_rate=1e-9, **ranks)
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}

    chosen = {"ddp": "ddp", "sharded": ShardedStrategy()}[strategy]
    one, many = work(), run_ranks(2, lambda: work(devices=2, strategy=chosen))
    for found in many:
        assert found == pytest.approx(one, rel=1e-5)


def test_more_ranks_than_samples(train, shards) -> None:
    def work(**ranks):
        torch.set_num_threads(1)
        held = HeldOutLoss(str(shards[1]), limit=1)
        _, trainer = train([held], max_steps=1, learning_rate=1e-9, **ranks)
        return float(trainer.callback_metrics["val/loss"])

    for found in run_ranks(2, lambda: work(devices=2, strategy=ShardedStrategy())):
        assert found == pytest.approx(work(), rel=1e-5)


def test_a_sample_without_a_box_is_left_out_and_named_once(train, shards, tmp_path: Path, caplog) -> None:
    mixed = write_shards(tmp_path / "mixed", 4, seed=3, choices=2)
    with caplog.at_level(logging.WARNING):
        train([HeldOutLoss(str(mixed), every_n_steps=1)], max_steps=3)
    assert caplog.text.count("no_box_answer 2 (3/4, 3/5)") == 1


def test_limit_spreads_over_the_shards(shards, tmp_path: Path) -> None:
    callback = HeldOutLoss([str(shards[0]), str(shards[1])], limit=4)
    callback.setup(None, None, "fit")
    assert callback._numbers == [0, 4, 9, 14]


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        HeldOutLoss("", every_n_steps=0, limit=-1, batch_size=0)
    message = str(caught.value)
    assert all(text in message for text in ("shards=''", "every_n_steps=0", "limit=-1", "batch_size=0"))
    with pytest.raises(ValueError, match="no manifest"):
        HeldOutLoss(str(tmp_path)).setup(None, None, "fit")
