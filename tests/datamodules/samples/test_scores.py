"""The score of one text, which reward and MIG-Bench share. What its parts earn: tests of rewards and mig_scoring."""

from __future__ import annotations

import pytest

from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer
from datamodules.samples.scores import TextScore, score_text

IMAGE_SIZES = [ImageSizes((100, 100), (112, 56)), ImageSizes((640, 480), (640, 480))]
TRUTH = BoxAnswer(image=1, box=(0.0, 0.0, 0.5, 0.5), label="cup")


def test_the_first_box_is_read_in_the_answers_own_image() -> None:
    text = render_answer([160, 0, 320, 240], "cup", "t")  # the right half of the true box
    assert score_text(text, TRUTH, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS) == TextScore(
        (0.25, 0, 0.5, 0.5), 0.5, True, None
    )
    two = '[{"bbox_2d": [160, 0, 320, 240]}, {"bbox_2d": [0, 0, 320, 240]}]'
    assert score_text(two, TRUTH, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS) == TextScore(
        (0.25, 0, 0.5, 0.5), 0.5, False, None
    )


def test_a_text_without_a_box_names_the_failure() -> None:
    assert score_text("no", TRUTH, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS) == TextScore(None, 0.0, False, "no_json")


@pytest.mark.parametrize(
    ("answer", "named"), [(BoxesAnswer((TRUTH,)), "BoxesAnswer"), (BoxAnswer(2, TRUTH.box, ""), "image 2")]
)
def test_an_answer_that_is_not_one_known_box_is_an_error(answer, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        score_text("", answer, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS)
