"""Another family is one file and one line of the table: Qwen3-VL, against transformers' own whole model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from datamodules.checkpoints.model_folder import ModelError
from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from lightning_modules.models.architectures import registry
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.inference.fastest import fastest_sampling_model
from lightning_modules.models.inference.plain_model import PlainSamplingModel
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from tests.conftest import QUESTIONS, random_png
from tests.lightning_modules.models.architectures.qwen3_vl import Qwen3VL, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.ARCHITECTURES, Qwen3VL.model_type, Qwen3VL())


def make_item(folder: Path, num_images: int) -> EncodedSample:
    rng = random.Random(num_images)
    names = tuple(f"{index}.png" for index in range(num_images))
    parts = (*map(ImagePart, names), TextPart(QUESTIONS[0]))
    sample = Sample("test/1", "test", "referring", names, parts, BoxAnswer(0, (0.1, 0.2, 0.6, 0.9), "ring"))
    images = tuple(random_png(rng, rng.choice(((96, 64), (128, 160)))) for _ in names)
    return Encoder(str(folder), "relative_1000", "think", 4096, 256, with_target=False).encode(
        LoadedSample(sample, images)
    )


def trained(folder: Path) -> QwenVL:
    policy = QwenVL(str(folder), lora=LoraSettings(rank=4, alpha=8, targets="all-linear"), with_reference=True)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return policy.train()


def plain_log_probs(model: nn.Module, item: EncodedSample, completion: Tensor, banned: Tensor) -> Tensor:
    """log p of each token by a forward pass over prompt and completion, with the images' pixels as input."""
    ids = torch.cat([item.input_ids, completion])[None]
    images = {"pixel_values": item.pixel_values, "image_grid_thw": item.grid_thw}
    images["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    scores = logits.index_fill(-1, banned, float("-inf")).log_softmax(-1)
    return scores[len(item.input_ids) - 1 : -1].gather(-1, completion[:, None])[:, 0]


def test_log_probs_gradients_reference_and_merged_model(folder: Path, tmp_path: Path) -> None:
    policy, items = trained(folder), [make_item(folder, 1), make_item(folder, 3)]
    completions = [[torch.arange(20, 27), torch.arange(40, 44)], [torch.arange(60, 71)]]
    (rows,) = pack_rows(items, completions, 100_000)
    log_probs = policy.token_log_probs(rows, policy.encode_images(items))
    log_probs.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.trainable_parameters())
    policy.save_merged(tmp_path / "merged")
    pairs = [(item, tokens) for item, group in zip(items, completions, strict=True) for tokens in group]
    for model, actual in (
        (tmp_path / "merged", log_probs.detach()),
        (folder, policy.token_log_probs(rows, policy.encode_images(items, reference=True), reference=True)),
    ):
        plain = AutoModelForImageTextToText.from_pretrained(model, attn_implementation="sdpa")
        expected = torch.cat([plain_log_probs(plain, *pair, policy.banned) for pair in pairs])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_it_samples_with_its_own_layers(folder: Path, static: bool) -> None:
    policy, items = trained(folder), [make_item(folder, 2), make_item(folder, 1)]
    assert isinstance(fastest_sampling_model(policy, static=static), PlainSamplingModel)
    engine = NativeEngine(policy, static=static)
    for greedy in (False, True):
        sampling = SamplingSettings(group_size=1 if greedy else 3, temperature=1.0, max_new_tokens=9)
        generator = torch.Generator().manual_seed(1)
        groups = engine.generate(RolloutRequest(items, sampling, generator=generator, greedy=greedy))
        for item, group in zip(items, groups, strict=True):
            for rollout in group:
                expected = plain_log_probs(policy.base, item, rollout.token_ids, policy.banned)
                torch.testing.assert_close(rollout.log_probs, expected, rtol=1e-3, atol=1e-3)


def test_a_family_that_is_not_in_the_table_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.ARCHITECTURES, Qwen3VL.model_type)
    with pytest.raises(ModelError, match=r"'qwen3_vl' in its config.json, not 'qwen2_5_vl': give a Qwen2\.5-VL"):
        QwenVL(str(folder))
