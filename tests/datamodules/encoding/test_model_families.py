"""Families of models: which one a name belongs to, and that each reads back what it writes."""

from __future__ import annotations

import pytest

from datamodules.encoding.model_families import MODEL_FAMILIES, find_model_family
from datamodules.samples.answer_text import parse_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes, iou

# A model's own way to write the box (0.25, 0.5, 0.75, 0.9) of a 640x480 image that it sees in 644x476.
WRITTEN = {
    "qwen2_5_vl": '```json\n[{"bbox_2d": [161, 238, 483, 428], "label": "cat"}]\n```',
    "qwen3_vl": '```json\n[{"bbox_2d": [250, 500, 750, 900], "label": "cat"}]\n```',
    "migician": "It's in the second image. <|box_start|>(250,500),(750,900)<|box_end|>",
    "qwen2_vl": "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(250,500),(750,900)<|box_end|>",
    "internvl": "<ref>cat</ref><box>[[250, 500, 750, 900]]</box>",
    "minicpm_v": "<ref>cat</ref><box>250 500 750 900</box>",
    "llava_onevision": "[0.25, 0.5, 0.75, 0.9]",
    "mplug_owl3": "<box>[0.25, 0.5, 0.75, 0.9]</box>",
    "mantis": "The box is [0.25, 0.50, 0.75, 0.90].",
    "gpt_4o": "[0.25, 0.5, 0.75, 0.9]",
    "stated": "[0.25, 0.5, 0.75, 0.9]",
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl"),
        ("/models/qwen2_5-vl-7b", "qwen2_5_vl"),
        ("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl"),
        ("Michael4933/Migician", "migician"),
        ("OpenGVLab/InternVL2-8B", "internvl"),
        ("OpenGVLab/InternVL3-8B-hf", "internvl"),
        ("openbmb/MiniCPM-V-2_6", "minicpm_v"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision"),
        ("llava_onevision", "llava_onevision"),
        ("mPLUG/mPLUG-Owl3-7B-240728", "mplug_owl3"),
        ("TIGER-Lab/Mantis-8B-Idefics2", "mantis"),
        ("gpt-4o-2024-08-06", "gpt_4o"),
        ("meta-llama/Llama-3.2-11B-Vision", None),
    ],
)
def test_a_family_is_found_by_name_or_must_be_given(model: str, name: str | None) -> None:
    if name is not None:
        assert find_model_family("auto", model).name == name
        return
    with pytest.raises(ValueError, match="set model family to one of qwen2_5_vl"):
        find_model_family("auto", model)
    assert find_model_family("stated", model).box_format == BoxFormat.NORMALIZED


def test_an_earlier_name_that_is_known_decides() -> None:
    assert find_model_family("auto", "llava_onevision", "distilled-from-qwen2.5-vl").name == "llava_onevision"
    assert find_model_family("auto", "idefics2", "TIGER-Lab/Mantis-8B-Idefics2").name == "mantis"


def test_an_unknown_dialect_is_named() -> None:
    with pytest.raises(ValueError, match="model_family='klingon'"):
        find_model_family("klingon", "Qwen/Qwen2.5-VL-7B-Instruct")


@pytest.mark.parametrize("model_family", MODEL_FAMILIES, ids=lambda model_family: model_family.name)
def test_each_family_is_read_in_its_own_scale(model_family) -> None:
    box = (0.25, 0.5, 0.75, 0.9)
    sizes = ImageSizes((640, 480), (644, 476))
    values = parse_answer(WRITTEN[model_family.name], lenient=True).boxes[0].values
    assert iou(sizes.to_unit(values, model_family.box_format), box) > 0.98
    # A box in a question is written in that scale too.
    asked = model_family.question_box.format(*sizes.to_model(box, model_family.box_format))
    assert iou(sizes.to_unit(parse_answer(asked, lenient=True).boxes[0].values, model_family.box_format), box) > 0.98


def test_names_are_unique_and_only_pixels_need_a_factor() -> None:
    assert len({model_family.name for model_family in MODEL_FAMILIES}) == len(MODEL_FAMILIES) == len(WRITTEN)
    assert {
        model_family.name for model_family in MODEL_FAMILIES if model_family.box_format == BoxFormat.ABSOLUTE_PIXELS
    } == {"qwen2_5_vl"}
    assert all(model_family.source and model_family.suffix for model_family in MODEL_FAMILIES)
