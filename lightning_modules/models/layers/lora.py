"""LoRA on the language model, and copies of the model with LoRA merged into the linear weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from datamodules.persistence.files import whole_folder
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import SettingsError
from lightning_modules.models.architectures.base import Architecture
from lightning_modules.models.architectures.qwen2_5_vl import Qwen25VL
from lightning_modules.models.architectures.registry import all_linear_layers, architecture_of
from lightning_modules.models.layers.fused_layers import HALF
from lightning_modules.models.layers.fused_lora import FusedLoraLinear

ALL_LINEAR = "all-linear"  # PEFT's name for it
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv:2106.09685) on linear layers of the language model, never on the vision tower.

    Args:
        rank: columns of A and of B transposed.
        alpha: the update B A is scaled by alpha / rank.
        dropout: dropout of the adapter's input.
        targets: names of linear layers (`Architecture.linear_layers`), optionally with parent names (`mlp.up_proj`,
            `layers.3.self_attn.q_proj`), or "all-linear" for all of them.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = Qwen25VL.linear_layers

    def layers(self, all_linear: tuple[str, ...]) -> tuple[str, ...]:
        """The names that `targets` means in a model that has the linear layers `all_linear`."""
        return all_linear if self.targets in (ALL_LINEAR, (ALL_LINEAR,)) else tuple(self.targets)

    def problems(self) -> Problems:
        """Messages for all invalid settings."""
        problems, known = Problems("lora."), all_linear_layers()
        for name in ("rank", "alpha"):
            value, rule = getattr(self, name), "must be greater than 0; lora=null trains without an adapter"
            problems.require(value > 0, rule, **{name: value})
        problems.require(0 <= self.dropout < 1, "must be in [0, 1)", dropout=self.dropout)
        names, rule = self.layers(known), f"names no layer, but lora.rank={self.rank}; use lora=null"
        problems.require(bool(names), rule, targets=self.targets)
        if unknown := [name for name in names if name.rpartition(".")[2] not in known]:
            problems.append(_unknown_targets(unknown, known))
        return problems


def _unknown_targets(names: Sequence[str], known: Sequence[str]) -> str:
    return (
        f"lora.targets: {', '.join(map(repr, names))} match{'es' if len(names) == 1 else ''} no linear layer of the"
        f" language model, which has {', '.join(known)}; or {ALL_LINEAR!r} for all of them"
    )


def lora_config(lora: LoraSettings, architecture: Architecture) -> LoraConfig:
    """PEFT's settings for an adapter on the language model only."""
    pattern = _pattern(lora.layers(architecture.linear_layers), architecture)
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern)


def _pattern(layers: Sequence[str], architecture: Architecture) -> str:
    # The vision tower may have layers with the same names, so the pattern includes the path of the language model.
    text_model = architecture.text_path.rpartition(".")[2]
    return rf".*\b{text_model}\.(?:.*\.)?({'|'.join(map(re.escape, layers))})"


def _unmatched(model: nn.Module, layers: Sequence[str], architecture: Architecture) -> list[str]:
    """The names that match no linear layer of the language model. PEFT accepts them if at least one matches."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    patterns = {layer: _pattern([layer], architecture) for layer in layers}
    return [layer for layer, pattern in patterns.items() if not any(re.fullmatch(pattern, name) for name in linear)]


def with_adapter(model: nn.Module, lora: LoraSettings) -> PeftModel:
    """The model with a new adapter. Raises SettingsError for a target that matches no linear layer."""
    architecture = architecture_of(model)
    if unmatched := _unmatched(model, lora.layers(architecture.linear_layers), architecture):
        raise SettingsError(_unknown_targets(unmatched, architecture.linear_layers))
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, lora_config(lora, architecture))
    for module in adapted.modules():
        if type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear  # the same state with a faster forward pass
    return adapted


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The present tensors of the adapter, on the CPU, with PEFT's names in files.

    If parameters are sharded, all ranks must call it together: gathering is a collective operation.
    """
    adapter = {name: value for name, value in model.named_parameters() if "lora_" in name}
    named = get_peft_model_state_dict(model, state_dict=adapter, save_embedding_layers=False)
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in named.items()}
    return {name: value.detach().cpu().contiguous() for name, value in full.items()}


def write_adapter(tensors: dict[str, Tensor], model: PeftModel, folder: Path) -> None:
    """Write `adapter_tensors` as a PEFT adapter: adapter_model.safetensors and adapter_config.json.

    `folder` appears complete or not at all.
    """
    with whole_folder(folder) as unfinished:
        save_file(tensors, unfinished / ADAPTER_FILE)
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(unfinished)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside this context, the adapter has no dropout. Everything else in the model stays in its mode."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module in dropouts:
            module.training = True


def merged_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` that shares every tensor with it, except the weights of LoRA layers.

    Each LoRA layer becomes one linear layer with the LoRA update added to its weight. `module` itself does not change,
    so repeated merging adds no rounding errors.
    """
    # deepcopy takes the value of `memo` in place of each object whose id is a key.
    memo: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memo |= {id(m): merged_layer(m) for m in module.modules() if isinstance(m, LoraLinear)}
    return copy.deepcopy(module, memo)


def frozen_copy(model: nn.Module, share_vision: bool) -> nn.Module:
    """A frozen copy of the present model. With `share_vision`, both models share the tensors of the vision tower."""
    tower = architecture_of(model).vision_tower(model)
    memo = {id(t): t for t in (*tower.parameters(), *tower.buffers())} if share_vision else {}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


@torch.no_grad()
def refresh_merged(merged: nn.Module, module: nn.Module) -> None:
    """Merge the present LoRA layers of `module` into `merged`, an earlier `merged_copy` of it.

    The tensors of `merged` are written in place, so their addresses stay valid.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            merged_weight(layer, out=merged.get_submodule(name).weight)


def merged_layer(layer: LoraLinear) -> nn.Linear:
    """One linear layer with the LoRA update added to its weight; the bias is shared."""
    base = layer.get_base_layer()
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
    merged.bias = base.bias
    return merged


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight [O, I] of a linear layer, without its LoRA update if it has one."""
    return (layer.get_base_layer() if isinstance(layer, LoraLinear) else layer).weight.detach()


@torch.no_grad()
def merged_weight(layer: nn.Module, out: Tensor | None = None) -> Tensor:
    """The weight [O, I] of a linear layer, plus its LoRA update s · B A if it has one; written to `out` if given."""
    if not isinstance(layer, LoraLinear):
        return layer.weight.detach()
    base, names = layer.get_base_layer(), layer.active_adapters
    weight = base.weight.detach()
    if weight.is_cuda and weight.dtype in HALF and len(names) == 1:
        # One kernel: A and B are rounded as in training, and the sum is computed in float32. The general path below
        # needs ten passes over tensors of this size.
        down, up = (part[names[0]].weight.to(weight.dtype) for part in (layer.lora_A, layer.lora_B))
        return torch.addmm(weight, up, down, alpha=layer.scaling[names[0]], out=out)
    delta = sum(layer.get_delta_weight(name).float() for name in names)
    merged = (weight.float() + delta).to(weight.dtype)
    return merged if out is None else out.copy_(merged)
