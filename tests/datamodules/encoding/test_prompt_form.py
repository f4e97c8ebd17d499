"""The form in which a trained model must be asked, in the model's own folder."""

import json
import shutil
from pathlib import Path

import pytest

from datamodules.checkpoints.model_folder import ModelError
from datamodules.encoding.encoder import Encoder
from datamodules.encoding.prompt_form import prompt_form_text, read_prompt_form
from experiments.evaluation.trained_form import trained_form

GIVEN = {"style": "think", "box_format": "absolute_pixels", "label_images": True, "max_resized_pixels": None}


def encoder(**settings) -> Encoder:
    fixed = {"max_prompt_tokens": 10, "max_completion_tokens": 10, "with_target": False}
    return Encoder("nowhere", **({"style": "think", "box_format": "absolute_pixels"} | fixed | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"style": "think", "box_format": "absolute_pixels", "label_images": True},
        {"style": "answer", "box_format": "relative_1000", "max_resized_pixels": 10_000},
        {"style": "official", "box_format": "normalized"},
        {"style": "think", "box_format": "absolute_pixels", "answer_form": "named_image"},
    ],
)
def test_what_an_encoder_writes_is_read_again_also_in_a_copy(tmp_path: Path, settings: dict) -> None:
    model = tmp_path / "merged"
    model.mkdir()
    (model / "prompt_form.json").write_text(prompt_form_text(encoder(**settings)))
    shutil.copytree(model, tmp_path / "my model")
    expected = {"label_images": False, "max_resized_pixels": None, "answer_form": "one_box"} | settings
    assert read_prompt_form(str(tmp_path / "my model")) == expected
    assert trained_form(str(tmp_path / "my model"), GIVEN | {"answer_form": "one_box"}) == expected


def test_a_file_without_an_answer_form_is_of_a_model_of_one_box(tmp_path: Path) -> None:
    (tmp_path / "prompt_form.json").write_text(json.dumps(GOOD))
    assert read_prompt_form(str(tmp_path)) == GIVEN | {"answer_form": "one_box"}


def test_a_model_of_another_making_has_no_form(tmp_path: Path) -> None:
    assert read_prompt_form(str(tmp_path)) is None
    assert trained_form(str(tmp_path), GIVEN) == {}


def test_the_models_own_file_counts_before_its_phase(tmp_path: Path, capsys) -> None:
    model = tmp_path / "merged"
    model.mkdir()
    (tmp_path / "config.yaml").write_text(json.dumps({"data": GIVEN | {"style": "answer"}}))
    assert trained_form(str(model), GIVEN)["style"] == "answer"
    assert "config.yaml has it" in capsys.readouterr().out
    (model / "prompt_form.json").write_text(prompt_form_text(encoder(style="plain", label_images=True)))
    assert trained_form(str(model), GIVEN)["style"] == "plain"
    assert "prompt_form.json has it, not think" in capsys.readouterr().out


GOOD = {"version": 1, **GIVEN}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "cannot be read"),
        ('{"version": 1,', "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"version": 1, "version": 1}', "given twice"),
        ("[1]", "expected an object, found list"),
        ("{}", "version=None is not 1"),
        (json.dumps(GOOD | {"version": 2}), "version=2 is not 1"),
        (json.dumps(GOOD | {"version": True}), "version=True is not 1"),
        (json.dumps(GOOD | {"style": "long"}), "style='long' must be one of think, answer, plain, official"),
        (json.dumps(GOOD | {"style": ["think"]}), "style=.'think'. must be one of"),
        (json.dumps(GOOD | {"box_format": "pixels"}), "box_format='pixels' must be one of absolute_pixels"),
        (json.dumps(GOOD | {"label_images": "yes"}), "label_images='yes' must be true or false"),
        (json.dumps(GOOD | {"max_resized_pixels": 0}), "max_resized_pixels=0 must be null or a number"),
        (json.dumps(GOOD | {"max_resized_pixels": True}), "max_resized_pixels=True must be null or a number"),
        (
            json.dumps(GOOD | {"answer_form": "two_boxes"}),
            "answer_form='two_boxes' must be one of one_box, named_image",
        ),
        (json.dumps(GOOD | {"sytle": "think"}), "'sytle' is no field of it"),
        (json.dumps({"version": 1, "style": "think"}), "box_format is missing.*label_images is missing"),
        (json.dumps(GOOD).replace("null", "NaN"), "NaN is not JSON"),
    ],
)
def test_a_damaged_or_wrongly_edited_file_is_named_in_one_line_with_the_cure(
    tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / "prompt_form.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=named) as caught:
        trained_form(str(tmp_path), GIVEN)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "prompt_form.json") in message and "copy the file again" in message
