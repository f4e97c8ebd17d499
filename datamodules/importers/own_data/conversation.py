"""A record's conversation, whatever its form: images, and questions with the answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.importers.own_data.statement import Coordinates
from datamodules.samples.sample import SampleError

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    The first question of a record shows its images where the IMAGE_TAGs are; without any they come before it.
    `question_images` and `answer_images` are those of the boxes there, where the record or the form says them;
    `num_boxes` is how many there must be, where the form counts them.
    """

    question: str
    answer: Any
    question_images: tuple[int, ...] | None = None
    answer_images: tuple[int, ...] | None = None
    label: str = ""
    num_boxes: tuple[int, int] | None = None  # in the question, in the answer


@dataclass(frozen=True)
class Conversation:
    """A record's images and exchanges.

    `coordinates` are what the form says of its boxes, None where it says nothing; `is_stated` is whether the record
    itself says it. `by_default` is whether the form, and not the record, says which images boxes are in.
    """

    form: str
    images: tuple[Any, ...]
    exchanges: tuple[Exchange, ...]
    coordinates: Coordinates | None = None
    is_stated: bool = False
    by_default: bool = False
    has_system: bool = False  # a system turn or field, which is not used


def read_image_ids(value: Any, sample_id: str) -> tuple[int, ...] | None:
    """The images of boxes, counted from 0: of one number or of a list; None where none are given.

    Raises:
        SampleError: "image_id"; these are not whole numbers.
    """
    if value is None:
        return None
    values = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in values):
        raise SampleError(sample_id, "image_id", f"image_id should be numbers of images from 0, got {value!r:.100}")
    return tuple(values)


def as_list(value: Any) -> Any:
    """A list of objects, also where the library `datasets` has made an object of lists of it."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(items, list) for items in value.values()):
        return value
    return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]


def read_list(value: Any, name: str, sample_id: str) -> list[Any]:
    """A field that must be a list.

    Raises:
        SampleError: "field_type".
    """
    value = as_list(value)
    if not isinstance(value, list | tuple):
        raise SampleError(sample_id, "field_type", f"{name} is no list but {value!r:.100}")
    return list(value)


def read_text(value: Any, name: str, sample_id: str) -> str:
    """A field that must be a text.

    Raises:
        SampleError: "field_type".
    """
    if not isinstance(value, str):
        raise SampleError(sample_id, "field_type", f"{name} is no text but {value!r:.100}")
    return value
