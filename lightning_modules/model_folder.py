"""Says what is wrong with a model path before anything is read from it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

MODEL_TYPE = "qwen2_5_vl"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def check_model(path: str, need_weights: bool = True) -> None:
    """Raise ValueError that names `path` and what it lacks, unless it is a Qwen2.5-VL folder or Hub repository.

    Without `need_weights` a folder with only `config.json` will do (the meta device).
    """
    folder = Path(path)
    if folder.is_dir():
        faults = _folder_faults(folder, need_weights)
        if faults:
            raise ValueError(f"model: {path!r} is not a usable Qwen2.5-VL folder: {'; '.join(faults)}")
        return
    if folder.is_file() or folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ValueError(f"model: there is no folder {path!r}, and it is no Hub name ('owner/name') either")
    try:
        model_type = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: {path!r} is no folder here, and its config could not be had from the Hub: {error}"
        ) from error
    if model_type != MODEL_TYPE:
        raise ValueError(f"model: {path!r} has model_type {model_type!r}, not {MODEL_TYPE!r}")


def _folder_faults(folder: Path, need_weights: bool) -> list[str]:
    config = folder / "config.json"
    if not config.is_file():
        return ["config.json is missing"]
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError):
        return ["config.json is not a JSON object"]
    if model_type != MODEL_TYPE:
        return [f"model_type is {model_type!r}, not {MODEL_TYPE!r}"]
    if not need_weights:
        return []
    faults = []
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        only = f" (found only {', '.join(pickled)}: pickled weights are not read)" if pickled else ""
        faults.append(f"{WEIGHT_FILES[0]} is missing{only}")
    for what, names in (("the tokenizer", TOKENIZER_FILES), ("the image processor", PROCESSOR_FILES)):
        if not any((folder / name).is_file() for name in names):
            faults.append(f"{what} is missing ({' or '.join(names)})")
    return faults
