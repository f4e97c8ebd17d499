"""A benchmark folder, a folder of shards and scripted engines for the callbacks' tests."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from datamodules.encoding.encoder import Batch, EncodedSample, Encoder
from datamodules.multi_image import MultiImageData
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.policy_module import PolicyModule
from lightning_modules.rollouts.base import Rollout, RolloutRequest

QUESTIONS = {
    "diff": "Give me the coordinates of their difference. ",
    "region": "Please locate the 1th region picture in the source image. ",
    "common_object": "Recognize and locate this object in the 2th image. ",
}


# Resuming writes to the checkpoint folder that it reads from.
resuming = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class FakePolicy(torch.nn.Module):
    """Has the few attributes of QwenVL that the callbacks touch, and one weight."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.processor_path = path
        self.model = torch.nn.Linear(2, 1)
        self.device = torch.device("cpu")
        self.merged: list[Path] = []
        self.adapters: list[Path] = []

    def gathered(self) -> AbstractContextManager:
        return nullcontext()

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad)

    def save_adapter(self, folder: Path, write: bool = True) -> None:
        self.adapters.append(folder)

    def save_merged(self, folder: Path, write: bool = True, texts: dict[str, str] | None = None) -> None:
        if write:
            self.merged.append(folder)
            self.texts = texts


class FakeEngine:
    """Answers with `write(item, k)` for the k-th completion of an item; counts what it was asked."""

    def __init__(self, write: Callable[[EncodedSample, int], str]) -> None:
        self.write = write
        self.asked: list[str] = []
        self.seeds: list[int] = []

    def generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        items, generator = request.items, request.generator
        self.asked += [item.sample.id for item in items]
        self.seeds += [generator.initial_seed()] if generator is not None else []
        ids = torch.zeros(3, dtype=torch.long)
        return [
            [Rollout(ids, torch.zeros(3), True, self.write(item, k)) for k in range(request.sampling.group_size)]
            for item in items
        ]

    def sync(self) -> None:
        """It has no weights."""

    def close(self) -> None:
        """Nor anything else."""


class FakeModule(LightningModule):
    """A PolicyModule in small: a policy, an engine, and a training step that marks its batch as trained."""

    def __init__(self, path: str, engine: FakeEngine) -> None:
        super().__init__()
        self.policy, self.engine = FakePolicy(path), engine
        self.seen: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen += batch.sample_ids
        self.trainer.datamodule.mark_trained(batch)
        return self.policy.model(torch.ones(1, 2)).sum()

    def require_learnt(self) -> None:
        """It has."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.policy.parameters(), lr=0.1)


class Windows(PolicyModule):
    """Updates on windows of batches without looking at them, once or more each; notes what it is given."""

    def __init__(self, path: str, num_updates: int = 1, accumulate: int = 4) -> None:
        super().__init__(path, lora=LoraSettings(rank=2, alpha=2), accumulate=accumulate)
        self.num_updates = num_updates
        self.seen: list[str] = []

    @property
    def updates_per_window(self) -> int:
        return self.num_updates

    def training_step(self, batch, batch_idx: int) -> None:
        self.begin_batch(batch)
        self.seen += batch.sample_ids
        if self.end_batch():
            for _ in range(self.num_updates):
                self.backward_sum(sum(parameter.sum() for parameter in self.policy.trainable_parameters()), 1)
                self.update()
            self.commit_window(batch)


TWO_EPOCHS = {"max_epochs": 2, "max_steps": -1, "log_every_n_steps": 1}  # of 10 batches: the third window is in both


def true_answer(item: EncodedSample, k: int = 0) -> str:
    """The right box, in the format that earns the format reward."""
    answer = item.sample.answer
    values = item.image_sizes[answer.image].to_model(answer.box, "absolute_pixels")
    return f'<think>I see.</think><answer>{{"bbox_2d": {list(values)}, "label": "x"}}</answer>'


def read_rows(logger: CSVLogger) -> list[dict[str, str]]:
    """The rows of a CSV logger's metrics.csv."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bench(tmp_path: Path) -> tuple[Path, Path]:
    """(annotations, image root) of a benchmark with four questions of each of three tasks, two images each."""
    root = tmp_path / "bench"
    records = []
    for task, question in QUESTIONS.items():
        folder = root / "MIG-Bench/images" / task
        folder.mkdir(parents=True)
        for number in range(4):
            names = [f"{number}_{image}.png" for image in range(2)]
            for image, name in enumerate(names):
                Image.new("RGB", (84 + 28 * image, 84), (60 * number, 90, 40)).save(folder / name)
            images = [f"./MIG-Bench/images/{task}/{name}" for name in names]
            box = [0.1, 0.2, 0.5 + 0.1 * number, 0.8]
            records.append(
                {
                    "task": task,
                    "images": images,
                    "question": question,
                    "answer": box,
                    "additional_info": "",
                    "need_format": True,
                }
            )
    annotations = root / "MIG-Bench/MIG_data.json"
    annotations.write_text(json.dumps(records))
    return annotations, root


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A folder of 20 candidates "c0" … "c19" in shards of 8; the last one's image is damaged."""
    rng = random.Random(0)
    folder = tmp_path / "pool"
    with ShardWriter(folder, max_samples=8) as writer:
        for number in range(20):
            path = tmp_path / "image.png"
            Image.new("RGB", (84, 84), tuple(rng.randrange(256) for _ in range(3))).save(path)
            data = path.read_bytes()
            parts = (ImagePart(0), TextPart("Where is it?"))
            answer = BoxAnswer(0, (0.2, 0.2, 0.7, 0.8), "ring")
            sample = Sample(f"c{number}", "test", "region" if number % 2 else "diff", ("a.png",), parts, answer)
            writer.add(LoadedSample(sample, (data[:60] if number == 19 else data,)))
    return folder


@pytest.fixture
def encoder(tiny_model_dir: Path) -> Encoder:
    return Encoder(str(tiny_model_dir), "absolute_pixels", "think", 4096, 256, with_target=False)


@pytest.fixture
def fit(tiny_model_dir: Path, pool: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """fit(module, callbacks, ...) trains on the pool for some steps, on the CPU, and returns the Trainer."""

    def run(module: LightningModule, callbacks: list, max_steps: int = 2, ckpt_path: Any = None, **kwargs) -> Trainer:
        data = MultiImageData(str(pool), str(tiny_model_dir), batch_size=2, with_target=False, shuffle_buffer=4)
        defaults = {"logger": False, "enable_checkpointing": False}
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            callbacks=callbacks,
            default_root_dir=tmp_path / "run",
            enable_progress_bar=False,
            enable_model_summary=False,
            **defaults | kwargs,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer

    return run
