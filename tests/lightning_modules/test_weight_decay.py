"""Weight decay leaves norms and biases out, as Hugging Face's Trainer does; checkpoints of other groups are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer as HuggingFaceTrainer

from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.training.endings import RunStopped
from lightning_modules.training.optim import decay_groups


def test_the_groups_are_hugging_faces(tiny_model_dir):
    model = QwenVL(str(tiny_model_dir)).base.model.language_model
    expected = set(HuggingFaceTrainer.get_decay_parameter_names(None, model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = decay_groups(list(model.parameters()), 0.1)
    assert {names[id(parameter)] for parameter in decayed["params"]} == expected
    assert {names[id(parameter)] for parameter in others["params"]} == set(names.values()) - expected != set()
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_without_decay_or_without_norms_there_is_one_group_in_order(tiny_model_dir, lora):
    for settings, decay in (({}, 0.0), ({"lora": lora}, 0.1)):
        parameters = QwenVL(str(tiny_model_dir), **settings).trainable_parameters()
        (group,) = decay_groups(parameters, decay)
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]


def test_norms_and_biases_do_not_shrink(tiny_model_dir, make_items, fit):
    """With a decay that halves a weight and hardly any gradient step beside it."""
    module = CoTSFT(str(tiny_model_dir), learning_rate=1e-6, weight_decay=5e5)
    module.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in module.policy.model.named_parameters()}
    fit(module, make_items([1, 2], with_target=True), max_steps=1)
    for name, parameter in module.policy.model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = before[name] if parameter.dim() < 2 else before[name] / 2
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_whose_decay_reached_the_norms_is_refused_by_name(tiny_model_dir, make_items, fit, tmp_path):
    items, settings = make_items([1, 2], with_target=True), {"learning_rate": 1e-4, "weight_decay": 0.1}
    trainer = fit(CoTSFT(str(tiny_model_dir), **settings), items, max_steps=1)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert fit(CoTSFT(str(tiny_model_dir), **settings), items, max_steps=2, ckpt_path=tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    one = groups[0] | {"params": sorted(number for group in groups for number in group["params"])}
    checkpoint["optimizer_states"][0]["param_groups"] = [one]  # as ab36dcb wrote it
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(RunStopped, match=r"weight_decay=0\.1 reached norms and biases"):
        fit(CoTSFT(str(tiny_model_dir), **settings), items, max_steps=2, ckpt_path=tmp_path / "old.ckpt")
