"""Models of several families, as they are loaded, asked, and read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.model_families import find_model_family
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from lightning_modules.predictors.base import Decoding
from lightning_modules.predictors.huggingface import HuggingFacePredictor
from tests.conftest import QUESTIONS, random_png
from tests.image_text_models import internvl, llava_onevision, qwen2_vl, save_model

SAMPLE = Sample(
    "q/0", "test", "refer", ("a.png", "b.png"), (ImagePart(0), ImagePart(1), TextPart(QUESTIONS[1])),
    BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "ring"),
)  # fmt: skip


def load(sample: Sample) -> LoadedSample:
    if sample.id == "gone":
        raise SampleError(sample.id, "missing_image")
    return LoadedSample(
        sample, tuple(random_png(random.Random(k), size) for k, size in enumerate(((90, 60), (56, 84))))
    )


@pytest.mark.parametrize(
    ("build", "box_format"),
    [(qwen2_vl, BoxFormat.RELATIVE_1000), (internvl, BoxFormat.RELATIVE_1000), (llava_onevision, BoxFormat.NORMALIZED)],
    ids=["qwen2_vl", "internvl", "llava_onevision"],
)
def test_a_family_that_transformers_knows_answers(build, box_format: BoxFormat, tmp_path: Path) -> None:
    folder = save_model(build, tmp_path / "model")
    predictor = HuggingFacePredictor(str(folder), RequestForm(find_model_family(build.__name__, "")), Decoding(6))
    gone = Sample("gone", "test", "refer", SAMPLE.images, SAMPLE.messages, SAMPLE.answer)
    (first, answer), (_, refused), (_, again) = predictor.answers([SAMPLE, gone, SAMPLE], load)
    assert predictor.box_format == box_format and first is SAMPLE
    assert answer == again and 1 <= answer.num_tokens <= 6
    assert [sizes.original for sizes in answer.image_sizes] == [(90, 60), (56, 84)]
    assert refused.refused == "missing_image"


def test_pixels_that_the_processor_would_change_are_an_error(tiny_model_dir: Path) -> None:
    model_family = find_model_family("qwen2_5_vl", "")
    predictor = HuggingFacePredictor(str(tiny_model_dir), RequestForm(model_family, max_pixels=28_900), Decoding(2))
    ((_, answer),) = predictor.answers([SAMPLE], load)
    assert [sizes.resized for sizes in answer.image_sizes] == [(84, 56), (56, 84)]
    predictor.form = RequestForm(model_family, min_pixels=200_000)
    with pytest.raises(ValueError, match="min_pixels=200000"):
        list(predictor.answers([SAMPLE], load))


def test_code_that_comes_with_weights_is_not_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text()
    own = (
        '"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.M"}'
    )
    (tmp_path / "config.json").write_text(config.replace('"model_type": "qwen2_5_vl"', own, 1))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        HuggingFacePredictor(str(tmp_path), RequestForm(find_model_family("stated", "")))
