"""The conversation of a record in any format: images, and questions with their answers."""

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

    The first question of a record shows the images at its IMAGE_TAGs, or before its text if it has no tags.
    `question_images` and `answer_images` are the image indices of the boxes in the question and in the answer, if the
    record or its format gives them. `num_boxes` is the required number of boxes, if the format counts them.
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

    `coordinates` is the box format that the record's format prescribes, or None. `is_stated` is True if the record
    itself names the box format. `by_default` is True if the images of the boxes come from the format and not from the
    record.
    """

    form: str
    images: tuple[Any, ...]
    exchanges: tuple[Exchange, ...]
    coordinates: Coordinates | None = None
    is_stated: bool = False
    by_default: bool = False
    has_system: bool = False  # a system turn or field, which is not used


def read_image_ids(value: Any, sample_id: str) -> tuple[int, ...] | None:
    """The images of boxes, counted from 0, from one number or a list; None if they are not given.

    Raises:
        SampleError: "image_id": these are not integers.
    """
    if value is None:
        return None
    values = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in values):
        raise SampleError(sample_id, "image_id", f"image_id should be numbers of images from 0, got {value!r:.100}")
    return tuple(values)


def as_list(value: Any) -> Any:
    """A list of objects. The library `datasets` may have converted it to an object of lists; this is undone."""
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
