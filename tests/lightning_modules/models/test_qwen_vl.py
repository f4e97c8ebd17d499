from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from datamodules.checkpoints.model_folder import ModelError
from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.layers.lora import merged_copy
from lightning_modules.models.qwen_vl import LoraSettings, QwenVL

MakeItems = Callable[..., list[EncodedSample]]
LORA = LoraSettings(rank=4, alpha=8)


def trained(policy: QwenVL, seed: int = 1) -> QwenVL:
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def plain_logits(model: torch.nn.Module, item: EncodedSample) -> torch.Tensor:
    ids = item.input_ids[None]
    is_image = (ids == model.config.image_token_id).int()
    inputs = {"pixel_values": item.pixel_values, "image_grid_thw": item.grid_thw, "mm_token_type_ids": is_image}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits


def packed(policy: QwenVL, items: list[EncodedSample], **options: object) -> torch.Tensor:
    completions = [[torch.arange(20, 29)] for _ in items]
    (row,) = pack_rows(items, completions, 100_000)
    return policy.token_log_probs(row, policy.encode_images(items), **options)


def test_image_features_equal_transformers_own(tiny_model_dir: Path, make_items: MakeItems) -> None:
    policy = QwenVL(str(tiny_model_dir))
    original = AutoModelForImageTextToText.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    items = make_items([1, 2, 6])
    with torch.no_grad():
        for item, features in zip(items, policy.encode_images(items), strict=True):
            expected = torch.cat(original.model.get_image_features(item.pixel_values, item.grid_thw).pooler_output)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_equal_images_are_encoded_once_and_chunks_change_nothing(
    tiny_model_dir: Path, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = QwenVL(str(tiny_model_dir))
    items = make_items([2, 3])
    once = policy.encode_images(items)
    seen: list[int] = []
    hook = policy.base.model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    again = policy.encode_images([*items, items[0], items[1]])
    assert sum(seen) == sum(len(item.pixel_values) for item in items)
    torch.testing.assert_close(again, [*once, *once])
    hook.remove()
    monkeypatch.setattr("lightning_modules.models.vision_feature_cache.MAX_PATCHES", 100)
    torch.testing.assert_close(policy.encode_images(items), once, rtol=1e-4, atol=1e-5)


def test_adapter_is_in_the_language_model_only(tiny_model_dir: Path) -> None:
    policy = QwenVL(str(tiny_model_dir), lora=LORA)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 7  # A and B, layers, projections
    assert all("language_model" in name and "lora_" in name for name in names)


def test_without_lora_the_language_model_trains_and_the_vision_tower_stays(tiny_model_dir: Path) -> None:
    policy = QwenVL(str(tiny_model_dir), lora=None)
    assert {n for n, p in policy.base.named_parameters() if not p.requires_grad} == {
        n for n, _ in policy.base.named_parameters() if ".visual." in n
    }
    assert all(p.requires_grad for p in QwenVL(str(tiny_model_dir), freeze_vision=False).parameters())


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_merged_folder_is_the_adapter_model(
    tiny_model_dir: Path, tmp_path: Path, make_items: MakeItems, freeze_vision: bool
) -> None:
    policy = trained(QwenVL(str(tiny_model_dir), lora=LORA, freeze_vision=freeze_vision))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    (item,) = make_items([3])
    expected = plain_logits(policy.base, item)
    policy.save_merged(tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    torch.testing.assert_close(plain_logits(merged, item), expected, rtol=1e-4, atol=1e-4)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    vision = (
        dict(base.model.visual.named_parameters())
        if freeze_vision
        else dict(policy.base.model.visual.named_parameters())
    )
    for name, parameter in merged.model.visual.named_parameters():
        assert torch.equal(parameter, vision[name]), name
    assert (plain_logits(base, item) - expected).abs().max() > 0.1  # the adapter did something
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_merged_folder_has_the_layout_of_the_original(tiny_model_dir: Path, tmp_path: Path) -> None:
    QwenVL(str(tiny_model_dir), lora=LORA).save_merged(tmp_path / "merged")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert names == {p.name for p in tiny_model_dir.iterdir()}
    weights, original = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", tiny_model_dir))
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in weights)  # LoRA starts as nothing
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "merged", tiny_model_dir)]
    assert configs[0] == configs[1]
    processors = [AutoProcessor.from_pretrained(f) for f in (tmp_path / "merged", tiny_model_dir)]
    assert processors[0].chat_template == processors[1].chat_template
    assert processors[0].tokenizer.get_vocab() == processors[1].tokenizer.get_vocab()


def test_merging_twice_replaces_the_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "stale.txt").write_text("old")
    QwenVL(str(tiny_model_dir), lora=LORA).save_merged(tmp_path / "merged")
    assert not (tmp_path / "merged" / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_merged_copy_shares_all_but_the_adapted_weights(tiny_model_dir: Path) -> None:
    policy = trained(QwenVL(str(tiny_model_dir), lora=LORA))
    copy = merged_copy(policy.base)
    own = {p.data_ptr() for p in policy.parameters()}
    fresh = [name for name, p in copy.named_parameters() if p.data_ptr() not in own]
    assert len(fresh) == 2 * 7
    assert not any("lora" in name for name, _ in copy.named_parameters())
    assert copy.lm_head.weight is copy.model.language_model.embed_tokens.weight  # tied stays tied
    assert any("lora" in name for name, _ in policy.base.named_parameters())


@pytest.mark.parametrize("lora", [LORA, None])
def test_reference_stays_at_the_start(tiny_model_dir: Path, make_items: MakeItems, lora: LoraSettings | None) -> None:
    policy = QwenVL(str(tiny_model_dir), lora=lora, with_reference=True)
    assert (policy.reference_model is None) == (lora is not None)  # a copy only where the adapter can not be disabled
    items = make_items([1, 2])
    start = packed(policy, items).detach()
    trained(policy)
    answer = packed(policy, items, reference=True)
    assert not answer.requires_grad
    torch.testing.assert_close(answer, start)
    assert (packed(policy, items) - start).abs().max() > 0.01
    assert len(policy.trainable_parameters()) == len([p for p in policy.parameters() if p.requires_grad])


def test_the_reference_follows_weights_that_are_written(tiny_model_dir: Path, make_items: MakeItems) -> None:
    policy, items = QwenVL(str(tiny_model_dir), lora=LORA, with_reference=True), make_items([1])
    before = packed(policy, items, reference=True)
    with torch.no_grad():
        policy.base.model.language_model.layers[0].mlp.down_proj.get_base_layer().weight.mul_(1.5)
    after = packed(policy, items, reference=True)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, packed(policy, items).detach())  # the adapter is still as it was made: nothing


def test_a_policy_whose_reference_has_answered_can_be_copied(tiny_model_dir: Path, make_items: MakeItems) -> None:
    policy, items = QwenVL(str(tiny_model_dir), lora=LORA, with_reference=True), make_items([1])
    before = packed(policy, items, reference=True)
    other = deepcopy(policy)
    torch.testing.assert_close(packed(other, items, reference=True), before)
    with torch.no_grad():
        other.base.model.language_model.layers[0].mlp.down_proj.get_base_layer().weight.mul_(1.5)
    assert (packed(other, items, reference=True) - before).abs().max() > 0.01
    torch.testing.assert_close(packed(policy, items, reference=True), before)


@pytest.mark.parametrize("lora", [LORA, None])
def test_reference_keeps_its_own_vision_tower_when_that_trains(
    tiny_model_dir: Path, make_items: MakeItems, lora: LoraSettings | None
) -> None:
    policy = QwenVL(str(tiny_model_dir), lora=lora, freeze_vision=False, with_reference=True)
    items = make_items([2])
    start = policy.encode_images(items)[0].detach()
    trained(policy)
    torch.testing.assert_close(policy.encode_images(items, reference=True)[0], start)
    features = policy.encode_images(items)[0]
    assert features.requires_grad and (features - start).abs().max() > 0.01


def test_asking_for_a_reference_that_is_not_there(tiny_model_dir: Path, make_items: MakeItems) -> None:
    with pytest.raises(ValueError, match="with_reference=False"):
        packed(QwenVL(str(tiny_model_dir), lora=LORA), make_items([1]), reference=True)


def test_banned_tokens_are_all_special_ones_but_the_end(tiny_model_dir: Path) -> None:
    policy = QwenVL(str(tiny_model_dir))
    tokens = policy.tokenizer.convert_ids_to_tokens([i for i in policy.banned_token_ids if i < len(policy.tokenizer)])
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"} <= set(tokens)
    assert not {"<|im_end|>", "<think>", "</answer>"} & set(tokens)
    assert policy.eos_ids == (policy.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    vocab_size = policy.base.config.text_config.vocab_size
    assert vocab_size > len(policy.tokenizer)
    assert set(range(len(policy.tokenizer), vocab_size)) <= set(policy.banned_token_ids)


def test_without_the_ban_log_probs_are_of_the_whole_vocabulary(tiny_model_dir: Path, make_items: MakeItems) -> None:
    policy = QwenVL(str(tiny_model_dir))
    items = make_items([1])
    with torch.no_grad():
        narrow = packed(policy, items)
        wide, best = packed(policy, items, ban_tokens=False, with_best=True)
        logits = plain_logits(policy.base, items[0])[0, -1]  # predicts the first target, token 20
    assert (wide < narrow).all()
    torch.testing.assert_close(wide[0], logits.log_softmax(-1)[20], rtol=1e-4, atol=1e-4)
    assert best[0] == logits.argmax()


def test_bfloat16_runs_close_to_float32(tiny_model_dir: Path, make_items: MakeItems) -> None:
    items = make_items([2])
    policy = QwenVL(str(tiny_model_dir), lora=LORA, dtype="bfloat16", with_reference=True)
    assert all(p.dtype == torch.float32 for p in policy.trainable_parameters())
    log_probs = packed(policy, items)
    assert log_probs.dtype == torch.float32
    log_probs.sum().backward()
    exact = packed(QwenVL(str(tiny_model_dir), lora=LORA), items)
    torch.testing.assert_close(log_probs, exact, rtol=0.1, atol=0.3)


def test_meta_device_needs_only_a_config(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with torch.device("meta"):
        policy = QwenVL(str(tmp_path), lora=LORA, dtype="bfloat16", with_reference=True, gradient_checkpointing=True)
    assert {p.device.type for p in policy.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"lora": LoraSettings(targets=())}, ["targets=()", "rank=64"]),
        ({"dtype": "int4", "lora": LoraSettings(targets=())}, ["dtype='int4'", "targets=()"]),
    ],
)
def test_contradictory_settings_are_quoted_before_loading(options: dict[str, object], quoted: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        QwenVL("/no/such/folder", **options)
    assert all(words in str(error.value) for words in quoted)


def test_wrong_folders_are_named_with_what_is_missing(tiny_model_dir: Path, tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(ValueError) as error:
            QwenVL(str(path))
        assert str(path) in str(error.value)
        return str(error.value)

    assert "no folder" in fault(tmp_path / "nothing")
    assert "config.json is missing" in fault(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "tokenizer.json").unlink()
    message = fault(folder)
    assert "model.safetensors is missing" in message and "pytorch_model.bin" in message and "tokenizer" in message
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "'llama'" in fault(folder) and "'qwen2_5_vl'" in fault(folder)
    (folder / "config.json").write_text("[")
    assert "not a JSON object" in fault(folder)


def test_windows_in_the_decoder_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Sampling would ignore them, and training would end in the middle of a layer."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"sliding_attention \(use_sliding_window\), which is not supported"):
        QwenVL(str(folder))
    with torch.device("meta"), pytest.raises(ModelError, match="sliding_attention"):
        QwenVL(str(folder))
