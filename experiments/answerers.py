"""Which `Answerer` a model string means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from callbacks.mig_bench import EvaluationSettings
from callbacks.native_answerer import NativeAnswerer
from datamodules.answerers import Answerer
from datamodules.batches import Encoder
from datamodules.boxes import Convention
from datamodules.prompts import PromptStyle
from lightning_modules.qwen_vl import QwenVL
from lightning_modules.rollouts import NativeEngine

ALIASES = {"nano": "models/nano-base"}


@dataclass(frozen=True)
class AnswererSettings:
    """All that makes an answerer. It crosses to other processes, which make their own."""

    model: str
    convention: str = "absolute"
    style: str = "think"
    dtype: str = "float32"
    device: str = "auto"
    decoding: EvaluationSettings = field(default_factory=EvaluationSettings)
    limits: dict[str, Any] = field(default_factory=dict)  # of `Encoder`: max_prompt_tokens, label_images, …


def make_answerer(settings: AnswererSettings, rank: int = 0) -> Answerer:
    """The answerer of this process; `rank` takes its own GPU where there are several."""
    encoder = Encoder(
        settings.model,
        convention=Convention(settings.convention),
        style=PromptStyle(settings.style),
        with_target=False,
        max_completion_tokens=settings.decoding.max_new_tokens,
        **settings.limits,
    )
    policy = QwenVL(settings.model, dtype=settings.dtype).to(choose_device(settings.device, rank)).eval()
    return NativeAnswerer(policy, NativeEngine(policy), encoder, settings.decoding)


def choose_device(device: str, rank: int) -> str:
    """"auto" and "cuda" spread processes over the GPUs."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
