"""The GPU's decoder, its kernels run by Triton's interpreter on a CPU (and as they are, where there is a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.inference.gpu_model import GpuSamplingModel
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine

kernels = pytest.importorskip("lightning_modules.models.inference.triton_attention", reason="needs Triton")
layer_kernels = pytest.importorskip("lightning_modules.models.layers.triton_norm_mlp", reason="needs Triton")
MakeItems = Callable[..., list[EncodedSample]]


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter has no products in bfloat16; before 3.7 it cannot read the end of a loop under NumPy 2.5.
DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
can_attend = pytest.mark.skipif(
    not ON_GPU and Version(kernels.triton.__version__) < Version("3.7"), reason="needs a GPU, or Triton 3.7"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40])
def test_queries_are_turned_and_keys_kept(width: int, dtype: torch.dtype) -> None:
    prompts, heads, completions, sharing, room = 2, 2, 3, 7, 9
    rows, num_queries = prompts * completions, heads * sharing
    qkv = randn(rows, (num_queries + 2 * heads) * width, dtype=dtype)
    cos, sin = randn(2, rows, width, dtype=dtype)
    keys, values = randn(2, prompts, heads, completions, room, width, dtype=dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    token_index = torch.randint(room, (rows,), device=DEVICE)
    query = kernels.rotate_and_write(qkv, cos, sin, token_index, keys, values)
    by_head = qkv.view(rows, -1, width)
    turned = rotated(by_head[:, : num_queries + heads].float(), cos.float(), sin.float()).to(dtype)
    torch.testing.assert_close(query, turned[:, :num_queries])
    for row, index in enumerate(token_index.tolist()):
        expected_keys[row // completions, :, row % completions, index] = turned[row, num_queries:]
        expected_values[row // completions, :, row % completions, index] = by_head[row, num_queries + heads :]
    torch.testing.assert_close((keys, values), (expected_keys, expected_values))


@can_attend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prompts", "completions", "sharing", "prefix", "completion"),
    [(2, 3, 7, 200, 90), (1, 8, 7, 64, 1), (3, 1, 1, 300, 130), (1, 20, 4, 300, 65)],
)
def test_attention_over_prefix_and_completion_is_one_softmax(
    prompts: int, completions: int, sharing: int, prefix: int, completion: int, dtype: torch.dtype
) -> None:
    """Of ragged lengths, and memory that nothing was written to (NaN) is never seen."""
    heads, width, rows = 2, 16, prompts * completions
    query = randn(rows, heads * sharing, width, dtype=dtype)
    shared = randn(2, prompts, heads, prefix, width, dtype=dtype)
    own = randn(2, prompts, heads, completions, completion, width, dtype=dtype)
    lengths = [torch.randint(1, n + 1, (m,), device=DEVICE) for n, m in ((prefix, prompts), (completion, rows))]
    for p, length in enumerate(lengths[0].tolist()):
        shared[:, p, :, length:] = float("nan")
    for row, length in enumerate(lengths[1].tolist()):
        own[:, row // completions, :, row % completions, length:] = float("nan")
    out = kernels.attend(query, tuple(shared), tuple(own), lengths, (prefix, completion), 0.3)
    for row in range(rows):
        p, b = divmod(row, completions)
        seen = torch.cat([shared[:, p, :, : lengths[0][p]], own[:, p, :, b, : lengths[1][row]]], dim=2)
        keys, values = (t.repeat_interleave(sharing, dim=0) for t in seen)
        weights = (torch.einsum("hd,htd->ht", query[row].float(), keys.float()) * 0.3).softmax(-1)
        expected = torch.einsum("ht,htd->hd", weights, values.float())
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(out[row].float(), expected, **tolerance)


@can_attend
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would take the current one, and nobody makes a process's second GPU that."""
    seen = []
    real = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor) or real(tensor))
    x = randn(2, 16)
    layer_kernels.rms_norm(x, x[0], 1e-6)
    layer_kernels.silu_gate(x, x)
    own, ones = tuple(randn(2, 1, 1, 2, 4, 16)), torch.ones(2, dtype=torch.long, device=DEVICE)
    query = kernels.rotate_and_write(randn(2, 48), x, x, ones, *own)
    kernels.attend(query, tuple(randn(2, 1, 1, 4, 16)), own, (ones[:1], ones), (4, 4), 1.0)
    assert len(seen) == 4 and seen[0] is x and seen[3] is query


ADAPTERS = {
    "every layer": LoraSettings(rank=4, alpha=8),
    "some layers": LoraSettings(rank=4, alpha=8, targets=("q_proj", "gate_proj")),
    "none": None,
}


def new_policy(folder: Path, lora: LoraSettings | None, dtype: str = "float32") -> QwenVL:
    policy = QwenVL(str(folder), lora, dtype).train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy.to(DEVICE)


def rollouts(engine: NativeEngine, items: list[EncodedSample]) -> list[Rollout]:
    sampling = SamplingSettings(group_size=2, temperature=1.0, max_new_tokens=6, prompts_per_batch=2)
    generator = torch.Generator(engine.policy.device).manual_seed(3)
    groups = engine.generate(RolloutRequest(items, sampling, generator=generator))
    return [rollout for group in groups for rollout in group]


def assert_same(actual: list[Rollout], expected: list[Rollout]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


@can_attend
@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_rollouts_are_those_of_transformers_layers(
    tiny_model_dir: Path, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings | None
) -> None:
    """Also after the weights have changed: the kept decoder reads them again, joined ones and copies of shared ones."""
    policy = new_policy(tiny_model_dir, lora)
    policy.__dict__["eos_ids"] = (*policy.eos_ids, *range(0, 250, 6))  # completions end at many lengths
    items = [item.to(DEVICE) for item in make_items([1, 2, 1])]
    engines = {kind: NativeEngine(policy, static=True) for kind in (False, True)}
    seen: dict[bool, list[list[Rollout]]] = {False: [], True: []}
    for _ in range(2):
        for fused, engine in engines.items():
            monkeypatch.setattr(GpuSamplingModel, "can_read", staticmethod(lambda _, fused=fused: fused))
            seen[fused].append(rollouts(engine, items))
            assert isinstance(engine._kept[1].model, GpuSamplingModel) == fused
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for one, other in zip(seen[True], seen[False], strict=True):
        assert_same(one, other)
    first, second = ([rollout.token_ids.tolist() for rollout in group] for group in seen[True])
    assert first != second


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_a_cpu_does_not_use_it(tiny_model_dir: Path) -> None:
    assert not GpuSamplingModel.can_read(new_policy(tiny_model_dir, None, "bfloat16").decoder())


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_gpu_uses_it_in_half_precision(tiny_model_dir: Path, make_items: MakeItems) -> None:
    """Under a graph; captured, then replayed. Log-probabilities are those of training, within the precision."""
    policy = new_policy(tiny_model_dir, ADAPTERS["every layer"], "bfloat16")
    items, engine = [item.to(DEVICE) for item in make_items([1, 2, 1])], NativeEngine(policy)
    first, second = rollouts(engine, items), rollouts(engine, items)
    assert isinstance(engine._kept[1].model, GpuSamplingModel)
    assert [r.token_ids.tolist() for r in first] == [r.token_ids.tolist() for r in second]
    completions = [[rollout.token_ids.to(DEVICE) for rollout in first[2 * i : 2 * i + 2]] for i in range(3)]
    (rows,) = pack_rows(items, completions, 100_000)
    with torch.no_grad():
        trained = policy.token_log_probs(rows, policy.encode_images(items)).cpu()
    torch.testing.assert_close(torch.cat([r.log_probs for r in first]), trained, rtol=0.1, atol=0.1)
