"""Running a training module on batches held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningDataModule, Trainer
from torch import Tensor

from datamodules.encoding.encoder import Batch, EncodedSample
from lightning_modules.grpo import GRPO
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.policy_module import PolicyModule
from lightning_modules.rollouts.vllm.engine import VLLMEngine
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings
from tests.lightning_modules.grpo_modules import build_grpo
from tests.vllm_stub import VLLMStub

LORA = LoraSettings(rank=8, alpha=16)
QUICK = {"timeout": 20.0, "attempts": 1, "backoff": 0.01, "max_backoff": 0.02, "patience": 20.0, "pause": 0.02}


def trained_weights(policy: QwenVL) -> dict[str, Tensor]:
    """A copy, by name, of all that training changes."""
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def served(tiny_model_dir, lora, url: str, **more) -> GRPO:
    small = {"lora": lora, "group_size": 4, "temperature": 1.0, "max_new_tokens": 8, "learning_rate": 1e-2}
    vllm = VLLMSettings((url,), **QUICK)
    return build_grpo(str(tiny_model_dir), engine="vllm", vllm=vllm, importance_cap=2.0, **small | more)


class Batches(LightningDataModule):
    """Cycles through `num_items` at a time, forever; resumes after the batch that was last marked as trained on.

    With several ranks, each takes every world-size-th batch.
    """

    def __init__(self, items: list[EncodedSample], num_items: int) -> None:
        super().__init__()
        self.items, self.num_items = items, num_items
        self.position = 0

    def train_dataloader(self) -> Iterator[Batch]:
        return _Stream(self)

    def mark_trained(self, batch: Batch) -> dict[str, float]:
        self.position = batch.position["number"]
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class _Stream:
    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data, trainer, number = self.data, self.data.trainer, self.data.position
        while True:
            start = (number * trainer.world_size + trainer.global_rank) * data.num_items
            number += 1
            chosen = [data.items[(start + k) % len(data.items)] for k in range(data.num_items)]
            yield Batch(chosen, {"number": number})


@pytest.fixture
def lora() -> LoraSettings:
    return LORA


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Trainer]:
    """fit(module, items, num_items=2, max_steps=3, **trainer) trains on the CPU; returns the trainer."""

    def run(
        module: PolicyModule, items: list[EncodedSample], num_items: int = 2, ckpt_path: Any = None, **trainer: Any
    ) -> Trainer:
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        made = Trainer(
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **settings | trainer,
        )
        made.fit(module, datamodule=Batches(items, num_items), ckpt_path=ckpt_path, weights_only=True)
        return made

    return run


@pytest.fixture
def stub(tiny_model_dir, lora):
    with VLLMStub(str(tiny_model_dir), lora) as stub:
        yield stub


@pytest.fixture
def other(tiny_model_dir, lora):
    with VLLMStub(str(tiny_model_dir), lora) as stub:
        yield stub


@pytest.fixture
def connect(tiny_model_dir, lora, tmp_path):
    engines = []

    def make(*urls, **more) -> VLLMEngine:
        policy = QwenVL(str(tiny_model_dir), lora=lora).eval()
        engines.append(VLLMEngine(policy, VLLMSettings(urls, **QUICK | more), tmp_path / "adapters"))
        return engines[-1]

    yield make
    for engine in engines:
        engine.adapter = None  # a server may be gone
        engine.close()
