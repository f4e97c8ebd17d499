from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.files import StorageError
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models import vision_feature_cache
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.models.vision_feature_cache import GIB, FeatureCache, tower_fingerprint
from tests.conftest import SmallDisk

CPU = torch.device("cpu")
GRID = (1, 4, 6)


def test_what_is_put_is_got_exactly_by_any_process_of_the_same_tower(tmp_path: Path) -> None:
    features = torch.randn(6, 32).to(torch.bfloat16)
    FeatureCache(tmp_path, "tower", 1.0).put("a" * 64, GRID, features)
    other = FeatureCache(tmp_path, "tower", 1.0)
    assert torch.equal(other.get("a" * 64, GRID, CPU), features)
    assert other.get("a" * 64, (1, 6, 4), CPU) is None  # another size
    assert other.get("b" * 64, GRID, CPU) is None
    assert FeatureCache(tmp_path, "other tower", 1.0).get("a" * 64, GRID, CPU) is None


def test_the_folder_stays_under_its_limit_and_loses_what_was_used_least_lately(tmp_path: Path) -> None:
    one = torch.zeros(100, 100)  # 40,000 bytes and a header
    old, cache = (FeatureCache(tmp_path, name, 130_000 / GIB) for name in ("old", "new"))
    old.put("x", GRID, one)
    cache.put("a", GRID, one)
    for age, path in ((30, old.folder), (20, cache.folder)):
        for file in path.glob("*.safetensors"):
            os.utime(file, (os.path.getmtime(file) - age,) * 2)
    cache.get("a", GRID, CPU)  # used again: now the youngest but one
    cache.put("b", GRID, one)
    cache.put("c", GRID, one)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 130_000
    assert old.get("x", GRID, CPU) is None
    assert all(cache.get(key, GRID, CPU) is not None for key in "abc")


def test_other_files_and_folders_in_the_folder_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    """The setting may name a folder that the user keeps models and results in."""
    own = [tmp_path / name for name in ("base/model.safetensors", "run/results.json", "run/checkpoints/last.ckpt")]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100_000))
    for path in (*own, own[2].parent):
        os.utime(path, (0, 0))
    cache = FeatureCache(tmp_path, "tower", 100_000 / GIB)
    abandoned = cache.folder / ".e-1x4x6.safetensors.1-2.tmp"
    abandoned.write_bytes(bytes(100_000))
    os.utime(abandoned, (0, 0))
    for key in "abcd":
        cache.put(key, GRID, torch.zeros(100, 100))  # 40,000 bytes and a header
    assert all(path.stat().st_size == 100_000 for path in own) and not abandoned.exists()
    assert [cache.get(key, GRID, CPU) is not None for key in "abcd"] == [False, False, True, True]


def test_features_are_read_from_a_folder_that_cannot_be_written(small_disk: SmallDisk, caplog) -> None:
    FeatureCache(small_disk.root, "tower", 1.0).put("a", GRID, torch.ones(2, 2))
    (FeatureCache(small_disk.root, "other", 1.0).folder / "a-1x4x6.safetensors").write_bytes(b"damaged")
    subprocess.run(["mount", "-o", "remount,ro", small_disk.root], check=True)
    cache, other = (FeatureCache(small_disk.root, name, 1.0) for name in ("tower", "other"))
    assert torch.equal(cache.get("a", GRID, CPU), torch.ones(2, 2))
    assert other.get("a", GRID, CPU) is None
    cache.put("b", GRID, torch.ones(2, 2))
    assert "keeps no further images" in caplog.text
    with pytest.raises(StorageError, match="cannot be written"):
        FeatureCache(small_disk.root, "third", 1.0)


def test_many_workers_share_a_small_folder(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        cache = FeatureCache(tmp_path, "tower", 60_000 / GIB)
        for step in range(30):
            number = (seed * 7 + step) % 10
            found = cache.get(str(number), GRID, CPU)
            assert found is None or torch.equal(found, torch.full((50, 50), float(number)))
            cache.put(str(number), GRID, torch.full((50, 50), float(number)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_damaged_file_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "tower", 1.0)
    cache.put("a", GRID, torch.ones(2, 2))
    (file,) = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert cache.get("a", GRID, CPU) is None
    cache.put("a", GRID, torch.ones(2, 2))
    assert torch.equal(cache.get("a", GRID, CPU), torch.ones(2, 2))


def test_the_fingerprint_knows_weights_precision_and_processor(tiny_model_dir: Path, tmp_path: Path) -> None:
    tower = QwenVL(str(tiny_model_dir)).base.model.visual
    first = tower_fingerprint(tower, str(tiny_model_dir))
    assert tower_fingerprint(tower, str(tiny_model_dir)) == first
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    assert tower_fingerprint(tower, str(folder)) == first
    file = next(f for f in folder.iterdir() if f.name in ("preprocessor_config.json", "processor_config.json"))
    file.write_text(file.read_text() + "\n")
    half = tower_fingerprint(tower.to(torch.bfloat16), str(tiny_model_dir))
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1
    others = {half, tower_fingerprint(tower, str(tiny_model_dir)), tower_fingerprint(tower, str(folder))}
    assert len(others | {first}) == 4


def test_the_fingerprint_knows_the_configuration(
    tiny_model_dir: Path, tmp_path: Path, make_items: Callable[..., list[EncodedSample]]
) -> None:
    """The same weights with smaller windows give other features."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["window_size"] = 56
    (folder / "config.json").write_text(json.dumps(config))
    one, same, other = (QwenVL(str(path)) for path in (tiny_model_dir, tiny_model_dir, folder))
    items = make_items([1])
    assert not torch.equal(one.encode_images(items)[0], other.encode_images(items)[0])
    marks = [tower_fingerprint(policy.vision_tower, str(tiny_model_dir)) for policy in (one, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_sft_with_the_cache_trains_the_same_and_encodes_no_image_twice(
    tiny_model_dir: Path, tmp_path: Path, make_items: Callable[..., list[EncodedSample]], fit, lora
) -> None:
    items, losses, seen = make_items([2, 1], with_target=True), [], []
    for cache in (None, str(tmp_path / "features"), str(tmp_path / "features")):
        module = CoTSFT(str(tiny_model_dir), feature_cache=cache, lora=lora, learning_rate=1e-2)
        module.configure_model()
        seen.append(0)

        def count(_, args) -> None:
            seen[-1] += len(args[0])

        module.policy.base.model.visual.register_forward_pre_hook(count)
        trainer = fit(module, items, max_steps=3)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    patches = sum(len(item.pixel_values) for item in items)
    assert seen == [3 * patches, patches, 0]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("settings", [{"feature_cache": "f", "freeze_vision": False}, {"feature_cache_gib": 0}])
def test_senseless_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="feature_cache"):
        CoTSFT("unread", **settings)


def test_a_full_disk_costs_a_warning_and_no_training(tmp_path: Path, monkeypatch, caplog) -> None:
    cache = FeatureCache(tmp_path, "tower", 1.0)

    def fill_up(*_: object) -> None:
        raise SafetensorError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(vision_feature_cache, "save_file", fill_up)
        for key in "ab":
            cache.put(key, GRID, torch.zeros(2, 2))
    assert caplog.text.count("the feature cache keeps no further images") == 1
    assert cache.get("a", GRID, CPU) is None and not list(tmp_path.rglob("*.safetensors*"))
    cache.put("a", GRID, torch.zeros(2, 2))
    assert cache.get("a", GRID, CPU) is not None
