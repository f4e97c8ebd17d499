"""Whether a merged model is the one that its phase started from."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.models.unmoved import is_unmoved, weight_marks
from lightning_modules.training.endings import NothingLearnt
from tests.lightning_modules.conftest import LORA
from tests.lightning_modules.ranks import run_ranks


def last_adapter(policy: QwenVL) -> LoraLinear:
    return [module for module in policy.model.modules() if isinstance(module, LoraLinear)][-1]


def set_up(policy: QwenVL, value: float) -> None:
    """One entry of the last adapter's B, which is zero at the start."""
    with torch.no_grad():
        last_adapter(policy).lora_B["default"].weight[0, 0] = value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_has_moved_the_policy_if_it_shows_in_a_merged_weight(tiny_model_dir, tmp_path, dtype):
    policy = QwenVL(str(tiny_model_dir), lora=LORA, dtype=dtype)
    start = weight_marks(policy)
    expected = []
    for name, value in (("fresh", 0.0), ("rounded", 1e-12), ("moved", 1.0)):
        set_up(policy, value)
        expected.append(is_unmoved(policy, start))
        policy.save_merged(tmp_path / name)
    merged = {name: load_file(tmp_path / name / "model.safetensors") for name in ("fresh", "rounded", "moved")}
    same = [all(torch.equal(merged[name][key], merged["fresh"][key]) for key in merged[name]) for name in merged]
    assert expected == same == [True, True, False]


@pytest.mark.parametrize("settings", [{}, {"lora": LORA, "freeze_vision": False}])
def test_weights_that_are_trained_themselves_are_compared_to_the_last_bit(tiny_model_dir, settings):
    policy = QwenVL(str(tiny_model_dir), **settings)
    start = weight_marks(policy)
    assert is_unmoved(policy, start)
    parameter = next(p for name, p in policy.model.named_parameters() if p.requires_grad and "lora_" not in name)
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))
    assert not is_unmoved(policy, start)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_sharded_policy_is_compared_in_full(tiny_model_dir, lora):
    def work():
        torch.set_num_threads(1)
        policy = QwenVL(str(tiny_model_dir), lora=lora)
        start = weight_marks(policy)
        torch.distributed.init_process_group("gloo")
        policy.shard(init_device_mesh("cpu", (2,)))
        before = is_unmoved(policy, start)
        layer = policy.base.model.language_model.layers[-1]
        name = "lora_B" if lora else "down_proj.weight"
        parameter = next(p for key, p in layer.named_parameters() if name in key)
        with torch.no_grad():
            parameter.to_local().add_(1.0 if torch.distributed.get_rank() == 1 else 0.0)
        return before, is_unmoved(policy, start)

    assert run_ranks(2, work) == [(True, False)] * 2


@pytest.mark.parametrize(("learning_rate", "moves"), [(1e-3, True), (1e-30, False)])
def test_updates_that_change_no_weight_are_no_learning(tiny_model_dir, make_items, fit, lora, learning_rate, moves):
    module = CoTSFT(str(tiny_model_dir), lora=lora, learning_rate=learning_rate)
    fit(module, make_items([1, 2], with_target=True), max_steps=2)
    if moves:
        module.require_learnt()
        return
    with pytest.raises(NothingLearnt, match=r"2 updates have changed no weight.*learning_rate=1e-30"):
        module.require_learnt()
