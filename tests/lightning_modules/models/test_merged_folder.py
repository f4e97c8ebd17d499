"""A merged folder is its source's folder with other weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from datamodules.checkpoints.model_folder import ModelError
from lightning_modules.models.architectures.qwen2_5_vl import Qwen25VL
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.merged_folder import check_names, name_in_model, write_merged
from lightning_modules.models.qwen_vl import QwenVL
from tests.published_model import published_folder

QWEN = Qwen25VL()
READER = Path(__file__).parents[2] / "transformers4_reader.py"
PYTHON4 = os.environ.get("TRANSFORMERS4_PYTHON")


def merge(source: Path, folder: Path, dtype: str = "float32") -> Path:
    """Train a little, merge, and give the merged folder."""
    policy = QwenVL(str(source), lora=LoraSettings(rank=4, alpha=8), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    policy.save_merged(folder)
    return folder


def names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def assert_same_but_weights(merged: Path, source: Path) -> None:
    """Same files; all but safetensors byte for byte, and those with the same names, shapes, types and metadata."""
    assert sorted(p.name for p in merged.iterdir()) == sorted(p.name for p in source.iterdir())
    for file in source.iterdir():
        other = merged / file.name
        if file.suffix != ".safetensors":
            assert other.read_bytes() == file.read_bytes(), file.name
            continue
        assert names(other) == names(file)
        old, new = load_file(file), load_file(other)
        assert [(t.shape, t.dtype) for t in old.values()] == [(t.shape, t.dtype) for t in new.values()]
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed == {name for name in old if ".layers." in name and name.endswith("_proj.weight")}
        with safe_open(file, framework="pt") as a, safe_open(other, framework="pt") as b:
            assert a.metadata() == b.metadata()


@pytest.mark.parametrize(
    ("tied", "files", "dtype"), [(True, 2, "float32"), (False, 3, "bfloat16"), (True, 1, "float32")]
)
def test_a_published_folder_keeps_files_and_names(tied: bool, files: int, dtype: str, tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", tied, files, getattr(torch, dtype))
    first = merge(source, tmp_path / "first", dtype)
    assert_same_but_weights(first, source)
    assert any("lm_head.weight" in names(file) for file in first.glob("*.safetensors")) == (not tied)
    second = merge(first, tmp_path / "second", dtype)  # the next phase starts from what the one before has merged
    assert_same_but_weights(second, source)


def test_a_head_that_is_tied_and_stored_all_the_same_is_written_as_the_embeddings(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", tied=True, files=1)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_same_but_weights(merge(source, tmp_path / "merged"), source)


def test_other_precision_than_the_sources_is_kept_and_the_index_says_its_size(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", files=2, dtype=torch.bfloat16)
    merged = merge(source, tmp_path / "merged", dtype="float32")
    sizes = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, merged)]
    assert sizes[1]["metadata"]["total_size"] == 2 * sizes[0]["metadata"]["total_size"]
    assert sizes[1]["weight_map"] == sizes[0]["weight_map"]
    weights = {name: t for file in merged.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_what_lies_beside_a_model_is_not_copied(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", files=1)
    (source / "trainer_state.json").write_text("{}")
    (source / "old.safetensors").write_bytes(b"")
    kept = {p.name for p in merge(source, tmp_path / "merged").iterdir()}
    assert kept == {p.name for p in source.iterdir()} - {"trainer_state.json", "old.safetensors"}


def test_names_of_published_files_and_of_transformers_own() -> None:
    own = {"model.language_model.norm.weight", "model.visual.merger.ln_q.weight", "lm_head.weight"}
    found = {
        "model.norm.weight": "model.language_model.norm.weight",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "visual.merger.ln_q.weight": "model.visual.merger.ln_q.weight",
        "model.visual.merger.ln_q.weight": "model.visual.merger.ln_q.weight",
        "lm_head.weight": "lm_head.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "norm.weight": None,
        "other.norm.weight": None,
    }
    assert {name: name_in_model(name, own, QWEN) for name in found} == found


def test_a_name_that_merging_could_not_write_is_refused_before_training(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", files=1)
    state = QwenVL(str(source)).base.state_dict()
    check_names(source, state, QWEN)
    tensors = load_file(source / "model.safetensors")
    tensors["other.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"other\.norm\.weight in model\.safetensors"):
        check_names(source, state, QWEN)
    with pytest.raises(ModelError, match=r"other\.norm\.weight"):
        write_merged(state, source, tmp_path / "merged", QWEN)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.unfinished").exists()


def test_a_merged_folder_is_the_trained_model(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "source", tied=False)
    policy = QwenVL(str(source), lora=LoraSettings(rank=4))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05)
    policy.save_merged(tmp_path / "merged")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    expected = policy.model.merge_and_unload().state_dict()  # PEFT's own merging
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not PYTHON4, reason="TRANSFORMERS4_PYTHON names no Python with transformers 4 (CONTRIBUTING.md)")
def test_merged_folders_load_and_answer_in_transformers_4_wherever_their_source_does(tmp_path: Path) -> None:
    folders = []
    for name, tied, dtype in (("tied", True, "float32"), ("untied", False, "bfloat16")):
        source = published_folder(tmp_path / name, tied, dtype=getattr(torch, dtype))
        folders += [source, merge(source, tmp_path / f"{name}-merged", dtype)]
    command = [str(READER), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    runs = [
        subprocess.run([python, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        for python in (PYTHON4, sys.executable)
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
    old, new = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert {found["version"].partition(".")[0] for found in old} == {"4"}
    assert [found["gaps"] for found in old + new] == [[]] * 8
    for here, there in zip(new, old, strict=True):
        assert there["ends"] == here["ends"] and there["tokens"] == here["tokens"]
        tolerance = 1e-4 if there["dtype"] == "torch.float32" else 5e-2
        torch.testing.assert_close(torch.tensor(there["logits"]), torch.tensor(here["logits"]), rtol=0, atol=tolerance)
    for source, merged in (old[:2], old[2:]):
        moved = (torch.tensor(source["logits"]) - torch.tensor(merged["logits"])).abs().max()
        assert moved > 0.1 and source["tokens"] == merged["tokens"]
