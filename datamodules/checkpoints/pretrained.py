"""The only place that loads published files: models, configurations, processors and tokenizers.

Every call of `from_pretrained` and `from_config` in the project is here, so the same rules hold for the policy, the
models it is compared with, a teacher, and speed measurements:

- All weights of a model must come from its files. A tensor that is missing, unexpected, not finite or of another shape
  is an error that names it. transformers alone would continue with random numbers.
- Loading runs only code of installed packages. `trust_remote_code` is False unless the user sets it (without a value,
  transformers asks in the terminal). Only safetensors files are read. The attention implementation does not come from
  the model's configuration, which may name code on the Hub.
- Every exception of the libraries becomes a `ModelError` of a few lines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.checkpoints.model_folder import (
    ModelError,
    check_image_text_model,
    check_model,
    check_processor,
    local_folder,
)
from datamodules.checkpoints.weight_files import weight_files
from datamodules.persistence.message_text import first_line, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = "sdpa"
# For any family: transformers chooses for each part of the model scaled_dot_product_attention if it is available, or
# else eager. None still overrides the value in config.json.
ANY_ATTENTION = None


def load_model(
    path: str | Path, dtype: torch.dtype, attention: str | None = ATTENTION, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an image-text model on the CPU. All its weights come from its files.

    Args:
        path: a folder or a Hub repository.
        dtype: data type of the weights.
        attention: transformers' name of an attention implementation, or ANY_ATTENTION.
        trust_remote_code: run the code that comes with the model.

    Raises ModelError that names `path` and its problems.
    """
    check_image_text_model(path, trust_remote_code)
    model = _fill(path, dtype, attention, trust_remote_code)
    tensors = (*model.named_parameters(), *model.named_buffers())
    if faults := [*_head_faults(model), *not_finite(tensors)]:
        raise ModelError(f"model: {str(path)!r}: {'; '.join(faults)}")
    model.name_or_path = model.config.name_or_path = str(path)  # the Hub name, not the folder of the local copy
    return model


def check_policy(path: str | Path, known_types: Mapping[str, str]) -> None:
    """Raise ModelError unless `path` is a model of a family in `known_types` with complete files, the right tensors and
    a processor (see `check_model`). This takes seconds, because no weights are read.
    """
    check_model(path, known_types)
    check_tensors(path)
    load_processor(path)


def check_tensors(path: str | Path, attention: str | None = ATTENTION) -> None:
    """Raise ModelError unless every tensor of the model is in its files, in the right shape.

    This is `load_model` on the meta device. Check the files first (`check_model`, `check_image_text_model`).
    """
    _fill(path, torch.float32, attention, False, device_map={"": "meta"})


def check_values(path: str | Path) -> None:
    """Raise ModelError if a weight is not finite. Reads every value once, one file after the other."""
    from safetensors import safe_open

    for file in weight_files(local_folder(path)):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            if faults := not_finite((name, tensors.get_tensor(name)) for name in names):
                raise ModelError(f"model: {str(path)!r}: {'; '.join(faults)}")


def skeleton(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `config.json` describes, with random weights on the default device (none on the meta device)."""
    from transformers import AutoModelForImageTextToText

    return _loaded(
        path,
        AutoModelForImageTextToText.from_config,
        load_config(path),
        dtype=dtype,
        attn_implementation=ATTENTION,
        trust_remote_code=False,
    )


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this configuration with random weights from torch's global random state."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(config, attn_implementation=ATTENTION, trust_remote_code=False)


def load_config(
    path: str | Path, attention: str | None = ATTENTION, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a folder or Hub repository, with this attention implementation. Raises ModelError."""
    from transformers import AutoConfig

    folder = local_folder(path, weights=False, code=trust_remote_code)
    config = _loaded(path, AutoConfig.from_pretrained, folder, trust_remote_code=trust_remote_code)
    # An argument is not enough: transformers reads `_attn_implementation` in config.json later, and it may name code on
    # the Hub.
    config._attn_implementation = attention
    return config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub repository. Raises ModelError."""
    from transformers import AutoTokenizer

    folder = local_folder(path, weights=False)
    return _loaded(path, AutoTokenizer.from_pretrained, folder, trust_remote_code=False)


def load_processor(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor (tokenizer, image processor and chat template) of a folder or Hub repository. Raises ModelError."""
    from transformers import AutoProcessor

    folder = check_processor(path, code=trust_remote_code)
    processor = _loaded(path, AutoProcessor.from_pretrained, folder, trust_remote_code=trust_remote_code)
    lacking = [name for name in ("image_processor", "chat_template") if getattr(processor, name, None) is None]
    if lacking:
        names = " and no ".join(lacking)
        raise ModelError(f"model: {str(path)!r}: its {type(processor).__name__} has no {names}: fetch its files again")
    return processor


def not_finite(tensors: Any) -> list[str]:
    """A list with one message that names all tensors with non-finite values; [] if there is no such tensor.

    `tensors`: pairs of name and tensor. A sum is finite only if every term is finite, and it costs one pass over memory
    (0.1 s for a billion bfloat16 values on two cores). `isfinite` is a hundred times slower. Finite values may overflow
    the sum, so each value is checked if the sum is not finite.
    """
    bad = [name for name, tensor in tensors if not _is_finite(tensor)]
    return [f"not all values of {listed(bad)} are finite numbers: fetch the weights again"] if bad else []


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _fill(
    path: str | Path, dtype: torch.dtype, attention: str | None, trust_remote_code: bool, **more: Any
) -> PreTrainedModel:
    """Load a model and check that every tensor comes from the files of `path`. Raises ModelError."""
    from transformers import AutoModelForImageTextToText

    config = load_config(path, attention, trust_remote_code)
    with _without_report():
        model, found = _loaded(
            path,
            AutoModelForImageTextToText.from_pretrained,
            local_folder(path, code=trust_remote_code),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are returned as a list, which raises an error below
            output_loading_info=True,
            **more,
        )
    if faults := _tensor_faults(found):
        raise ModelError(
            f"model: {str(path)!r}: its weight files do not fit its config.json: {'; '.join(faults)}."
            f" Nothing runs on random weights; {_cure(found)}"
        )
    return model


def _tensor_faults(found: dict[str, Any]) -> list[str]:
    """Messages from transformers' list of tensors that were not loaded.

    That list does not contain tied tensors, nor tensors that the model's class ignores.
    """
    shapes = [f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in found["mismatched_keys"]]
    kinds = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(shapes),
    }
    faults = [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} {kind} ({listed(names)})"
        for kind, names in kinds.items()
        if names
    ]
    return faults + [str(message) for message in found.get("error_msgs") or ()]


def _cure(found: dict[str, Any]) -> str:
    if any(name.startswith("base_model.model.") or ".lora_" in name for name in found["unexpected_keys"]):
        return "these were saved with an adapter around the model: merge it, then save the model itself"
    return "fetch the folder again, or give these weights the configuration that they were made with"


def _head_faults(model: PreTrainedModel) -> list[str]:
    """A message if the two versions of transformers differ: 4 ties the head if config.json says so, 5 keeps a separate
    head.
    """
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False) and isinstance(model._tied_weights_keys, dict)
    if not tied or outside is None or "lm_head.weight" not in model._tied_weights_keys:
        return []
    if outside.weight is inside.weight or outside.weight.data_ptr() == inside.weight.data_ptr():
        return []
    return [
        "config.json says tie_word_embeddings=true, but lm_head.weight is not the token embeddings: correct"
        " config.json, or remove the tensor"
    ]


def _loaded(path: str | Path, load: Callable[..., Any], source: Any, **options: Any) -> Any:
    """Call `load(source, **options)`. Every exception becomes a ModelError of one line."""
    try:
        return load(str(source) if isinstance(source, Path) else source, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files lead to nearly every type of exception
        raise ModelError(f"model: {str(path)!r} cannot be loaded: {first_line(error)}") from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of missing tensors, because the error contains it, and its progress bar, because
    every rank would show it.
    """
    from transformers.utils import logging as progress

    logger = logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    logger.addFilter(keeps)
    try:
        yield
    finally:
        if shown:
            progress.enable_progress_bar()
        logger.removeFilter(keeps)
