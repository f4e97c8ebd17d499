"""The questions of a record before its images are read: texts, boxes as written, and the image of each box.

The image of a box is given by the record (`image_id`), by the format (ms-swift's default), or by the words of the
answer ("It is in the second image."). The words of the question are used only if the user allows it, because "Find the
thing of the first image in the other one" names the wrong image. If the image is not given, the question is rejected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datamodules.importers.own_data.conversation import IMAGE_TAG, Conversation, Exchange
from datamodules.importers.own_data.coordinates import read_numbers
from datamodules.importers.own_data.forms import form_of, read_conversation
from datamodules.importers.own_data.statement import Coordinates, OwnData
from datamodules.importers.reading.coco_annotations import QUESTIONS, as_phrase
from datamodules.importers.reading.image_references import (
    BOX,
    in_a_list,
    label_before,
    named_images,
    names_other_image_behind,
    require_same_numbers,
)
from datamodules.samples.answer_text import ParsedAnswer, answer_text, parse_answer
from datamodules.samples.box_texts import MAX_MARKS, BoxesInText, PlacedBox
from datamodules.samples.sample import SampleError

NO_BOX = "no_box"  # the rule for an answer without a box; such records are counted separately
# Wordings of a question whose answer is several boxes.
SEVERAL = (
    "Locate every {} in the image.",
    "Find all of these in the image: {}.",
    "Give a bounding box for each {} in the image.",
)


class DraftBox(NamedTuple):
    """A box of an answer or a question, with its numbers as written. It belongs to image `image` of the record."""

    values: tuple[float, ...]
    image: int
    label: str = ""


@dataclass(frozen=True)
class Draft:
    """One question. `parts` are the texts, image numbers and boxes of the question, in order."""

    parts: tuple[str | int | DraftBox, ...]
    boxes: tuple[DraftBox, ...]
    image_from: str  # the source that names the image of a box
    thinking: str | None = None


@dataclass(frozen=True)
class DraftRecord:
    """The questions of a record (a rejected question as its error), and the box format."""

    form: str
    images: tuple[Any, ...]
    drafts: tuple[Draft | SampleError, ...]
    coordinates: Coordinates | None
    has_system: bool = False


def draft_record(record: Mapping[str, Any], own: OwnData, sample_id: str) -> DraftRecord:
    """Read the questions of one record in any format.

    Args:
        record: the record as in the file.
        own: the user's statements.
        sample_id: id of the record, for the errors.

    Raises:
        SampleError: the record has an unknown format, or breaks a rule of `read_conversation`.
    """
    record = _renamed(record, own.fields)
    form = form_of(record, sample_id)
    if form == "detection":
        image = record.get("image") if record.get("image") is not None else record.get("file_name")
        drafts = _detections(record["objects"], own, sample_id)
        return DraftRecord(form, (image,), tuple(drafts), own.box_format)
    talk = read_conversation(record, form, sample_id)
    # A statement in the record overrides the user's statement, and this overrides a default of the format.
    coordinates = talk.coordinates if talk.is_stated else own.box_format or talk.coordinates
    if talk.is_stated and own.box_format not in (None, talk.coordinates):
        detail = f"the record's bbox_type says {talk.coordinates}, own.box_format={own.box_format}"
        raise SampleError(sample_id, "box_format_conflict", detail)
    drafts: list[Draft | SampleError] = []
    for number, exchange in enumerate(talk.exchanges):
        name = f"{sample_id}/{number}" if len(talk.exchanges) > 1 else sample_id
        try:
            drafts.append(_draft(talk, exchange, number == 0, own, name))
        except SampleError as error:
            drafts.append(error)
    return DraftRecord(form, talk.images, tuple(drafts), coordinates, talk.has_system)


def detection_drafts(
    boxes: Sequence[tuple[str, Sequence[float]]], own: OwnData, sample_id: str
) -> Iterator[Draft | SampleError]:
    """Make one question for each category of an image. Its answer is the list of all boxes of the category.

    Args:
        boxes: (category, four numbers) of each box in the image.
        own: the user's statements, with the wordings of questions.
        sample_id: chooses the wording.
    """
    by_phrase: dict[str, tuple[str, list[tuple[float, ...]]]] = {}
    for category, values in boxes:
        by_phrase.setdefault(question_key(category), (as_phrase(category), []))[1].append(tuple(values))
    for phrase, found in by_phrase.values():
        if not phrase:
            yield SampleError(sample_id, "empty_phrase", "a category's name names nothing")
            continue
        wordings = own.questions or (QUESTIONS if len(found) == 1 else SEVERAL)
        # A hash, not a random generator, because the wording must not depend on the order of workers.
        digest = hashlib.sha256(f"{sample_id}/{phrase}".encode("utf-8", "replace")).digest()
        text = wordings[digest[0] % len(wordings)].format(phrase)
        yield Draft((0, text), tuple(DraftBox(values, 0, phrase) for values in found), "single")


def question_key(category: str) -> str:
    """Categories with the same key are one question.

    "Dog" and "dog " are one: two questions would each have an incomplete answer.
    """
    return as_phrase(category).casefold()


def _renamed(record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The record with its fields renamed to the names of the format."""
    # If the user maps another field to a name, a field with that name has another meaning and is dropped.
    names = {own: form for form, own in fields.items()}
    return {names.get(name, name): value for name, value in record.items() if name not in fields or name in names}


def _detections(objects: Mapping[str, Any], own: OwnData, sample_id: str) -> Iterator[Draft | SampleError]:
    """`objects` of a detection data set: {"bbox": [four numbers, …], "category": [a name or a number, …]}."""
    names = next((objects[key] for key in ("category", "categories", "label", "labels") if key in objects), None)
    boxes = objects["bbox"]
    if not isinstance(boxes, list) or not isinstance(names, list) or len(names) != len(boxes):
        detail = "objects needs lists of the same length: bbox, and category with the names or numbers of categories"
        raise SampleError(sample_id, "field_type", detail)
    found = []
    for name, box in zip(names, boxes, strict=True):
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(own.categories):
            name = own.categories[name]
        if not isinstance(name, str):
            detail = f"category {name!r:.80} has no name; --own.categories lists the names of 0, 1, …"
            raise SampleError(sample_id, "category_name", detail)
        found.append((name, read_numbers(box, sample_id)))
    if not found:
        raise SampleError(sample_id, NO_BOX, "the image has no box")
    return detection_drafts(found, own, sample_id)


def _draft(talk: Conversation, exchange: Exchange, shows_images: bool, own: OwnData, name: str) -> Draft:
    """Convert one exchange to a question. `shows_images` is True for the first exchange of a record."""
    num_images = len(talk.images)
    # 1. The answer's boxes, and the image of each.
    boxes, text, thinking = _answer_boxes(exchange.answer, name)
    images, source = _images_of(boxes, text, exchange, talk.by_default, own, num_images, name)
    if source != "single":
        require_same_numbers([placed.box.image for placed in boxes], images, name)
    # 2. The question's texts, images and boxes. A later question of the conversation has the same images.
    question = exchange.question
    if not (shows_images and IMAGE_TAG in question):
        question = IMAGE_TAG * num_images + question
    parts = tuple(_question_parts(question, exchange.question_images, talk.by_default, num_images, name))
    num_boxes = sum(isinstance(part, DraftBox) for part in parts), len(boxes)
    if exchange.num_boxes not in (None, num_boxes):
        detail = f"{num_boxes} boxes in question and answer, {exchange.num_boxes} of them from objects"
        raise SampleError(name, "bbox_count", detail)
    # 3. The label that is nearest to each box in the text.
    marked = exchange.label or label_before(exchange.question)
    found = [
        DraftBox(placed.box.values, image, placed.box.label or label_before(text, placed.start) or marked)
        for placed, image in zip(boxes, images, strict=True)
    ]
    return Draft(parts, tuple(found), source, thinking)


def _answer_boxes(answer: Any, name: str) -> tuple[list[PlacedBox], str, str | None]:
    """The boxes of an answer in order, the text around them, and the thinking before them."""
    text, thinking = "", None
    if isinstance(answer, str):
        # The parser of model answers reads only parts of a very long text. A target must be read completely.
        if len(answer) > MAX_MARKS and sum(not character.isalnum() for character in answer) > MAX_MARKS:
            raise SampleError(name, "answer_too_long", f"{len(answer):,} characters")
        # The part that counts as answer for a model too: after the thinking, inside the answer tags if there are any.
        text = answer_text(answer) or ""
        parsed = parse_answer(answer, lenient=True)
        thinking = parsed.thinking if isinstance(parsed, ParsedAnswer) else None
    found = BoxesInText(text, lenient=True)
    if not isinstance(answer, str):
        try:
            found.read(answer)
        except OverflowError as error:  # an integer outside the range of floats
            raise SampleError(name, "unreadable_box", f"{error}") from error
    # A model may repeat a box in other words. In a target, it would be unclear whether this is one box or two.
    kinds = [kind for kind in (found.keyed, found.bare, found.written) if kind]
    if found.num_bad or len(kinds) > 1:
        rule = "unreadable_box" if found.num_bad else "mixed_boxes"
        raise SampleError(name, rule, f"not every number of the answer is read as a box: {answer!r:.150}")
    if not kinds:
        raise SampleError(name, NO_BOX, f"the answer is {answer!r:.150}")
    return kinds[0], text, thinking


def _images_of(
    boxes: Sequence[PlacedBox],
    text: str,
    exchange: Exchange,
    by_default: bool,
    own: OwnData,
    num_images: int,
    name: str,
) -> tuple[list[int], str]:
    """The image of each box, and its source: "single", "record", "form", "answer" or "question"."""
    # 1. A single image needs no information.
    if num_images == 1 and (exchange.answer_images is None or by_default):
        return [0] * len(boxes), "single"
    named = named_images(text, num_images, name) if num_images > 1 else []
    named_in_question = named_images(exchange.question, num_images, name) if num_images > 1 else []
    asked = {image for _, image in named_in_question}
    in_answer = {image for _, image in named}
    # 2. The record, or the form's default.
    if exchange.answer_images is not None:
        given = exchange.answer_images
        images = list(given) * (len(boxes) if len(given) == 1 else 1)
        if len(images) != len(boxes) or not all(0 <= image < num_images for image in images):
            detail = f"image_id is {list(given)} for {len(boxes)} boxes and {num_images} images"
            raise SampleError(name, "image_id", detail)
        # A default of the format must not contradict the question either.
        mentioned = in_answer | (asked if by_default and len(asked) == 1 else set())
        if len(mentioned) == 1 and not mentioned & set(images):
            detail = f"image_id says {images}, the text names image {mentioned.pop()}, counted from 0"
            raise SampleError(name, "image_conflict", detail)
        return images, "form" if by_default else "record"
    # 3. The answer's own words.
    if len(in_answer) == 1 and not all(in_a_list(text, place) for place, _ in named):
        return [*in_answer] * len(boxes), "answer"
    if len(boxes) > 1 and named and all(named[0][0] < placed.start for placed in boxes):
        # "In the first image … [box]; in the second … [box]": take the nearest image named before each box.
        nearest = [[found for found in named if found[0] < placed.start][-1] for placed in boxes]
        images = [image for _, image in nearest]
        is_listed = any(in_a_list(text, place) for place, _ in nearest)
        if is_listed or names_other_image_behind(text, [placed.end for placed in boxes], images, named):
            raise SampleError(name, "image_unknown", f"the image of a box is not clear: {text!r:.150}")
        return images, "answer"
    # 4. The words of the question, if the user allows it.
    is_listed = any(in_a_list(exchange.question, place) for place, _ in named_in_question)
    if in_answer or len(asked) != 1 or is_listed or not own.image_in_question:
        detail = f"nothing says which of {num_images} images the box is in; give the record a field image_id"
        raise SampleError(name, "image_unknown", f"{detail}: {exchange.question[-100:]!r} -> {text!r:.100}")
    return [*asked] * len(boxes), "question"


def _question_parts(
    question: str, given: Sequence[int] | None, by_default: bool, num_images: int, name: str
) -> Iterator[str | int | DraftBox]:
    """Split a question into texts, images at their tags, and boxes.

    Args:
        question: the text, with IMAGE_TAGs.
        given: the images of its boxes in order, if the record or its format gives them.
        by_default: whether `given` comes from the format.
        num_images: number of images of the record.
        name: id of the sample, for the errors.
    """
    ids = iter(given or ())
    for number, piece in enumerate(question.split(IMAGE_TAG)):
        if number:
            yield number - 1
            piece = piece.removeprefix("\n")  # the line break belongs to the tag
        done = 0
        for start, end, values in _boxes_in(piece, name):
            yield piece[done:start]
            image = next(ids, None)
            before = _named_before(piece, start, num_images, name)
            if image is None:
                image = before
            elif by_default and before not in (None, image):
                raise SampleError(name, "image_conflict", f"image_id says {image}, the text names image {before}")
            if image is None or not 0 <= image < num_images:
                detail = (
                    f"a box of the question is in image {image} of {num_images}; image_id or words before it say it"
                )
                raise SampleError(name, "image_unknown" if image is None else "image_id", detail)
            yield DraftBox(values, image)
            done = end
        yield piece[done:]


def _boxes_in(text: str, name: str) -> list[tuple[int, int, tuple[float, ...]]]:
    """(start, end, numbers) of each box in a piece of a question: Qwen's markup, or a plain list of four numbers."""
    marked = [(m.start(), m.end(), tuple(map(float, m.groups()))) for m in BOX.finditer(text)]
    # Replaced by blanks of the same length, so that their brackets are not found again.
    rest = BOX.sub(lambda match: " " * len(match.group()), text)
    if "[" not in rest and "(" not in rest and "<box>" not in rest:
        return marked
    found = BoxesInText(rest, lenient=True)
    if found.keyed:
        raise SampleError(name, "question_box", f"a question may hold boxes as plain lists alone: {text!r:.150}")
    plain = [(placed.start, placed.end, placed.box.values) for placed in found.bare + found.written]
    starts = [start for start, _, _ in plain]
    if len(set(starts)) < len(starts) or not all(rest[start] in "[(<" for start in starts):
        raise SampleError(name, "question_box", f"a question may hold boxes as plain lists alone: {text!r:.150}")
    return sorted(marked + plain)


def _named_before(text: str, start: int, num_images: int, name: str) -> int | None:
    """The image of a box in the question: the only image, or the image that is named last before the box."""
    if num_images == 1:
        return 0
    before = [image for place, image in named_images(text, num_images, name) if place < start]
    return before[-1] if before else None
