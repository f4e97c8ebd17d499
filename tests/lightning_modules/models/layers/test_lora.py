"""Where an adapter goes, and what settings of one are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.checkpoints.pretrained import load_config, new_model
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.grpo import GRPO
from lightning_modules.models.architectures.qwen2_5_vl import Qwen25VL
from lightning_modules.models.layers.lora import LoraSettings, with_adapter
from lightning_modules.models.qwen_vl import QwenVL


def adapted(folder: Path, targets: object) -> set[str]:
    """The layers that train with these targets."""
    policy = QwenVL(str(folder), lora=LoraSettings(rank=2, targets=targets))
    names = [name for name, parameter in policy.base.named_parameters() if parameter.requires_grad]
    assert all(".language_model." in name and ".lora_" in name for name in names)
    return {name.partition(".lora_")[0].partition("language_model.")[2] for name in names}


def every(*names: str) -> set[str]:
    parents = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in names}
    return {f"layers.{layer}.{parents[name]}.{name}" for layer in range(2) for name in names}


def test_targets_are_names_of_layers_of_the_language_model(tiny_model_dir: Path) -> None:
    assert adapted(tiny_model_dir, ("q_proj", "v_proj")) == every("q_proj", "v_proj")
    assert adapted(tiny_model_dir, ("mlp.up_proj",)) == every("up_proj")
    assert adapted(tiny_model_dir, ("layers.1.self_attn.q_proj",)) == {"layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear",)])
def test_all_linear_is_every_linear_layer_of_the_language_model(tiny_model_dir: Path, targets: object) -> None:
    assert adapted(tiny_model_dir, targets) == every(*Qwen25VL.linear_layers)


def test_the_list_of_linear_layers_is_what_transformers_model_has(tiny_model_dir: Path) -> None:
    language_model = new_model(load_config(tiny_model_dir)).model.language_model
    linear = {name.rpartition(".")[2] for name, m in language_model.named_modules() if type(m).__name__ == "Linear"}
    assert linear == set(Qwen25VL.linear_layers)


BROKEN = [
    ({"targets": ("q_proj", "vproj")}, ["'vproj'", "q_proj, k_proj", "all-linear"]),
    ({"targets": ("q.proj",)}, ["'q.proj'"]),  # a name, not a pattern
    ({"targets": (".*",)}, ["'.*'"]),
    ({"targets": ("visual.blocks.0.attn.qkv", "lm_head", "embed_tokens")}, ["qkv'", "'lm_head'", "'embed_tokens'"]),
    ({"targets": ("q_proj", "all-linear")}, ["'all-linear' matches"]),
    ({"targets": ()}, ["lora.targets=()"]),
    ({"rank": 0}, ["lora.rank=0"]),
    ({"rank": -4}, ["lora.rank=-4"]),
    ({"alpha": 0}, ["lora.alpha=0"]),
    ({"dropout": 1.0}, ["lora.dropout=1.0"]),
]


@pytest.mark.parametrize(("settings", "quoted"), BROKEN)
@pytest.mark.parametrize("phase", [CoTSFT, GRPO])
def test_settings_that_cannot_work_are_told_with_the_other_faults(
    phase: type, settings: dict[str, object], quoted: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        phase("nowhere", lora=LoraSettings(**settings), learning_rate=0.0)  # before any weight is read
    assert all(words in str(error.value) for words in [*quoted, "learning_rate=0.0"])
    with pytest.raises(ValueError) as error:
        QwenVL("/no/such/folder", lora=LoraSettings(**settings))
    assert all(words in str(error.value) for words in quoted)


def test_a_layer_that_this_model_does_not_have_is_refused(tiny_model_dir: Path) -> None:
    lora = LoraSettings(rank=2, targets=("q_proj", "layers.7.self_attn.v_proj"))
    assert lora.problems() == []  # only the model knows how many layers it has
    with pytest.raises(ValueError, match=r"'layers\.7\.self_attn\.v_proj' matches no linear layer"):
        QwenVL(str(tiny_model_dir), lora=lora)
    with pytest.raises(ValueError, match="matches no linear layer"):
        with_adapter(new_model(load_config(tiny_model_dir)), lora)
