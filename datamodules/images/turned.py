"""Samples with photographs that EXIF turns: boxes of the stored pixels become boxes of the image as it is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from datamodules.samples.boxes import Box, turn_box
from datamodules.samples.sample import Answer, BoxesAnswer, BoxPart, ChoiceAnswer, Part, Sample
from datamodules.samples.scores import true_boxes

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def boxed_images(sample: Sample) -> set[int]:
    """The indices of the images in which the question or the answer has a box."""
    asked = {part.image for part in sample.messages if isinstance(part, BoxPart)}
    return asked | {box.image for box in true_boxes(sample.answer)}


def turn_sample(sample: Sample, orientations: Mapping[int, int]) -> Sample:
    """The sample with all its boxes turned to the images as they are shown.

    Args:
        sample: its boxes are measured in the stored pixels.
        orientations: EXIF's orientation (1 to 8) by index of the image. An image that is missing here is upright.
    """
    if all(orientation == 1 for orientation in orientations.values()):
        return sample

    def turned(image: int, box: Box) -> Box:
        return turn_box(box, orientations.get(image, 1))

    def part_of(part: Part) -> Part:
        if not isinstance(part, BoxPart) or orientations.get(part.image, 1) == 1:
            return part
        box = turned(part.image, part.box)
        # The text of the box must change with it. Both data sets that have boxes in questions write them in 0-1000.
        return replace(part, box=box, text=_rewritten(part.text, box))

    def answer_of(answer: Answer) -> Answer:
        if isinstance(answer, ChoiceAnswer):
            return answer  # a letter has no box
        if isinstance(answer, BoxesAnswer):
            return BoxesAnswer(tuple(replace(one, box=turned(one.image, one.box)) for one in answer.boxes))
        return replace(answer, box=turned(answer.image, answer.box))

    return replace(sample, messages=tuple(map(part_of, sample.messages)), answer=answer_of(sample.answer))


def _rewritten(text: str, box: Box) -> str:
    """`text`, the notation of one box, with its four numbers replaced by those of `box` (unit xyxy) in 0-1000."""
    numbers = iter(str(round(1000 * value)) for value in box)
    assert len(_NUMBER.findall(text)) == 4, f"{text!r} is not the text of one box"
    return _NUMBER.sub(lambda _: next(numbers), text)
