"""The prompt form with which a model was trained here, for its evaluation in this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datamodules.checkpoints.model_folder import PROMPT_FORM
from datamodules.encoding.messages import PromptStyle
from datamodules.encoding.prompt_form import read_prompt_form
from datamodules.samples.boxes import BoxFormat
from experiments.runs.run_identity import CONFIG, OtherVersion, read_field


def trained_form(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `given` with their values from the model's training. Prints which values differ.

    They are read from prompt_form.json in the model's folder. A merged model of an earlier version has no such file;
    then they are read from the settings of its phase. {} for a model that was not trained here. So one YAML can
    evaluate the base model, answer-only SFT and models that think. Raises OtherVersion, and ModelError for a damaged
    prompt_form.json.
    """
    trained, source = read_prompt_form(model), f"{model}/{PROMPT_FORM}"
    if trained is None:
        trained, source = _form_of_phase(model, given), str(Path(model).parent / CONFIG)
    trained = {name: trained[name] for name in given if name in trained}
    for name, value in trained.items():
        if value != given[name]:
            print(
                f"{name}={value} as {source} has it, not {given[name]}; --form.as_trained=false puts questions as given"
            )
    return trained


def _form_of_phase(model: str, given: Iterable[str]) -> dict[str, Any]:
    """The fields `given` in the config.yaml of the phase that contains a merged model; {} if there is no such phase."""
    phase = Path(model).parent
    if Path(model).name != "merged" or not (phase / CONFIG).is_file():
        return {}
    # A phase of that version had one form of answers, and no setting for it.
    trained = {name: read_field(phase, f"data.{name}") for name in given if name != "answer_form"}
    for name, kind in (("box_format", BoxFormat), ("style", PromptStyle)):
        if name in trained and trained[name] not in list(kind):
            raise OtherVersion(phase, f"data.{name}={trained[name]!r} is none of {[str(k.value) for k in kind]}")
    return trained
