"""Models of several families, as they are loaded, asked, and read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.model_families import find_dialect
from datamodules.samples.boxes import Convention
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from lightning_modules.predictors.huggingface import ImageTextAnswerer
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
    ("build", "convention"),
    [(qwen2_vl, Convention.PER_MILLE), (internvl, Convention.PER_MILLE), (llava_onevision, Convention.UNIT)],
    ids=["qwen2_vl", "internvl", "llava_onevision"],
)
def test_a_family_that_transformers_knows_answers(build, convention: Convention, tmp_path: Path) -> None:
    folder = save_model(build, tmp_path / "model")
    answerer = ImageTextAnswerer(str(folder), RequestForm(find_dialect(build.__name__, "")), max_tokens=6)
    gone = Sample("gone", "test", "refer", SAMPLE.images, SAMPLE.messages, SAMPLE.answer)
    (first, answer), (_, refused), (_, again) = answerer.answers([SAMPLE, gone, SAMPLE], load)
    assert answerer.convention == convention and first is SAMPLE
    assert answer == again and 1 <= answer.num_tokens <= 6
    assert [geometry.original for geometry in answer.geometries] == [(90, 60), (56, 84)]
    assert refused.refused == "missing_image"


def test_pixels_that_the_processor_would_change_are_an_error(tiny_model_dir: Path) -> None:
    dialect = find_dialect("qwen2_5_vl", "")
    answerer = ImageTextAnswerer(str(tiny_model_dir), RequestForm(dialect, max_pixels=28_900), max_tokens=2)
    ((_, answer),) = answerer.answers([SAMPLE], load)
    assert [geometry.processed for geometry in answer.geometries] == [(84, 56), (56, 84)]
    answerer.form = RequestForm(dialect, min_pixels=200_000)
    with pytest.raises(ValueError, match="min_pixels=200000"):
        list(answerer.answers([SAMPLE], load))


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
        ImageTextAnswerer(str(tmp_path), RequestForm(find_dialect("stated", "")))
