"""Find the files of a model, and check them before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.checkpoints.weight_files import BrokenFile, json_object, pointer_fault, weight_faults
from datamodules.persistence.message_text import first_line
from datamodules.persistence.user_error import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
PROMPT_FORM = "prompt_form.json"  # written for a model trained here (encoding/prompt_form.py); merging writes a new one
# The files beside the weights that transformers 4 and 5 need to load, prompt and decode a model.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    *PROCESSOR_FILES,
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "LICENSE",
)


class ModelError(UserError, ValueError):
    """The model cannot be used. The message names the model, its problems and the fix."""


OWN_FOLDERS = ("outputs/", "models/", "data/")  # folders of this project, and not owners on the Hub


def local_folder(path: str | Path, weights: bool = True, code: bool = False) -> Path:
    """The folder of a model: `path` itself, or the local copy of the Hub repository with that name.

    A repository is downloaded once. `weights` and `code` say whether its safetensors and its Python files are needed
    too. Raises ModelError if neither a folder nor a repository exists.
    """
    path = str(path)
    check_name(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download  # a slow import, needed only for the Hub

    wanted = [*COMPANIONS, ADAPTER, PROMPT_FORM]
    wanted += ["*.safetensors", "*.safetensors.index.json"] if weights else []
    wanted += ["*.py"] if code else []
    try:
        # Files in subfolders, and files named consolidated, are other copies of the same weights.
        skipped = ["*/*", "consolidated*"]
        return Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=skipped))
    except Exception as error:  # many types: network errors, refusals by the Hub, disk errors
        raise ModelError(
            f"model: {path!r} is no folder here, and could not be had from the Hub: {first_line(error)}"
        ) from error


def check_name(path: str) -> None:
    """Raise ModelError if a model is neither a folder nor, by the form of its name, a repository on the Hub."""
    folder = Path(path)
    if folder.is_dir():
        return
    if folder.is_file() or folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError(f"model: there is no folder {path!r}, and it is no Hub name ('owner/name') either")
    # A folder of this project may still be absent, as in a fresh clone. The message is the same with it and without it.
    if folder.parent.is_dir() or path.startswith(OWN_FOLDERS):
        beside = [each.name for each in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        make = "name another, or make it, as by `make pipeline`"
        cure = f"did you mean {str(folder.parent / near[0])!r}?" if near else make
        raise ModelError(f"model: there is no folder {path!r}; {cure}")


def check_model(path: str | Path, known_types: Mapping[str, str], need_weights: bool = True) -> None:
    """Check the files of a model before training, without reading weights.

    Args:
        path: a folder or a Hub repository.
        known_types: the families that can be trained: model_type in config.json -> name of the family.
        need_weights: if False, a folder with only `config.json` is accepted (for the meta device).

    Raises:
        ModelError: `path` is not a complete model of one of these families. The message names `path` and all problems.
    """
    folder = local_folder(path, need_weights)
    config = _config(folder, path)
    if config.get("model_type") not in known_types:
        raise ModelError(
            f"model: {str(path)!r} has model_type {config.get('model_type')!r} in its config.json, not"
            f" {' or '.join(map(repr, known_types))}: give a {' or a '.join(known_types.values())}"
        )
    if need_weights:
        codes = [f"{CONFIG} has a quantization_config: give the plain weights"] if _is_quantised(config) else []
        _raise(path, codes + _file_faults(folder, config))


def check_image_text_model(path: str | Path, trust_remote_code: bool = False) -> None:
    """Raise ModelError unless `path` is a complete image-text model of any family."""
    folder = local_folder(path, code=trust_remote_code)
    config = _config(folder, path)
    if not trust_remote_code:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        if config.get("model_type") not in KNOWN:
            raise ModelError(
                f"model: {str(path)!r} has model_type {config.get('model_type')!r}, which transformers knows no"
                " image-text model of; its own code is run with trust_remote_code=true, or ask it behind a server:"
                " endpoint.base_url"
            )
    _raise(path, _file_faults(folder, config))


def check_processor(path: str | Path, code: bool = False) -> Path:
    """The folder of the model, after checking its tokenizer and image processor. Raises ModelError."""
    folder = local_folder(path, weights=False, code=code)
    _raise(path, _companion_faults(folder))
    return folder


def read_model_type(path: str | Path) -> str:
    """The model_type in the configuration of a folder or Hub repository. Raises ModelError that names `path`."""
    return str(_config(local_folder(path, weights=False), path).get("model_type"))


def _config(folder: Path, path: str | Path) -> dict[str, Any]:
    """The content of config.json. Raises ModelError for a folder with only an adapter."""
    if (folder / ADAPTER).is_file():
        # transformers would load the base model that the adapter names, from any location, and add the adapter to it.
        _raise(path, [f"it holds an adapter ({ADAPTER}), not a whole model: merge it into its base, or give the base"])
    if not (folder / CONFIG).is_file():
        _raise(path, [f"{CONFIG} is missing"])
    try:
        return json_object(folder / CONFIG)
    except BrokenFile as error:
        _raise(path, [str(error)])


def _is_quantised(config: dict[str, Any]) -> bool:
    return config.get("quantization_config") is not None


def _file_faults(folder: Path, config: dict[str, Any]) -> list[str]:
    faults = weight_faults(folder, _is_quantised(config))
    if "transformers_weights" in config:
        faults.append(f"{CONFIG} names a weight file of its own (transformers_weights): remove that entry")
    return faults + _companion_faults(folder)


def _companion_faults(folder: Path) -> list[str]:
    """Problems in the files beside the weights.

    They are checked here because some loaders silently replace a damaged file by defaults.
    """
    faults = []
    for what, names in (("the tokenizer", TOKENIZER_FILES), ("the image processor", PROCESSOR_FILES)):
        if not any((folder / name).is_file() for name in names):
            faults.append(f"{what} is missing ({' or '.join(names)})")
    for file in (folder / name for name in COMPANIONS):
        if not file.is_file():
            continue
        if file.suffix == ".json":
            try:
                json_object(file)
            except BrokenFile as error:
                faults.append(str(error))
        elif fault := pointer_fault(file):
            faults.append(fault)
    return faults


def _raise(path: str | Path, faults: list[str]) -> None:
    if faults:
        raise ModelError(f"model: {str(path)!r} is not a usable model folder: {'; '.join(faults)}")
