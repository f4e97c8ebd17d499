"""What is sent to a server: parts in order, images in the size that the answer's numbers refer to."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import replace

import pytest
from PIL import Image

from datamodules.encoding.chat_request import RequestForm, build_request
from datamodules.encoding.messages import CHOICE_SUFFIX, THINK_SUFFIX
from datamodules.encoding.model_families import MODEL_FAMILIES, ModelFamily, find_model_family
from datamodules.samples.boxes import BoxFormat, fit_size
from datamodules.samples.sample import (
    BoxAnswer,
    BoxPart,
    ChoiceAnswer,
    ImagePart,
    LoadedSample,
    Sample,
    SampleError,
    TextPart,
)
from tests.conftest import random_png

SIZES = ((640, 480), (90, 60))
SAMPLE = Sample(
    id="s",
    source="test",
    task="multi_view",
    images=("a.png", "b.png"),
    messages=(
        ImagePart(0),
        TextPart("This thing: "),
        BoxPart(0, (0.25, 0.5, 0.75, 0.9), "as written"),
        ImagePart(1),
        TextPart("Where is it? "),
    ),
    answer=BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "thing"),
)


@pytest.fixture
def loaded() -> LoadedSample:
    return LoadedSample(SAMPLE, tuple(random_png(random.Random(k), size) for k, size in enumerate(SIZES)))


def sent_image(part: dict) -> Image.Image:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pixels_of_prompt_and_answer_are_those_of_the_image_as_sent(loaded: LoadedSample) -> None:
    form = RequestForm(find_model_family("qwen2_5_vl", ""), "think", "Picture {}: ", max_pixels=100_000)
    request = build_request(loaded, form)
    (turn,) = request.messages
    kinds = [part["text"] if part["type"] == "text" else part["type"] for part in turn["content"]]
    width, height = request.image_sizes[0].resized
    box = f"[{round(width / 4)}, {round(height / 2)}, {round(width * 0.75)}, {round(height * 0.9)}]"
    assert kinds == [
        "Picture 1: ", "image_url", f"This thing: {box}", "Picture 2: ", "image_url", "Where is it?" + THINK_SUFFIX
    ]  # fmt: skip
    images = [sent_image(part) for part in turn["content"] if part["type"] == "image_url"]
    assert [image.size for image in images] == [sizes.resized for sizes in request.image_sizes]
    assert [sizes.original for sizes in request.image_sizes] == list(SIZES)
    for image in images:
        assert image.width % 28 == image.height % 28 == 0 and 3136 <= image.width * image.height <= 100_000


def test_an_image_of_the_right_size_arrives_pixel_for_pixel() -> None:
    data = random_png(random.Random(0), (84, 56))
    sample = replace(SAMPLE, images=("a.png",), messages=SAMPLE.messages[:3], answer=BoxAnswer(0, (0, 0, 1, 1), "x"))
    request = build_request(LoadedSample(sample, (data,)), RequestForm(find_model_family("qwen2_5_vl", "")))
    assert sent_image(request.messages[0]["content"][0]).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("size", [(1600, 32), (1036, 28), (3000, 20), (84, 56), (5, 5)])
def test_the_server_will_not_resize_what_is_sent(size: tuple[int, int]) -> None:
    sample = replace(SAMPLE, images=("a.png",), messages=SAMPLE.messages[:2], answer=BoxAnswer(0, (0, 0, 1, 1), "x"))
    form = RequestForm(find_model_family("qwen2_5_vl", ""), max_pixels=10_000)
    request = build_request(LoadedSample(sample, (random_png(random.Random(0), size),)), form)
    sent = sent_image(request.messages[0]["content"][0]).size
    assert fit_size(sent, 28, form.min_pixels, form.max_pixels) == sent == request.image_sizes[0].resized


@pytest.mark.parametrize("model_family", MODEL_FAMILIES, ids=lambda model_family: model_family.name)
def test_every_dialect_asks_in_its_own_words(model_family, loaded: LoadedSample) -> None:
    request = build_request(loaded, RequestForm(model_family))
    text = "".join(part.get("text", "") for part in request.messages[0]["content"])
    assert text.endswith(model_family.suffix)
    asked = model_family.question_box.format(
        *request.image_sizes[0].to_model((0.25, 0.5, 0.75, 0.9), model_family.box_format)
    )
    assert asked in text and "as written" not in text
    if model_family.box_format != BoxFormat.ABSOLUTE_PIXELS:
        assert [sizes.resized for sizes in request.image_sizes] == list(SIZES)


def test_a_question_with_options_asks_for_a_letter_and_not_for_a_box(loaded: LoadedSample) -> None:
    choosing = replace(loaded, sample=replace(SAMPLE, answer=ChoiceAnswer("A", ("left", "right"))))
    content = build_request(choosing, RequestForm(find_model_family("internvl", ""))).messages[0]["content"]
    assert content[-1]["text"].endswith("Where is it?" + CHOICE_SUFFIX)


def test_images_are_labelled_in_the_dialects_way(loaded: LoadedSample) -> None:
    content = build_request(loaded, RequestForm(find_model_family("internvl", ""))).messages[0]["content"]
    assert [content[k].get("text") for k in (0, 1, 2)] == ["Image-1: ", None, "\n"]
    assert content[4]["text"] == "Image-2: "


def test_a_damaged_or_extreme_image_is_a_counted_rejection(loaded: LoadedSample) -> None:
    form = RequestForm(find_model_family("stated", ""), "plain")
    for data, rule in (
        (b"no image", "unreadable_image"),
        (random_png(random.Random(0), (402, 2)), "extreme_aspect_ratio"),
    ):
        with pytest.raises(SampleError) as caught:
            build_request(replace(loaded, images=(loaded.images[0], data)), form)
        assert (caught.value.sample_id, caught.value.rule) == ("s", rule)


def test_pixels_of_a_question_are_bounded(loaded: LoadedSample) -> None:
    pixels = 640 * 480 + 90 * 60
    model_family = find_model_family("stated", "")
    assert build_request(loaded, RequestForm(model_family, max_sample_pixels=pixels)).messages
    with pytest.raises(SampleError, match="too_many_pixels"):
        build_request(loaded, RequestForm(model_family, max_sample_pixels=pixels - 1))


def test_a_question_without_one_of_its_images_is_a_counted_rejection(loaded: LoadedSample) -> None:
    with pytest.raises(SampleError, match="missing_image"):
        build_request(replace(loaded, images=loaded.images[:1]), RequestForm(find_model_family("stated", "")))


@pytest.mark.parametrize("wrong", [{"style": "official"}, {"min_pixels": 0}, {"max_pixels": 10}])
def test_wrong_forms_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RequestForm(find_model_family("stated", ""), **wrong)


@pytest.mark.parametrize("model_family", MODEL_FAMILIES, ids=lambda model_family: model_family.name)
def test_a_question_with_options_is_not_asked_for_a_box(loaded: LoadedSample, model_family: ModelFamily) -> None:
    sample = replace(loaded.sample, answer=ChoiceAnswer("A", ("x", "y")))
    request = build_request(replace(loaded, sample=sample), RequestForm(model_family))
    assert request.messages[0]["content"][-1]["text"].endswith("Where is it?" + CHOICE_SUFFIX)
