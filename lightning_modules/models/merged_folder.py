"""Write a merged model as a folder that every program can load that can load its source model.

Only the weights are new. Configuration, tokenizer, processor, template and generation settings are exact copies of the
source's files. Tensors and weight files have the same names as in the source. `save_pretrained` of a new release of
transformers would write another layout (nested configurations, renamed tensors), which older releases and other
programs cannot read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.checkpoints.model_folder import COMPANIONS, ModelError, local_folder
from datamodules.checkpoints.weight_files import INDEX, WEIGHTS, json_object, stored_tensors, weight_files
from datamodules.persistence.files import whole_folder
from lightning_modules.models.architectures.base import Architecture


def name_in_model(stored: str, names: Iterable[str], architecture: Architecture) -> str | None:
    """The name in transformers 5 (one of `names`) of the published tensor `stored`; None if there is none."""
    prefixes = architecture.published_prefixes
    candidates = (own + stored.removeprefix(published) for published, own in prefixes if stored.startswith(published))
    return next((name for name in candidates if name in names), None)


def check_names(source: str | Path, names: Iterable[str], architecture: Architecture) -> None:
    """Raise ModelError if a tensor in the source's files has no counterpart in the model. Call this before training."""
    for file in weight_files(local_folder(source)):
        for tensor in stored_tensors(file):
            if name_in_model(tensor.name, names, architecture) is None:
                raise ModelError(
                    f"model: {str(source)!r}: {tensor.name} in {file.name} is no published name of a tensor of"
                    f" {architecture.name}: load and save the model with transformers first"
                )


def write_merged(
    state: Mapping[str, Tensor],
    source: str | Path,
    folder: str | Path,
    architecture: Architecture,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a merged model; `folder` appears complete or not at all.

    Args:
        state: {name in the model: value}. Values keep the type that they are trained in.
        source: the folder or Hub repository that the model was loaded from. A tied head is written only if these files
            contain it.
        folder: the folder to write; an existing one is replaced.
        architecture: architecture of the model.
        texts: {file name: content} of further files.

    Raises:
        ModelError: a tensor of the source's files is not in `state`.
    """
    origin = local_folder(source)
    with whole_folder(folder) as unfinished:
        # Every file except the weights, byte for byte.
        for name in COMPANIONS:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, unfinished / name)
        for name, text in (texts or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        size = 0
        for file in weight_files(origin):
            tensors = _tensors_of(file, state, source, architecture)
            size += sum(tensor.nbytes for tensor in tensors.values())
            with safe_open(file, framework="pt") as stored:
                save_file(tensors, unfinished / file.name, metadata=stored.metadata() or {"format": "pt"})
        if not (origin / WEIGHTS).is_file():
            _write_index(origin / INDEX, unfinished / INDEX, size)


def _tensors_of(
    file: Path, state: Mapping[str, Tensor], source: str | Path, architecture: Architecture
) -> dict[str, Tensor]:
    """The new tensors of one weight file, under the names in that file."""
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for tensor in stored_tensors(file):
        name = name_in_model(tensor.name, state, architecture)
        if name is None:
            raise ModelError(f"model: {str(source)!r}: {tensor.name} in {file.name} was not there when it was loaded")
        value = state[name].detach().contiguous()
        # safetensors does not allow two names for one memory block (a tied head), so the second becomes a separate
        # tensor.
        tensors[tensor.name] = value.clone() if value.data_ptr() in written else value
        written.add(value.data_ptr())
    return tensors


def _write_index(source: Path, target: Path, size: int) -> None:
    """Copy the source's index, with a new total size if the tensors have another dtype now."""
    index = json_object(source)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size") in (None, size):
        shutil.copyfile(source, target)
        return
    target.write_text(json.dumps(index | {"metadata": metadata | {"total_size": size}}, indent=2) + "\n")
