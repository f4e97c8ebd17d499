"""Fused layers against transformers' own. Their kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.models.layers import fused_layers
from lightning_modules.models.layers.fused_layers import FusedMLP, FusedNorm, LinearPatchEmbedding
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL

layer_kernels = pytest.importorskip("lightning_modules.models.layers.triton_norm_mlp", reason="needs Triton")
KERNELS = {"input_layernorm": "rms_norm", "norm1": "rms_norm", "mlp": "silu_gate"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels run on any device; their names, as they are called."""
    torch.manual_seed(0)
    monkeypatch.setattr(fused_layers, "has_kernels", lambda device: True)
    called: list[str] = []

    def counted(name: str) -> None:
        real = getattr(layer_kernels, name)
        monkeypatch.setattr(layer_kernels, name, lambda *args: called.append(name) or real(*args))

    counted("rms_norm")
    counted("silu_gate")
    return called


@pytest.fixture
def policy(tiny_model_dir: Path) -> QwenVL:
    policy = QwenVL(str(tiny_model_dir), lora=LoraSettings(rank=4)).to(DEVICE)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


def plain(module: nn.Module) -> nn.Module:
    """The same as transformers made it."""
    module = copy.deepcopy(module)
    assert type(module).__bases__[0] in (FusedMLP, FusedNorm, LinearPatchEmbedding)
    module.__class__ = type(module).__bases__[1]
    return module


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of what is trained."""
    x = x.clone().requires_grad_()
    out = module(x)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("name", ["input_layernorm", "mlp"])
def test_layers_of_the_language_model(policy: QwenVL, launches: list[str], name: str) -> None:
    module = getattr(policy.base.model.language_model.layers[0], name)
    x = torch.randn(1, 37, policy.base.config.text_config.hidden_size, device=DEVICE)
    torch.testing.assert_close(results(module, x), results(plain(module), x), rtol=1e-3, atol=1e-4)
    assert launches == [KERNELS[name]]


@pytest.mark.parametrize("name", ["norm1", "mlp"])
def test_layers_of_the_vision_tower(policy: QwenVL, launches: list[str], name: str) -> None:
    module = getattr(policy.base.model.visual.blocks[0], name)
    x = torch.randn(40, policy.base.config.vision_config.hidden_size, device=DEVICE)
    torch.testing.assert_close(results(module, x), results(plain(module), x), rtol=1e-3, atol=1e-4)
    assert launches == [KERNELS[name]]


@pytest.mark.parametrize("is_trained", [False, True])
def test_patches_are_embedded_as_by_a_convolution(policy: QwenVL, is_trained: bool) -> None:
    module = copy.deepcopy(policy.base.model.visual.patch_embed).requires_grad_(is_trained)
    patches = torch.randn(40, module.proj.weight[0].numel(), device=DEVICE)
    actual = results(module, patches)
    assert len(actual) == 2 + is_trained
    tolerance = 1e-5 if DEVICE == "cpu" else 5e-3  # a GPU's convolutions take TF32
    torch.testing.assert_close(actual, results(plain(module), patches), rtol=tolerance, atol=tolerance)


def test_a_trained_norm_is_transformers_own(policy: QwenVL) -> None:
    module = policy.base.model.language_model.norm.requires_grad_()
    x = torch.randn(5, policy.base.config.text_config.hidden_size, device=DEVICE)
    actual = results(module, x)
    assert len(actual) == 3  # with the weight's
    assert all(torch.equal(*pair) for pair in zip(actual, results(plain(module), x), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_filling_the_inner_width_changes_nothing(policy: QwenVL, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(fused_layers, "has_kernels", lambda device: False)
    mlp = copy.deepcopy(policy.base.model.visual.blocks[0].mlp)
    mlp.gate_proj, mlp.up_proj = nn.Linear(16, 20, bias=bias), nn.Linear(16, 20, bias=bias)
    mlp.down_proj = nn.Linear(20, 16, bias=bias)
    mlp = mlp.to(DEVICE, torch.bfloat16)
    x = torch.randn(9, 16, dtype=torch.bfloat16, device=DEVICE)
    torch.testing.assert_close(results(mlp, x), results(plain(mlp), x), rtol=2e-2, atol=2e-2)


def test_an_adapter_is_never_left_out(policy: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision with an inner width that would be filled up, were it plain."""
    mlp = copy.deepcopy(policy.base.model.language_model.layers[0].mlp).to(torch.bfloat16)
    x = torch.randn(3, policy.base.config.text_config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    mlp.down_proj.in_features = 20
    monkeypatch.setattr(fused_layers, "has_kernels", lambda device: False)
    assert torch.equal(mlp(x), plain(mlp)(x))
