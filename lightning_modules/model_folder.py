"""Says what is wrong with a model path before anything is read from it."""

from __future__ import annotations

import json
from pathlib import Path

MODEL_TYPE = "qwen2_5_vl"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def check_model(path: str, need_weights: bool = True) -> None:
    """Raise ValueError that names `path` and what it lacks, unless it is a Qwen2.5-VL folder or Hub repository.

    Without `need_weights` a folder with only `config.json` will do (the meta device).
    """
    found = read_model_type(path)
    if found != MODEL_TYPE:
        raise ValueError(f"model: {path!r} has model_type {found!r}, not {MODEL_TYPE!r}")
    if need_weights:
        _check_files(path)


def check_image_text_model(path: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError unless `path` is a folder or Hub repository of any model that answers on images and text."""
    found = read_model_type(path, trust_remote_code)
    if not trust_remote_code:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        if found not in KNOWN:
            raise ValueError(
                f"model: {path!r} has model_type {found!r}, which transformers knows no image-text model of; its own"
                " code is run with trust_remote_code=true, or ask it behind a server: endpoint.base_url"
            )
    _check_files(path)


def read_model_type(path: str, trust_remote_code: bool = False) -> str:
    """The model_type in the config of a folder or Hub repository. Raises ValueError that names `path`."""
    folder = Path(path)
    if folder.is_dir():
        return _folder_model_type(folder, path)
    if folder.is_file() or folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ValueError(f"model: there is no folder {path!r}, and it is no Hub name ('owner/name') either")
    from transformers import AutoConfig  # a slow import, needed only for the Hub

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: {path!r} is no folder here, and its config could not be had from the Hub: {error}"
        ) from error


def _folder_model_type(folder: Path, path: str) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model: {path!r} is not a usable model folder: config.json is missing")
    try:
        return str(json.loads(config.read_text()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model: {path!r} is not a usable model folder: config.json is not a JSON object") from error


def _check_files(path: str) -> None:
    """Of a folder; what a Hub repository lacks is found when it is read."""
    folder = Path(path)
    if not folder.is_dir():
        return
    faults = []
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        only = f" (found only {', '.join(pickled)}: pickled weights are not read)" if pickled else ""
        faults.append(f"{WEIGHT_FILES[0]} is missing{only}")
    for what, names in (("the tokenizer", TOKENIZER_FILES), ("the image processor", PROCESSOR_FILES)):
        if not any((folder / name).is_file() for name in names):
            faults.append(f"{what} is missing ({' or '.join(names)})")
    if faults:
        raise ValueError(f"model: {path!r} is not a usable model folder: {'; '.join(faults)}")
