"""Which model samples, and which one is the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.kv_cache import PrefixRecorder
from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.inference.cpu_model import CpuSamplingModel
from lightning_modules.models.inference.fastest import CachedReference, fastest_sampling_model
from lightning_modules.models.inference.plain_model import PlainSamplingModel
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL


@pytest.mark.parametrize(
    ("dtype", "static", "kind"),
    [
        ("float32", False, CpuSamplingModel),
        ("float32", True, PlainSamplingModel),
        ("bfloat16", False, PlainSamplingModel),
    ],
)
def test_a_cpu_samples_with_its_own_model_where_that_is_exact(
    tiny_model_dir: Path, dtype: str, static: bool, kind: type[SamplingModel]
) -> None:
    policy = QwenVL(str(tiny_model_dir), LoraSettings(rank=2), dtype)
    model = fastest_sampling_model(policy, static)
    assert type(model) is kind
    assert (model.dtype, model.device) == (policy.base.dtype, policy.device)
    has_adapter = [name for name, _ in policy.base.named_parameters() if "lora_" in name]
    assert has_adapter  # the policy keeps its adapter, whatever the model has


@pytest.mark.parametrize("static", [False, True])
def test_a_refreshed_model_has_the_weights_of_now(
    tiny_model_dir: Path, make_items: Callable[..., list[EncodedSample]], static: bool
) -> None:
    policy, (item,) = QwenVL(str(tiny_model_dir), LoraSettings(rank=2)), make_items([1])

    def states(model: SamplingModel) -> Tensor:
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(item.input_ids[None])
            return model.hidden_states(PrefixRecorder(), item.positions[:, None], embeddings)

    model = fastest_sampling_model(policy, static=static)
    before = states(model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(states(model), before)
    model.refresh(policy.base)
    assert torch.equal(states(model), states(fastest_sampling_model(policy, static=static)))
    assert (states(model) - before).abs().max() > 0.01


def test_a_reference_that_only_transformers_layers_can_compute_is_not_cached(tiny_model_dir: Path) -> None:
    assert CachedReference().read(QwenVL(str(tiny_model_dir), dtype="bfloat16").base) is None
    cache, base = CachedReference(), QwenVL(str(tiny_model_dir), LoraSettings(rank=2)).base
    assert cache.read(base) is cache.read(base)
