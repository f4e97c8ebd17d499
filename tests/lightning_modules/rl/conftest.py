from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.grpo import GRPO
from lightning_modules.models.layers.lora import LoraSettings
from tests.lightning_modules.grpo_modules import build_grpo


@pytest.fixture
def build(tiny_model_dir: Path, lora: LoraSettings) -> Callable[..., GRPO]:
    """Makes a small GRPO module: `build(max_new_tokens=4)`."""

    def make(**settings: Any) -> GRPO:
        small = {"lora": lora, "group_size": 4, "temperature": 1.0, "max_new_tokens": 6, "learning_rate": 1e-3}
        return build_grpo(str(tiny_model_dir), **small | settings)

    return make
