from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lightning_modules.models.layers.fused_lora import FusedLoraLinear


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> LoraLinear:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype))
    settings = LoraConfig(r=6, lora_alpha=18, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(inner, settings).base_model.model[0]


def run(made: LoraLinear, kind: type[LoraLinear], x: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, and gradients of x, A and B, with the forward pass of `kind`."""
    made.__class__ = kind
    x = x.clone().requires_grad_()
    out = made(x)
    trained = [x, made.lora_A["default"].weight, made.lora_B["default"].weight]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), trained)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (1, 5, 24), (2, 3, 24)])
def test_values_and_gradients_equal_pefts(bias: bool, shape: tuple[int, ...]) -> None:
    made, x = layer(bias), torch.randn(shape)
    weights = torch.randn(*shape[:-1], 40)
    expected, actual = (run(made, kind, x, weights) for kind in (LoraLinear, FusedLoraLinear))
    torch.testing.assert_close(actual, expected)
    assert (expected[0] - made.get_base_layer()(x)).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(90, 24), (2, 45, 24)])
def test_more_tokens_than_outputs_give_pefts_values_and_gradients_too(bias: bool, shape: tuple[int, ...]) -> None:
    """Against float64: there the sum over many tokens is exact, here each way rounds its own."""
    made, x = layer(bias), torch.randn(shape)
    weights = torch.randn(*shape[:-1], 40)
    actual = run(made, FusedLoraLinear, x, weights)
    expected = run(made.double(), LoraLinear, x.double(), weights.double())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_gradients_equal_finite_differences() -> None:
    made = layer().double()
    made.__class__ = FusedLoraLinear
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    up = made.lora_B["default"].weight
    assert torch.autograd.gradcheck(lambda x, _: made(x), (x, up))


def test_half_precision_under_autocast_keeps_adapters_gradients_in_float32() -> None:
    made, x = layer(dtype=torch.bfloat16), torch.randn(9, 24, dtype=torch.bfloat16)
    weights = torch.randn(9, 40)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (run(made, kind, x, weights) for kind in (LoraLinear, FusedLoraLinear))
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05 * other.abs().max().item())


def test_what_is_not_plain_is_pefts_own() -> None:
    x, weights = torch.randn(5, 24), torch.randn(5, 40)
    dropped = layer(dropout=0.5)
    results = []
    for kind in (LoraLinear, FusedLoraLinear):
        torch.manual_seed(1)
        results.append(run(dropped, kind, x, weights))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    disabled = layer()
    disabled.__class__ = FusedLoraLinear
    disabled.enable_adapters(False)
    assert torch.equal(disabled(x), disabled.get_base_layer()(x))

    trained = layer()
    trained.__class__ = FusedLoraLinear
    trained.get_base_layer().weight.requires_grad_(True)
    trained(x).sum().backward()
    assert trained.get_base_layer().weight.grad is not None
