"""The families of models that can be trained, by the `model_type` of their config.json."""

from __future__ import annotations

from torch import nn

from lightning_modules.models.architectures.base import Architecture
from lightning_modules.models.architectures.qwen2_5_vl import Qwen25VL

ARCHITECTURES: dict[str, Architecture] = {architecture.model_type: architecture for architecture in (Qwen25VL(),)}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a transformers module. Raises KeyError for a family that is not in the table."""
    return ARCHITECTURES[model.config.model_type]


def known_types() -> dict[str, str]:
    """model_type in config.json -> name of the family, for all families that can be trained."""
    return {model_type: architecture.name for model_type, architecture in ARCHITECTURES.items()}


def all_linear_layers() -> tuple[str, ...]:
    """The linear layers of all families, each name once, to check settings before a model is read."""
    return tuple(dict.fromkeys(name for architecture in ARCHITECTURES.values() for name in architecture.linear_layers))
