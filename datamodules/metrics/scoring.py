"""Score one answer by two rules: the paper's rule and the benchmark's official rule. `Prediction` has both scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from datamodules.benchmarks.base import Benchmark, Rule, column_of
from datamodules.metrics.detections import Detection, find_detections
from datamodules.metrics.extraction import EXTRACTED_READERS
from datamodules.metrics.official_parsers import extract_box_officially, read_choice_as_blink, read_choice_as_mmiu
from datamodules.metrics.predictions import Prediction, Read, Reply
from datamodules.persistence.files import fingerprint
from datamodules.samples.answer_text import (
    AnswerForm,
    ParseFailure,
    is_well_formed,
    parse_answer,
    states_no_box,
)
from datamodules.samples.box_matching import BoxMatching, named_boxes
from datamodules.samples.boxes import BoxFormat, iou
from datamodules.samples.choice_text import ChoiceFailure, parse_choice
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer, Sample
from datamodules.samples.scores import score_text, true_boxes


@dataclass(frozen=True)
class _Reading:
    """The result of parsing and scoring an answer by one rule."""

    value: float = 0.0  # IoU, or 1.0 for the right option
    read: Read | None = None  # box, boxes or letter
    failure: str | None = None  # the reason if nothing was parsed
    f1: float | None = None  # of several boxes
    detections: tuple[Detection, ...] | None = None  # for average precision


def score_reply(sample: Sample, reply: Reply, box_format: BoxFormat, rule: Rule, official: Rule) -> Prediction:
    """Score one reply.

    Args:
        sample: the question, with its true answer.
        reply: the model's text, and the sizes of the images.
        box_format: the format of the numbers in the reply.
        rule, official: the rules of the paper and of the official code for parsing and scoring.
    """
    unscored = Prediction(
        id=sample.id,
        column=column_of(sample),
        unit=sample.task,
        answer=sample.answer,
        text=reply.text,
        box_format=box_format,
        image_sizes=reply.image_sizes,
        num_tokens=reply.num_tokens,
        finished=reply.finished,
        refused=reply.refused or _find_size_fault(sample, reply),
        image_set=fingerprint(sorted(sample.images)),
    )
    return rescore(unscored, rule, official)


def score_replies(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    replies: Mapping[str, Reply],
    box_format: BoxFormat,
    form: AnswerForm = AnswerForm.ONE_BOX,
) -> list[Prediction]:
    """Score the replies to `samples`, in their order.

    Args:
        benchmark: its rules.
        samples: the questions.
        replies: id of a sample -> its reply.
        box_format: the format of the numbers in the replies.
        form: of the replies. With NAMED_IMAGE, an answer of one box is scored like several, as in training, if the
            benchmark lets the image count.
    """
    rules = (benchmark.rule, benchmark.official)
    if form == AnswerForm.NAMED_IMAGE and benchmark.image_counts:
        samples = [_with_boxes(sample) for sample in samples]
    return [score_reply(sample, replies[sample.id], box_format, *rules) for sample in samples]


def _with_boxes(sample: Sample) -> Sample:
    """The sample with a true answer of one box as a list of boxes."""
    is_one_box = isinstance(sample.answer, BoxAnswer)
    return replace(sample, answer=BoxesAnswer((sample.answer,))) if is_one_box else sample


def rescore(prediction: Prediction, rule: Rule, official: Rule) -> Prediction:
    """Score a stored answer again. The record contains everything that is needed."""
    # The text is parsed twice: by the paper's rule and by the rule of the official code.
    found, officially = _read(prediction, rule), _read(prediction, official)
    is_box, several = not isinstance(prediction.answer, ChoiceAnswer), isinstance(prediction.answer, BoxesAnswer)
    form = AnswerForm.NAMED_IMAGE if several else AnswerForm.ONE_BOX
    may_be_empty = rule.measure == "average_precision"  # such benchmarks have questions that no box answers
    return replace(
        prediction,
        value=found.value,
        correct=_is_correct(found.value, prediction, rule),
        read=found.read,
        well_formed=is_box and prediction.refused is None and is_well_formed(prediction.text, form, may_be_empty),
        failure=found.failure,
        official_value=officially.value,
        official_correct=_is_correct(officially.value, prediction, official),
        official_read=officially.read,
        f1=found.f1,
        official_f1=officially.f1,
        detections=found.detections,
        official_detections=officially.detections,
    )


def _find_size_fault(sample: Sample, reply: Reply) -> str | None:
    """ "size_mismatch" if the size of an image with a true box differs from the size of the annotated image."""
    if not reply.image_sizes:
        return None
    sizes: dict[int, Sequence[int]] = {}
    if "sizes" in sample.extra:
        sizes = {box.image: sample.extra["sizes"][box.image] for box in true_boxes(sample.answer)}
    elif "size" in sample.extra:
        sizes = {sample.answer.image: sample.extra["size"]}
    is_same = all(reply.image_sizes[image].original == tuple(size) for image, size in sizes.items())
    return None if is_same else "size_mismatch"


def _is_correct(value: float, prediction: Prediction, rule: Rule) -> bool:
    if isinstance(prediction.answer, ChoiceAnswer):
        return value == 1.0
    return rule.counts(value, rule.threshold)


def _read(prediction: Prediction, rule: Rule) -> _Reading:
    if prediction.refused is not None:
        return _Reading(failure=prediction.refused, f1=0.0 if isinstance(prediction.answer, BoxesAnswer) else None)
    if isinstance(prediction.answer, ChoiceAnswer):
        return _read_choice(prediction, prediction.answer, rule)
    if isinstance(prediction.answer, BoxesAnswer):
        by_detections = rule.measure == "average_precision"
        return (_read_detections if by_detections else _read_boxes)(prediction, prediction.answer, rule)
    return _read_box(prediction, prediction.answer, rule)


def _read_box(prediction: Prediction, answer: BoxAnswer, rule: Rule) -> _Reading:
    if rule.reader == "mig_bench":
        # The official parser guesses 0-1 or 0-1000 from the numbers; the project's parser knows the box format.
        box = extract_box_officially(prediction.text)
        return _Reading(failure="no_box") if box is None else _Reading(iou(box, answer.box), box)
    how = (prediction.image_sizes, prediction.box_format, rule.box)
    score = score_text(prediction.text, answer, *how, lenient=True)
    return _Reading(score.iou, score.box, score.failure)


def _read_boxes(prediction: Prediction, answer: BoxesAnswer, rule: Rule) -> _Reading:
    """All boxes of the answer, each in the image that it names, against all true boxes."""
    how = (prediction.image_sizes, prediction.box_format)
    score = score_text(prediction.text, answer, *how, lenient=True, form=AnswerForm.NAMED_IMAGE)
    matching = score.matching
    boxes = tuple((box.image, *box.box) for box in matching.written if box.image is not None)
    f1 = matching.f1(rule.exceeded)
    return _Reading(matching.worst_iou, boxes or None, score.failure, f1)


def _read_detections(prediction: Prediction, answer: BoxesAnswer, rule: Rule) -> _Reading:
    """All boxes of the answer as detections. A question that no box answers has the right answer "[]"."""
    parsed = parse_answer(prediction.text, lenient=True)
    if isinstance(parsed, ParseFailure):
        # The official files hold boxes alone, so that a text without a box says "none", whatever it says.
        says_none = states_no_box(prediction.text, parsed) or rule.reader == "mc_bench"
        right = float(says_none and not answer.boxes)
        return _Reading(right, None, None if says_none else parsed.kind, right, () if says_none else None)
    written = named_boxes(parsed, prediction.image_sizes, prediction.box_format)
    matching = BoxMatching(written, answer.boxes)
    boxes = tuple((box.image, *box.box) for box in written if box.image is not None)
    detections = find_detections(written, answer.boxes, rule)
    return _Reading(matching.worst_iou, boxes or None, None, matching.f1(rule.exceeded), detections)


def _read_choice(prediction: Prediction, answer: ChoiceAnswer, rule: Rule) -> _Reading:
    if rule.reader == "project":
        found = parse_choice(prediction.text, answer.choices)
        if isinstance(found, ChoiceFailure):
            return _Reading(failure=found.kind)
    else:
        assert rule.reader in EXTRACTED_READERS
        # The official parsers of letters have errors. They are reproduced, not corrected.
        by_blink = rule.reader == "blink"
        text = prediction.text
        found = read_choice_as_blink(text, answer.choices) if by_blink else read_choice_as_mmiu(text)
        if found is None:
            found = prediction.extracted  # the last step of the official code, if an extractor has done it
        if found is None:
            return _Reading(failure="no_choice")
    return _Reading(float(found == answer.letter), found)
