"""A model runs on its own weights or not at all, and loading it runs nothing."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.checkpoints import pretrained
from datamodules.checkpoints.model_folder import ModelError, local_folder
from datamodules.checkpoints.pretrained import check_policy, check_values, load_model, load_processor, not_finite
from lightning_modules.models.architectures.registry import known_types
from lightning_modules.models.qwen_vl import QwenVL
from tests.beside import SHARED
from tests.broken_models import break_at_random, change_tensors
from tests.published_model import published_folder

CASES = SHARED / "cases/inputs.py"
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "model", files=1)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "model")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path) -> str:
    """What loading the policy says; never more than five lines."""
    with pytest.raises(ModelError) as error:
        QwenVL(str(folder))
    message = str(error.value)
    assert str(folder) in message and len(message.splitlines()) <= 5 and len(message) < 1200, message
    return message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("files", [1, 2])
def test_whole_folders_are_loaded_with_all_their_weights(tied: bool, files: int, tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "model", tied, files)
    check_policy(folder, known_types())
    state = load_model(folder, torch.float32).state_dict()
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert torch.equal(state["model.language_model.norm.weight"], stored["model.norm.weight"])
    assert torch.equal(state["model.visual.merger.mlp.0.weight"], stored["visual.merger.mlp.0.weight"])
    head = stored["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(state["lm_head.weight"], head)


def test_missing_and_misnamed_tensors_are_named(copy: Path) -> None:
    change_tensors(copy, lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(UP)})
    message = refusal(copy)
    assert "1 tensor missing" in message and UP in message and "random" in message
    with pytest.raises(ModelError, match="1 tensor missing"):
        check_policy(copy, known_types())  # before anything is read
    with pytest.raises(ModelError, match="1 tensor missing"):
        load_model(copy, torch.float32, pretrained.ANY_ATTENTION)


def test_names_of_an_adapter_model_are_told_as_such(copy: Path) -> None:
    change_tensors(copy, lambda tensors: {f"base_model.model.{name}": value for name, value in tensors.items()})
    message = refusal(copy)
    assert "tensors missing" in message and "tensors unexpected" in message and "merge it" in message
    assert "base_model.model.model.embed_tokens.weight" in message and "more" in message


def test_a_tensor_that_the_configuration_has_no_place_for_is_named(copy: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(copy, lambda tensors: tensors | {name: torch.zeros(4, 64)})
    assert "1 tensor unexpected (model.language_model.layers.0.self_attn.q_proj.lora_A.weight)" in refusal(copy)
    edit_json(copy / "config.json", num_hidden_layers=1)  # a layer that would be left out in silence
    assert "tensors unexpected" in refusal(copy)


def test_other_shapes_are_told_with_both(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors | {"model.norm.weight": torch.ones(63)})
    assert "1 tensor of another shape (model.language_model.norm.weight [63] instead of [64])" in refusal(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(copy: Path, value: float) -> None:
    change_tensors(copy, lambda tensors: tensors | {"model.norm.weight": torch.full((64,), value)})
    assert "model.language_model.norm.weight are finite" in refusal(copy)
    with pytest.raises(ModelError, match=r"model\.norm\.weight are finite"):
        check_values(copy)


def test_a_finite_tensor_whose_sum_overflows_is_finite() -> None:
    large = torch.full((1000,), 60_000.0, dtype=torch.float16)
    spoilt = large.clone()
    spoilt[7] = float("nan")
    assert not large.sum().isfinite()
    assert not_finite([("large", large), ("whole", torch.ones(3)), ("ids", torch.arange(3))]) == []
    both = not_finite([("large", large), ("spoilt", spoilt), ("cancel", torch.tensor([float("inf"), -float("inf")]))])
    assert len(both) == 1 and "spoilt, cancel" in both[0]


def test_a_head_that_contradicts_tied_embeddings_is_refused_and_an_equal_one_is_not(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    load_model(copy, torch.float32)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings" in refusal(copy)


def test_the_shared_cases_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    if not CASES.is_file():
        pytest.skip("no ../shared/cases/inputs.py beside this repository")
    runpy.run_path(str(CASES))["broken_models"](tmp_path / "models", tiny_model_dir)
    messages = {folder.name: refusal(folder) for folder in sorted((tmp_path / "models").iterdir())}
    assert list(messages) == ["adapter_prefix", "half_file", "lfs_pointer", "missing_tensor"]
    assert UP in messages["missing_tensor"] and "base_model.model." in messages["adapter_prefix"]
    for name in ("lfs_pointer", "half_file"):
        assert "model.safetensors" in messages[name] and "\n" not in messages[name]
    assert "git lfs pull" in messages["lfs_pointer"] and "fetch it again" in messages["half_file"]


# What a program with a model of its own code would look like to whoever loads it.
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"


def test_a_processors_own_code_is_not_run_whatever_stdin_says(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "own.py").write_text(CODE.replace("Path(__file__)", f"Path({str(copy / 'own.py')!r})"))
    own_map = {"AutoProcessor": "own.Own", "AutoTokenizer": ["own.Own", None]}
    own = {"processor_class": "OwnProcessor", "auto_map": own_map}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        edit_json(copy / name, **own)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError) as error:
        load_processor(copy)
    assert len(str(error.value).splitlines()) == 1
    assert not (copy / "ran").exists()


def test_a_models_own_code_is_not_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "own.py").write_text(CODE)
    edit_json(copy / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_model(copy, torch.float32)  # transformers knows the type, so its own class is taken
    edit_json(copy / "config.json", model_type="of_its_own")
    with pytest.raises(ModelError, match="of_its_own"):
        load_model(copy, torch.float32)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("attention", [pretrained.ATTENTION, pretrained.ANY_ATTENTION])
@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_attention_is_never_what_the_configuration_names(
    copy: Path, field: str, attention: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("code was asked for from the Hub")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    config = json.loads((copy / "config.json").read_text())
    named = {field: "owner/kernel"}
    config |= named | {"vision_config": config["vision_config"] | named}
    (copy / "config.json").write_text(json.dumps(config))
    model = load_model(copy, torch.float32, attention)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {"sdpa"}
    with torch.device("meta"):
        skeleton = pretrained.skeleton(copy, torch.float32)
    assert skeleton.config._attn_implementation == "sdpa"


def test_a_processor_without_a_template_or_images_is_refused(copy: Path) -> None:
    (copy / "chat_template.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="chat_template"):
        load_processor(copy)


def test_errors_of_any_kind_are_one_line(copy: Path) -> None:
    edit_json(copy / "config.json", hidden_size="wide")
    assert "\n" not in refusal(copy)
    edit_json(copy / "config.json", hidden_size=64, num_attention_heads=0)
    assert "\n" not in refusal(copy)


def test_a_hub_name_is_its_files_here(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[str]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("owner/name", weights=False) == copy
    assert not any("safetensors" in pattern or ".py" in pattern for pattern in wanted[0])
    model = load_model("owner/name", torch.float32)
    assert model.name_or_path == "owner/name"  # what an adapter names as its base
    assert not any(pattern.endswith(".py") for patterns in wanted for pattern in patterns)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'owner/name'.*model\.safetensors is missing"):
        load_model("owner/name", torch.float32)

    def refused(*_: object, **__: object) -> str:
        raise OSError("no such repository\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(ModelError, match=r"'owner/name'.*no such repository$"):
        load_model("owner/name", torch.float32)


def sweep(model: Path, folder: Path, seeds: range) -> tuple[int, int]:
    """(refused, loaded) of so many broken folders; what loads must have the original's very weights."""
    original = load_model(model, torch.float32).state_dict()
    refused = loaded = 0
    for seed in seeds:
        how = break_at_random(model, folder / str(seed), seed)
        try:
            state = QwenVL(str(folder / str(seed))).base.state_dict()
            load_processor(folder / str(seed))
        except ModelError as error:
            assert len(str(error).splitlines()) <= 5 and len(str(error)) < 1200, (how, str(error))
            refused += 1
        else:
            assert state.keys() == original.keys(), how
            for name, value in state.items():  # a weight may be stored with fewer digits
                torch.testing.assert_close(value, original[name], rtol=1e-2, atol=1e-4, msg=f"{how}: {name}")
            loaded += 1
        shutil.rmtree(folder / str(seed))
    return refused, loaded


def test_no_broken_folder_runs_on_random_weights(published: Path, tmp_path: Path) -> None:
    refused, loaded = sweep(published, tmp_path, range(24))
    assert refused > 12 and refused + loaded == 24


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2])
def test_none_of_200_broken_folders_runs_on_random_weights(files: int, tmp_path: Path) -> None:
    model = published_folder(tmp_path / "model", files=files)
    refused, loaded = sweep(model, tmp_path, range(1000 * files, 1000 * files + 200))
    print(f"{refused} refused, {loaded} loaded with the original's weights")
    assert refused > 120 and refused + loaded == 200
