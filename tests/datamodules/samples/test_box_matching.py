"""Matching of written and true boxes over images, against slow references."""

import itertools
import random

import pytest

from datamodules.samples.answer_text import AnswerForm, ParsedAnswer, parse_answer, render_boxes
from datamodules.samples.box_matching import MAX_EXTRA, BoxMatching, WrittenBox, named_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes, iou
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer
from datamodules.samples.scores import score_text

SIZES = [ImageSizes((640, 480), (640, 480)), ImageSizes((100, 100), (200, 200))]
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
TRUE = BoxesAnswer((BoxAnswer(0, LEFT, "cup"), BoxAnswer(1, RIGHT, "cup")))


def random_box(rng):
    x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
    return x, y, x + rng.uniform(0.3, 0.5), y + rng.uniform(0.3, 0.5)


def random_matching(rng):
    written = [WrittenBox(rng.choice((0, 1, None)), random_box(rng), None) for _ in range(rng.randrange(5))]
    true = [BoxAnswer(rng.randrange(2), random_box(rng), "") for _ in range(rng.randrange(1, 4))]
    return BoxMatching(tuple(written), tuple(true))


def pairings(matching):
    """The IoUs of every pairing; a true box without a partner has none."""
    places = [*range(len(matching.written)), *[None] * len(matching.true)]
    for chosen in set(itertools.permutations(places, len(matching.true))):
        pairs = [(matching.written[k], true) for k, true in zip(chosen, matching.true, strict=True) if k is not None]
        yield [iou(written.box, true.box) if written.image == true.image else 0.0 for written, true in pairs]


def test_numbers_of_a_matching_are_those_of_the_best_of_all_pairings():
    rng, scores = random.Random(0), set()
    for _ in range(400):
        matching = random_matching(rng)
        written, true = len(matching.written), len(matching.true)
        found = list(pairings(matching))
        assert matching.mean_iou == pytest.approx(max(map(sum, found)) / max(written, true))
        for threshold in (0.0, 0.2, 0.5):
            pairs = max(sum(value > threshold for value in values) for values in found)
            assert matching.num_pairs(threshold) == pairs
            assert matching.f1(threshold) == pytest.approx(2 * pairs / (written + true))
        whole = [min(values) for values in found if len(values) == true == written]
        assert matching.worst_iou == max(whole, default=0.0)
        scores.add(round(matching.f1(0.2), 2))
    assert len(scores) >= 4, "the cases differ"


def test_the_worst_iou_is_the_threshold_up_to_which_f1_is_1():
    rng, right = random.Random(1), 0
    for _ in range(300):
        matching = random_matching(rng)
        for threshold in (0.0, 0.1, 0.3, 0.5, 0.7, matching.worst_iou):
            assert (matching.f1(threshold) == 1.0) == (threshold < matching.worst_iou)
        right += matching.worst_iou > 0
    assert right > 10


def test_of_very_many_written_boxes_the_first_are_matched_and_all_count():
    true = (BoxAnswer(0, LEFT, ""),)
    copies = tuple(WrittenBox(0, LEFT, None) for _ in range(1000))
    assert BoxMatching(copies, true).f1(0.5) == pytest.approx(2 / 1001)
    assert BoxMatching(copies, true).mean_iou == pytest.approx(1 / 1000)
    late = (*[WrittenBox(0, RIGHT, None)] * (MAX_EXTRA + 1), WrittenBox(0, LEFT, None))
    assert BoxMatching(late, true).f1(0.5) == 0.0


def named(text, sizes=SIZES):
    parsed = parse_answer(text)
    assert isinstance(parsed, ParsedAnswer)
    return [(box.image, box.box) for box in named_boxes(parsed, sizes, BoxFormat.ABSOLUTE_PIXELS)]


def test_each_box_is_converted_with_the_sizes_of_its_own_image():
    text = render_boxes([ParsedBox((0, 0, 320, 480), "a", 1), ParsedBox((100, 0, 200, 200), "b", 2)], "t")
    assert named(text) == [(0, LEFT), (1, RIGHT)]


@pytest.mark.parametrize("image", ["3", "0", "-1", "1.5", "1e300", "null", "true", '"first"', "[1]", "{}"])
def test_a_box_without_an_image_of_the_sample_is_never_right(image):
    text = f'[{{"image": {image}, "bbox_2d": [0, 0, 320, 480]}}]'
    assert named(text) == [(None, (0, 0, 320, 480))]
    score = score_text(text, BoxAnswer(0, LEFT, ""), SIZES, BoxFormat.ABSOLUTE_PIXELS, form=AnswerForm.NAMED_IMAGE)
    assert score.iou == 0.0 and not score.is_right(0.0) and score.failure is None


def test_an_unnamed_box_is_in_the_only_image():
    assert named("[0, 0, 320, 480]", SIZES[:1]) == [(0, LEFT)]
    assert named("[0, 0, 320, 480]") == [(None, (0, 0, 320, 480))]


@pytest.mark.parametrize(
    "text",
    [
        '{"image": "2", "bbox_2d": [100, 0, 200, 200]}',
        '{"image": 2, "boxes": [{"bbox_2d": [100, 0, 200, 200]}]}',
        '{"image": 2, "bbox_2d": [[100, 0, 200, 200]]}',
        '[{"image": 2, "bbox_2d": [100, 0, 200, 200],},]',
    ],
)
def test_slightly_broken_answers_are_read(text):
    assert named(text) == [(1, RIGHT)]


def score(text, answer=TRUE, form=AnswerForm.NAMED_IMAGE):
    return score_text(text, answer, SIZES, BoxFormat.ABSOLUTE_PIXELS, form=form)


def test_a_score_tells_missing_superfluous_and_misplaced_boxes():
    first, second = ParsedBox((0, 0, 320, 480), "a", 1), ParsedBox((100, 0, 200, 200), "b", 2)
    elsewhere = ParsedBox((0, 0, 320, 480), "a", 2)
    for boxes, f1, mean_iou in (
        ([first, second], 1.0, 1.0),
        ([second, first], 1.0, 1.0),
        ([first], 2 / 3, 0.5),
        ([first, second, first], 0.8, 2 / 3),
        ([elsewhere, second], 0.5, 0.5),
    ):
        found = score(render_boxes(boxes, "t"))
        assert (found.matching.f1(0.5), found.iou) == (pytest.approx(f1), pytest.approx(mean_iou))
        assert found.is_right(0.5) == (f1 == 1.0) and found.is_right(0.5, min_f1=0.6) == (f1 >= 0.6)
        assert found.well_formed and found.box is None


def test_several_boxes_need_the_form_that_names_images():
    with pytest.raises(ValueError, match="an answer of one box, got BoxesAnswer"):
        score("", form=AnswerForm.ONE_BOX)
    with pytest.raises(ValueError, match="an answer of one box, got ChoiceAnswer"):
        score("", ChoiceAnswer("A", ("x", "y")))
    with pytest.raises(ValueError, match="image 2, but there are 2"):
        score("", BoxesAnswer((BoxAnswer(0, LEFT, ""), BoxAnswer(2, LEFT, ""))))


def test_one_box_is_right_as_its_iou_says():
    for width in (10, 300, 319, 320, 400):
        found = score(f'{{"bbox_2d": [0, 0, {width}, 480]}}', TRUE.boxes[0], AnswerForm.ONE_BOX)
        for threshold in (0.0, 0.5, 0.9, found.iou):
            assert found.is_right(threshold) == (found.iou > threshold)
