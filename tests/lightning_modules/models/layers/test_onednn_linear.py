from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.kv_cache import PrefixRecorder
from lightning_modules.models.inference.cpu_model import CpuSamplingModel
from lightning_modules.models.inference.plain_model import PlainSamplingModel
from lightning_modules.models.layers import onednn_linear
from lightning_modules.models.layers.onednn_linear import (
    FastLinear,
    PrepackedLinear,
    linear,
    uses_onednn,
    with_fast_linears,
)
from lightning_modules.models.qwen_vl import LoraSettings, QwenVL

needs_onednn = pytest.mark.skipif(not uses_onednn(torch.zeros(1)), reason="this build of PyTorch has no oneDNN")


@pytest.mark.parametrize("x_turned", [False, True])
@pytest.mark.parametrize("weight_turned", [False, True])
def test_products_equal_those_in_float64(x_turned: bool, weight_turned: bool) -> None:
    x = torch.randn(24, 37).t() if x_turned else torch.randn(37, 24)
    weight = torch.randn(24, 40).t() if weight_turned else torch.randn(40, 24)
    bias = torch.randn(40)
    expected = (x.double() @ weight.double().t() + bias.double()).float()
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_packed_weights_give_the_same_products() -> None:
    x, weight, bias = torch.randn(37, 24), torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(PrepackedLinear(weight, bias)(x), linear(x, weight, bias))


@pytest.mark.parametrize("with_onednn", [True, False])
def test_what_follows_a_product_is_done_with_it(with_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_onednn:
        monkeypatch.setattr(onednn_linear, "_ONEDNN", None)
    x, weight, other = torch.randn(37, 24), torch.randn(40, 24), torch.randn(37, 40)
    plain = x @ weight.t()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    product = PrepackedLinear(weight)
    close(product(x, "swish"), plain * plain.sigmoid())
    close(product.plus(x, other), plain + other)
    close(product.times(x, other), plain * other)


@needs_onednn
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_with_gaps_in_its_memory_takes_no_slow_way(turned: bool) -> None:
    x, wide = torch.randn(1500, 32), torch.randn(100, 2, 32)[:, 1]
    weight = wide[:32].t() if turned else wide
    x = torch.randn(1500, weight.shape[1])
    torch.testing.assert_close(linear(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)

    def least_seconds(weight: Tensor) -> float:
        seconds = []
        for _ in range(5):
            began = time.thread_time()
            linear(x, weight)
            seconds.append(time.thread_time() - began)
        return min(seconds)

    assert least_seconds(weight) < 50 * least_seconds(weight.contiguous())  # it was a thousand times


@pytest.mark.parametrize("shape", [(9, 24), (2, 3, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_fast_layers_equal_pytorchs(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 40)
    results = []
    for kind in (nn.Linear, FastLinear):
        layer.__class__ = kind
        out = layer(x)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results)


def test_gradients_that_are_spread_out_in_memory_are_taken() -> None:
    layer, x = with_fast_linears(nn.Sequential(nn.Linear(24, 40)))[0], torch.randn(9, 24, requires_grad=True)
    layer(x).sum().backward()  # the gradient of a sum is one number, seen from everywhere
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(9, -1))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(40, -1))


def test_other_precisions_and_builds_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = with_fast_linears(nn.Sequential(nn.Linear(24, 40)))[0], torch.randn(9, 24)
    wide = layer.double()(x.double())
    assert torch.equal(wide, torch.nn.functional.linear(x.double(), layer.weight, layer.bias))
    monkeypatch.setattr(onednn_linear, "_ONEDNN", None)
    layer.float()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert PrepackedLinear(layer.weight).weight is layer.weight


def test_the_cpu_model_reads_prompts_as_the_merged_one_does(
    tiny_model_dir: Path, make_items: Callable[..., list[EncodedSample]]
) -> None:
    policy = QwenVL(str(tiny_model_dir), lora=LoraSettings(rank=4, alpha=8))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    (item,) = make_items([3])
    slots = (item.input_ids == policy.image_token_id).nonzero()[:, 0]
    inputs = policy.embed(policy.base, item.input_ids[None], policy.encode_images([item]), slots)
    results, recorders = [], []
    with torch.no_grad():
        for model in (PlainSamplingModel(policy.decoder()), CpuSamplingModel(policy.base)):
            recorders.append(PrefixRecorder())
            positions = item.positions[:, None]
            results.append(model.hidden_states(recorders[-1], positions, inputs_embeds=inputs))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    (keys, values), (cpu_keys, cpu_values) = (recorder.layers[-1] for recorder in recorders)
    torch.testing.assert_close(cpu_values, values, rtol=1e-4, atol=1e-4)
    halves = cpu_keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # pairs, taken apart again
    torch.testing.assert_close(halves, keys, rtol=1e-4, atol=1e-4)
