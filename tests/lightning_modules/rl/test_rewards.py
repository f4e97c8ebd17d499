"""The reward of eq. 3 against numbers worked out by hand, and peers' reward bugs that must not come back."""

import math

import pytest

from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer
from lightning_modules.rl.rewards import REWARD_TERMS, RewardTerm, reward, term_weights, weight_problems

WIDE = ImageSizes(original=(640, 480), resized=(640, 480))
SMALL = ImageSizes(original=(100, 100), resized=(112, 56))
HALF = BoxAnswer(image=0, box=(0.0, 0.0, 0.5, 0.5), label="cup")


def answer(values, thinking="left of the cup"):
    return render_answer(values, "cup", thinking)


def reference_iou(a, b, steps=480):
    """Counts grid cells, so shares nothing with the shipped formula."""
    centres = [(i + 0.5) / steps for i in range(steps)]
    columns = [(a[0] < x < a[2], b[0] < x < b[2]) for x in centres]
    rows = [(a[1] < y < a[3], b[1] < y < b[3]) for y in centres]
    both = sum(c[0] and c[1] for c in columns) * sum(r[0] and r[1] for r in rows)
    only_a = sum(c[0] for c in columns) * sum(r[0] for r in rows)
    only_b = sum(c[1] for c in columns) * sum(r[1] for r in rows)
    return both / (only_a + only_b - both)


@pytest.mark.parametrize("values", [[0, 0, 320, 240], [160, 120, 480, 360], [0, 0, 640, 480], [32, 48, 400, 200]])
def test_accuracy_is_the_iou_of_the_parsed_box(values):
    unit = [values[0] / 640, values[1] / 480, values[2] / 640, values[3] / 480]
    got = reward(answer(values), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert got.terms["accuracy"] == pytest.approx(reference_iou(HALF.box, unit), abs=1e-9)
    assert got.terms["format"] == 1.0 and got.failure is None
    assert got.total == pytest.approx(got.terms["accuracy"] + 0.5)


def test_weights_of_equation_3():
    text = answer([0, 0, 320, 480])  # twice the area of the target: IoU 1/2
    got = reward(text, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS, {"accuracy": 3.0, "format": 0.25})
    assert got.total == pytest.approx(3.0 * 0.5 + 0.25)


def test_without_tags_the_box_counts_but_the_format_does_not():
    got = reward(answer([0, 0, 320, 240], thinking=None), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.terms["accuracy"], got.terms["format"], got.total) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("text", ["", "<", "<|", "< think >", "I see a cup.", "<think>x</think>", "<answer></answer>"])
def test_text_without_a_box_earns_nothing_and_names_the_failure(text):
    """FIELD 5: peers pay the format reward, or even points for accuracy, for such text."""
    got = reward(text, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.total, got.terms["accuracy"], got.terms["format"]) == (0.0, 0.0, 0.0)
    assert got.failure is not None


def test_truncated_completion_earns_what_its_text_earns():
    whole = answer([0, 0, 320, 240])
    for cut in range(len(whole)):
        assert reward(whole[:cut], HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["format"] == 0.0
    assert reward(whole[: whole.index("```json")], HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).total == 0.0


def test_identical_one_pixel_boxes_score_one_and_empty_ones_zero():
    """FIELD 4: inclusive and exclusive pixels mixed scored 0 for the first and divided by zero for the second."""
    thin = BoxAnswer(image=0, box=(10 / 640, 10 / 480, 11 / 640, 20 / 480), label="")
    assert reward(answer([10, 10, 11, 20]), thin, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(
        1.0
    )
    empty = reward(answer([10, 10, 10, 10]), thin, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert empty.terms["accuracy"] == 0.0 and empty.terms["format"] == 0.0 and not math.isnan(empty.total)


def test_target_image_gives_the_geometry():
    """FIELD 1 and 7: the same text means another box in another image; the answer says which image is meant."""
    in_second = BoxAnswer(image=1, box=(0.25, 0.5, 0.75, 1.0), label="cup")
    text = answer([28, 28, 84, 56])  # 112 x 56 pixels: exactly the box; in the 640 x 480 image far from it
    assert reward(text, in_second, [WIDE, SMALL], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(1.0)
    assert reward(text, in_second, [SMALL, WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == 0.0


def test_convention_is_not_guessed_from_the_numbers():
    """FIELD 6 and 7: numbers below 1000 are per mille only for a model that writes per mille."""
    assert reward(answer([0, 0, 320, 240]), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(
        1.0
    )
    assert reward(answer([0, 0, 500, 500]), HALF, [WIDE], BoxFormat.RELATIVE_1000).terms["accuracy"] == pytest.approx(
        1.0
    )
    relative_1000 = reward(answer([0, 0, 320, 240]), HALF, [WIDE], BoxFormat.RELATIVE_1000)
    assert relative_1000.terms["accuracy"] == pytest.approx(0.32 * 0.24 / 0.25)


def test_further_boxes_do_not_raise_the_reward():
    boxes = '<think>t</think><answer>[{"bbox_2d": [400, 300, 500, 400]}, {"bbox_2d": [0, 0, 320, 240]}]</answer>'
    got = reward(boxes, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.terms["accuracy"], got.terms["format"]) == (0.0, 0.0)


def test_a_term_is_one_function_in_the_table(monkeypatch):
    """It is computed, weighted and written; a weight that is not given is the term's own."""
    monkeypatch.setitem(REWARD_TERMS, "short", RewardTerm(lambda text, score: float(len(text) < 10), 0.0))
    text = answer([0, 0, 320, 240])
    assert reward(text, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).total == 1.5
    weights = term_weights({"short": 2.0, "format": 0.0})
    assert weights == {"accuracy": 1.0, "format": 0.0, "short": 2.0} and weight_problems(weights) == []
    got = reward("none", HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS, weights)
    assert got.total == 2.0
    assert got.to_json() == {"total": 2.0, "accuracy": 0.0, "format": 0.0, "short": 1.0, "failure": got.failure}


def test_weights_that_cannot_work_are_all_named():
    faults = weight_problems(term_weights({"accuracy": 0.0, "format": math.nan, "lenght": 1.0}))
    assert [fault.partition("=")[0] for fault in faults] == ["reward_weights.format", "reward_weights.lenght"]
    assert weight_problems({"accuracy": 0.0, "format": 0.0}) == [
        "reward_weights={'accuracy': 0.0, 'format': 0.0}: every reward would be 0"
    ]
