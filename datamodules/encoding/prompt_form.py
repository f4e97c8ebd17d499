"""The prompt format of a trained model: a small file in its folder, which is copied with the model.

    <model>/prompt_form.json
    {"version": 1, "style": "think", "box_format": "absolute_pixels", "label_images": true, "max_resized_pixels": null,
     "answer_form": "one_box"}

If the prompts differ from those in training, the model answers worse, or its boxes are read wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.checkpoints.model_folder import PROMPT_FORM, ModelError, local_folder
from datamodules.encoding.messages import PromptStyle
from datamodules.persistence.strict_json import parse_strictly
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat

if TYPE_CHECKING:  # both modules import torch
    from datamodules.encoding.chat_request import RequestForm
    from datamodules.encoding.encoder import Encoder

VERSION = 1
LABEL = "Picture {}: "  # before each image, if the phase had label_images; Qwen's chat template writes the same
CURE = "copy the file again from the folder that training wrote, or remove it and say the form yourself"
# For each field: a check of its value, and a description of the allowed values.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "style": (lambda v: v in list(PromptStyle), f"one of {', '.join(PromptStyle)}"),
    "box_format": (lambda v: v in list(BoxFormat), f"one of {', '.join(BoxFormat)}"),
    "label_images": (lambda v: isinstance(v, bool), "true or false"),
    "max_resized_pixels": (lambda v: v is None or (type(v) is int and v > 0), "null or a number of pixels above 0"),
    "answer_form": (lambda v: v in list(AnswerForm), f"one of {', '.join(AnswerForm)}"),
}
_ADDED = {"answer_form": AnswerForm.ONE_BOX}  # fields that files of earlier versions lack, and what these files mean


def prompt_form_text(encoder: Encoder) -> str:
    """The content of the file, for a model that was trained with this encoder."""
    form = {name: getattr(encoder, name) for name in _FIELDS}
    return json.dumps({"version": VERSION, **form}, indent=2) + "\n"


def read_prompt_form(model: str) -> dict[str, Any] | None:
    """The fields of the form ("style", "box_format", …) of a model; None if its folder has no such file.

    Args:
        model: folder or Hub name.

    Raises ModelError, in one line, for a file that is damaged or of another version.
    """
    folder = Path(model)
    if not (folder.is_dir() or folder.is_absolute()):
        folder = local_folder(model, weights=False)
    path = folder / PROMPT_FORM
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = parse_strictly(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model: {path} cannot be read: {error}; {CURE}") from error
    if problems := _problems(found):
        raise ModelError(f"model: {path}: {'; '.join(problems)}; {CURE}")
    return {name: (_ADDED | found)[name] for name in _FIELDS}


def form_as_trained(form: RequestForm, trained: Mapping[str, Any], model: str, flag: str) -> RequestForm:
    """The form of requests to a server, with style, box format, labels, largest image and answer form of the training.

    Prints each value that differs from the given one.

    Args:
        form: the form from the settings; its model family is Qwen2.5-VL.
        trained: the result of `read_prompt_form`.
        model: folder of the model, for messages.
        flag: flag of the command that keeps the given values; it is named in the message.
    """
    family = replace(form.model_family, box_format=BoxFormat(trained["box_format"]))
    values = {
        "style": trained["style"],
        "before_image": LABEL if trained["label_images"] else family.before_image,
        "max_pixels": trained["max_resized_pixels"] or form.max_pixels,
        "answer_form": trained["answer_form"],
    }
    for name, value in values.items():
        given = getattr(form, name)
        if value != (family.before_image if given is None else given):
            print(f"{name}={value!r} as {model}/{PROMPT_FORM} has it, not {given!r}; {flag}=false takes yours")
    return replace(form, model_family=family, **values)


def _problems(found: Any) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"expected an object, found {type(found).__name__}"]
    if found.get("version") != VERSION or isinstance(found["version"], bool):
        return [f"version={found.get('version')!r:.40} is not {VERSION}: another version of the project wrote it"]
    problems = [f"{name[:40]!r} is no field of it" for name in found if name not in {"version", *_FIELDS}]
    for name, (is_valid, rule) in _FIELDS.items():
        if name not in _ADDED | found:
            problems.append(f"the field {name} is missing")
        elif name in found and not is_valid(found[name]):
            problems.append(f"{name}={found[name]!r:.40} must be {rule}")
    return problems
