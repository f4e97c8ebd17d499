"""What is wrong with a model's files is told before anything is loaded: what, where, and the cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.checkpoints.model_folder import (
    ModelError,
    check_image_text_model,
    check_model,
    check_processor,
    read_model_type,
)
from datamodules.checkpoints.weight_files import INDEX, WEIGHTS, BrokenFile, stored_tensors, weight_files
from lightning_modules.models.architectures.registry import known_types
from tests.broken_models import POINTER, change_tensors
from tests.published_model import published_folder

SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    published_folder(root / "one", files=1)
    published_folder(root / "two", files=2)
    return root


@pytest.fixture
def one(originals: Path, tmp_path: Path) -> Path:
    """A model in one weight file."""
    return shutil.copytree(originals / "one", tmp_path / "one")


@pytest.fixture
def two(originals: Path, tmp_path: Path) -> Path:
    """A model in two weight files and an index."""
    return shutil.copytree(originals / "two", tmp_path / "two")


def fault(folder: Path) -> str:
    """What the check says, which is one line and names the folder; the same for a model of any family."""
    with pytest.raises(ModelError) as error:
        check_model(folder, known_types())
    with pytest.raises(ModelError):
        check_image_text_model(folder)
    message = str(error.value)
    assert message.startswith(f"model: {str(folder)!r}") and "\n" not in message and len(message) < 600, message
    return message


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_whole_folders_have_no_fault(one: Path, two: Path) -> None:
    for folder, files in ((one, 1), (two, 2)):
        check_model(folder, known_types())
        check_image_text_model(folder)
        assert check_processor(folder) == folder and read_model_type(folder) == "qwen2_5_vl"
        assert len(weight_files(folder)) == files
        stored = {tensor.name: tensor for file in weight_files(folder) for tensor in stored_tensors(file)}
        assert stored["model.norm.weight"].shape == (64,) and stored["model.norm.weight"].dtype == "F32"
        assert len(stored) == 56


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "merges.txt", "generation_config.json"])
def test_git_lfs_pointers(one: Path, name: str) -> None:
    (one / name).write_text(POINTER)
    message = fault(one)
    assert f"{name} is a Git LFS pointer" in message and "git lfs pull" in message


def test_files_that_were_cut_short(one: Path) -> None:
    whole = (one / WEIGHTS).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2):
        (one / WEIGHTS).write_bytes(whole[:length])
        message = fault(one)
        assert f"{WEIGHTS} has {length:,} of {len(whole):,} bytes" in message and "fetch it again" in message
    for length in (100, 8, 5):  # inside the header
        (one / WEIGHTS).write_bytes(whole[:length])
        assert WEIGHTS in fault(one) and "fetch it again" in fault(one)
    (one / WEIGHTS).write_bytes(b"")
    assert f"{WEIGHTS} is empty" in fault(one)
    (one / WEIGHTS).write_bytes(b"<html>Access denied</html>" * 99)
    assert f"{WEIGHTS} is not a whole safetensors file" in fault(one)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "chat_template.json"]
)
@pytest.mark.parametrize("text", ['{"do_sample"', "[]", ""])
def test_damaged_files_beside_the_weights(one: Path, name: str, text: str) -> None:
    """transformers takes defaults for some of them, other ends of an answer for example, and says nothing."""
    (one / name).write_text(text)
    assert name in fault(one) and "fetch it again" in fault(one)


def test_every_file_of_an_index_must_be_there(two: Path) -> None:
    (two / SECOND).unlink()
    assert f"{SECOND}, of 2 files that {INDEX} lists, is missing" in fault(two)


@pytest.mark.parametrize("name", ["../one/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x"])
def test_an_index_names_files_of_its_own_folder(two: Path, one: Path, name: str) -> None:
    table = json.loads((two / INDEX).read_text())["weight_map"]
    edit_json(two / INDEX, weight_map=table | {"model.norm.weight": name})
    assert repr(name) in fault(two) and "no file of this folder" in fault(two)


def test_pickled_weights_are_not_read(one: Path, two: Path) -> None:
    (one / WEIGHTS).rename(one / "pytorch_model.bin")
    assert f"{WEIGHTS} is missing" in fault(one) and "pytorch_model.bin" in fault(one) and "convert" in fault(one)
    edit_json(two / INDEX, weight_map={"model.norm.weight": "pytorch_model.bin"})
    assert "'pytorch_model.bin'" in fault(two)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}', "["])
def test_a_damaged_index(two: Path, content: str) -> None:
    (two / INDEX).write_text(content)
    assert INDEX in fault(two)


def test_one_tensor_in_two_files(two: Path) -> None:
    first, second = weight_files(two)
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value + 1}, second, metadata={"format": "pt"})
    assert f"{name} is in both" in fault(two)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_codes_in_place_of_weights(one: Path, dtype: torch.dtype) -> None:
    change_tensors(one, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].to(dtype)})
    assert "model.norm.weight (" in fault(one) and "a type that no weight has" in fault(one)


def test_quantised_weights_are_for_other_models_alone(one: Path) -> None:
    edit_json(one / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="quantization_config"):
        check_model(one, known_types())
    check_image_text_model(one)


def test_an_adapter_is_not_a_model(one: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/name"}
    (one / "adapter_config.json").write_text(json.dumps(adapter))  # transformers would load owner/name in its place
    assert "adapter_config.json" in fault(one) and "merge" in fault(one)
    alone = tmp_path / "adapter"
    alone.mkdir()
    shutil.copy(one / "adapter_config.json", alone)
    assert "holds an adapter" in fault(alone)


def test_weights_that_would_be_read_instead(one: Path) -> None:
    edit_json(one / "config.json", transformers_weights="other.safetensors")
    assert "transformers_weights" in fault(one)
    edit_json(one / "config.json", transformers_weights=None)
    shutil.copy(one / WEIGHTS, one / "shard-00000-model-00001-of-00001.safetensors")
    assert "shard-00000-model-00001-of-00001.safetensors" in fault(one)


def test_another_type_of_model(one: Path) -> None:
    edit_json(one / "config.json", model_type="llama")
    assert "'llama'" in fault(one) and "'qwen2_5_vl'" in fault(one)
    edit_json(one / "config.json", model_type="qwen2_vl")
    with pytest.raises(ModelError, match="'qwen2_vl'"):
        check_model(one, known_types())
    check_image_text_model(one)  # a family that the policy is compared with


def test_all_faults_are_told_at_once(two: Path) -> None:
    (two / SECOND).write_text(POINTER)
    for name in ("tokenizer.json", "vocab.json"):
        (two / name).unlink()
    (two / "preprocessor_config.json").write_text("{")
    message = fault(two)
    assert all(part in message for part in (SECOND, "the tokenizer is missing", "preprocessor_config.json"))


def test_a_folder_without_any_weights(tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match=r"model\.safetensors is missing$"):
        weight_files(tmp_path)
