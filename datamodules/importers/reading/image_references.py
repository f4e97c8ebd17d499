"""Find the images that a text names and the boxes in it, in the wording and markup of Migician's data.

Boxes are `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, 0-1000; images are "the second image", "the 2th image", "image-2".
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.benchmarks.mig_bench import ORDINALS
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes
from datamodules.samples.sample import SampleError

_NUMBER = r"(\d+(?:\.\d+)?)"
BOX = re.compile(rf"<\|box_start\|>\({_NUMBER},{_NUMBER}\),\({_NUMBER},{_NUMBER}\)<\|box_end\|>")
_KIND = "(?:image|picture|frame|photo)"
_ORDINAL = rf"{'|'.join(ORDINALS)}|\d+(?:st|nd|rd|th)"
_IMAGE = re.compile(rf"\b(?:({_ORDINAL})\s+{_KIND}|{_KIND}[- ]?(\d+))\b", re.IGNORECASE)
_AND = r"(?:\s*,\s*|\s*,?\s+(?:and|or|to)\s+)(?:the\s+)?"
# "the first and the third image": a list of which `_IMAGE` finds only the last.
_LISTED = re.compile(rf"\b(?:{_ORDINAL}){_AND}(?:{_ORDINAL})\s+{_KIND}", re.IGNORECASE)
# The same, and lists of which `_IMAGE` finds all: "image 1 and image 3", "the first image and the third image".
_ANY_LISTED = re.compile(rf"(?:{_LISTED.pattern}|(?:{_IMAGE.pattern}){_AND}(?:{_IMAGE.pattern}))", re.IGNORECASE)
_IN = re.compile(r"\)?,?\s*(?:in|of|from|on)\s+(?:the\s+)?", re.IGNORECASE)  # between a box and its image
# The same, where the words are about this box: behind a comma they may begin the next one, "image-1 (box), in image-2".
_OF_THIS_BOX = re.compile(r"\)?\s*(?:(?:is|are)\s+)?(?:in|of|from|on)\s+(?:the\s+)?", re.IGNORECASE)
_LABEL = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
_RELATIVE_1000 = ImageSizes(original=(1, 1), resized=(1, 1))  # this box format needs no sizes


@dataclass(frozen=True)
class Marked:
    """A box (xyxy, 0-1) in image `image`, written at position `start` of the text."""

    image: int
    box: Box
    start: int


def named_images(text: str, num_images: int, sample_id: str) -> list[tuple[int, int]]:
    """(position in the text, 0-based image) of each image that the text names. Raises SampleError "image_index"."""
    found = []
    for match in _IMAGE.finditer(text):
        word = (match[1] or match[2]).lower()
        # Words count from "first"; digits count from 1, with or without "th".
        index = ORDINALS.index(word) if word in ORDINALS else int(re.sub(r"\D", "", word)) - 1
        if not 0 <= index < num_images:
            raise SampleError(sample_id, "image_index", f"{match.group()!r} of {num_images} images")
        found.append((match.start(), index))
    return found


def in_a_list(text: str, place: int) -> bool:
    """Whether the image that `named_images` found at `place` stands in a list of images: "the first and the third
    image: …" does not say which of them is meant."""
    return any(match.start() <= place < match.end() for match in _ANY_LISTED.finditer(text))


def bind(
    answer: str,
    question: str,
    num_images: int,
    sample_id: str,
    fixed: int | None = None,
    silent: int | None = None,
    in_order: bool = False,
) -> tuple[list[Marked], str]:
    """The boxes of the answer, each with its image, and the source that names the images.

    The sources are tried in this order. "single": there is one image. "fixed": the answers of the task are always in
    image `fixed`. "answer": the nearest image named before the box. "order", only if `in_order`: there are equally many
    boxes and images, or equally many boxes and images after the first if the question marks its box there. "question":
    the image that the question names last. "silent": image `silent`, if no image is named. Raises SampleError "no_box";
    "box_in_unit" for numbers in 0-1; "image_unknown" if no source names an image, because it is never guessed, nor
    where the words of the answer leave it open (`_is_unclear`); "image_conflict" if the answer names another image than
    the one found, if two boxes of a track would be in one image, or if the question names last the image of its own
    box.
    """
    matches = list(BOX.finditer(answer))
    if not matches:
        raise SampleError(sample_id, "no_box", f"the answer is {answer!r:.150}")
    # 1. The most reliable sources: a single image, a fixed rule of the task, the words of the answer.
    named = named_images(answer, num_images, sample_id)
    images, source = _images(matches, named, num_images, fixed)
    asked = [] if images else named_images(question, num_images, sample_id)
    marked = {_question_image(question, asked, box) for box in BOX.finditer(question)}
    # 2. Tracking lists one box per frame, without the first one if the question marks the object there.
    if not images and in_order:
        without_first = num_images - 1 if marked == {0} else num_images
        if len(matches) in (without_first, num_images):
            images, source = list(range(num_images - len(matches), num_images)), "order"
    # 3. One box, and the answer names no image: the last image named in the question, or else the task's default.
    if not images and len(matches) == 1:
        images, source = ([asked[-1][1]], "question") if asked else ([silent], "silent")
        if source == "question" and images[0] in marked and num_images > 1:
            raise SampleError(sample_id, "image_conflict", f"the question's own box is there: {question!r:.150}")
    # 4. Unknown and contradictory images are rejected, so that no wrong target is used in training.
    if not images or images[0] is None or max(images) >= num_images:
        raise SampleError(sample_id, "image_unknown", f"no image is named: {question[-100:]!r} -> {answer!r:.100}")
    if source != "answer" and not {image for _, image in named} <= set(images):
        raise SampleError(sample_id, "image_conflict", f"{source} says {images}, but the answer is {answer!r:.150}")
    is_unclear = len(matches) > 1 and _is_unclear(matches, named)
    is_unclear |= names_other_image_behind(answer, [match.end() for match in matches], images, named)
    if source == "answer" and (is_unclear or _LISTED.search(answer)):
        raise SampleError(sample_id, "image_unknown", f"the image of a box is not clear: {answer!r:.150}")
    if in_order and num_images > 1 and len(set(images)) < len(images):
        raise SampleError(sample_id, "image_conflict", f"two boxes of a track in one image: {answer!r:.150}")
    if in_unit := [match.group() for match in matches if max(map(float, match.groups())) <= 1]:
        raise SampleError(sample_id, "box_in_unit", f"{in_unit[0]} is in 0-1, where the markup means 0-1000")
    found = [Marked(image, _unit(match), match.start()) for match, image in zip(matches, images, strict=True)]
    return found, source


def _images(
    matches: list[re.Match[str]], named: list[tuple[int, int]], num_images: int, fixed: int | None
) -> tuple[list[int], str]:
    if num_images == 1:
        return [0] * len(matches), "single"
    if fixed is not None:
        return [fixed] * len(matches), "fixed"
    if named and named[0][0] < matches[0].start():
        places = [place for place, _ in named]
        # `named` is sorted by position: bisect gives the last image named before each box.
        return [named[bisect_left(places, match.start()) - 1][1] for match in matches], "answer"
    return [], ""


def _question_image(text: str, named: list[tuple[int, int]], box: re.Match[str]) -> int:
    """The image of a box in a question: "(box) in image-2", or the last one named before it, or the first image."""
    behind = next(((place, image) for place, image in named if place >= box.end()), None)
    if behind is not None and _IN.fullmatch(text, box.end(), behind[0]):
        return behind[1]
    return _image_before(named, box.start()) or 0


def _image_before(named: list[tuple[int, int]], place: int) -> int | None:
    """The last image that is named before `place`; None if there is none. `named` is sorted by position."""
    return next((image for start, image in reversed(named) if start < place), None)


def _is_unclear(matches: list[re.Match[str]], named: list[tuple[int, int]]) -> bool:
    """Whether the nearest image before a box need not be its image, in an answer of several boxes.

    So it is if two images are named before one box ("image-1 is like image-2: …"), or if the last box has no image
    of its own before it and another image is named behind it ("image-1: …. … is in image-2").
    """
    starts = [match.start() for match in matches]
    gaps = [
        {image for place, image in named if before < place < start}
        for before, start in zip([-1, *starts], [*starts, math.inf], strict=True)
    ]
    behind = gaps.pop()
    return any(len(gap) > 1 for gap in gaps) or (not gaps[-1] and not behind <= {_image_before(named, starts[-1])})


def names_other_image_behind(
    text: str, ends: Sequence[int], images: Sequence[int], named: Sequence[tuple[int, int]]
) -> bool:
    """Whether another image than the one found stands right behind a box: "as in image-1, it is (box) in image-3".

    Args:
        text: the answer.
        ends: place behind each box.
        images: the image found for each box.
        named: as `named_images` gives them.
    """
    for end, image in zip(ends, images, strict=True):
        behind = next((found for found in named if found[0] >= end), None)
        if behind is not None and behind[1] != image and _OF_THIS_BOX.fullmatch(text, end, behind[0]):
            return True
    return False


def require_same_numbers(numbers: Sequence[int | None], images: Sequence[int], sample_id: str) -> None:
    """Raises SampleError "image_conflict" if `"image": k` beside the boxes says other images than those found.

    k may be counted from 0 or from 1: both are in use, and a record does not say which.

    Args:
        numbers: k of each box; None where there is none.
        images: the image found for each box.
        sample_id: named in the error.
    """
    named = [(number, image) for number, image in zip(numbers, images, strict=True) if number is not None]
    if not any(all(number == image + first for number, image in named) for first in (0, 1)):
        detail = f'"image" beside the boxes is {list(numbers)}, but they are found in the images {list(images)} from 0'
        raise SampleError(sample_id, "image_conflict", detail)


def label_before(text: str, end: int | None = None) -> str:
    """The last phrase marked as an object before `end`; "" if there is none."""
    found = _LABEL.findall(text[:end])
    return found[-1].strip() if found else ""


def question_parts(question: str, num_images: int, sample_id: str, image_tag: str) -> list[dict[str, Any]]:
    """Split a human turn into message parts: images at their tags (or all first if there are no tags), boxes, and
    texts.

    A box in a question belongs to the image that follows as in "(box) in image-2", or to the nearest image named before
    it, or else to the first image.
    """
    pieces = question.split(image_tag)
    parts: list[dict[str, Any]] = []
    if len(pieces) == 1:
        parts = [{"type": "image", "image": index} for index in range(num_images)]
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": number - 1})
            piece = piece.removeprefix("\n")  # the line break belongs to the tag
        done = 0
        named = named_images(piece, num_images, sample_id) if BOX.search(piece) else []
        for match in BOX.finditer(piece):
            image = _question_image(piece, named, match)
            parts.append({"type": "text", "text": piece[done : match.start()]})
            parts.append({"type": "box", "image": image, "box": list(_unit(match)), "text": match.group()})
            done = match.end()
        parts.append({"type": "text", "text": piece[done:]})
    return [part for part in parts if part.get("text") != ""]


def _unit(match: re.Match[str]) -> Box:
    return _RELATIVE_1000.to_unit([float(number) for number in match.groups()], BoxFormat.RELATIVE_1000)
