"""The answer of a model to one question (`Reply`), and the answer with its scores (`Prediction`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from datamodules.samples.boxes import BoxFormat, ImageSizes, image_sizes_from_json, image_sizes_to_json
from datamodules.samples.sample import Answer, BoxAnswer, BoxesAnswer, ChoiceAnswer, answer_to_json

# What was read: a letter; a box (unit xyxy of the answer's image); or, of several, (image, x1, y1, x2, y2) each.
Read = str | tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Reply:
    """The answer of a model to one question.

    Reply(text="<think>…", image_sizes=(ImageSizes((640, 480), (644, 476)),), num_tokens=93)
    """

    text: str
    image_sizes: tuple[ImageSizes, ...]  # sizes of each image of the question; () if it was refused
    num_tokens: int = 0  # number of tokens of the completion; 0 if it is unknown
    finished: bool = True  # False: cut at the token limit
    refused: str | None = None  # the rule by which the question was not asked or was lost; it counts as wrong

    def to_json(self) -> dict[str, Any]:
        """The fields of the reply in a line of the journal of answers."""
        return asdict(self) | {"image_sizes": image_sizes_to_json(self.image_sizes)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reply:
        """The reply from a record of the journal; other fields of `record` are ignored."""
        values = {field.name: record[field.name] for field in fields(cls)}
        return cls(**values | {"image_sizes": image_sizes_from_json(record["image_sizes"])})


_OPTIONAL = ("f1", "official_f1", "detections", "official_detections", "image_set")


@dataclass(frozen=True)
class Prediction:
    """One scored answer: a line of predictions.jsonl.

    It contains everything that scoring needs, so stored answers can be scored again without the model and the data.
    """

    id: str
    column: str
    unit: str
    answer: Answer  # the truth
    text: str
    box_format: BoxFormat
    image_sizes: tuple[ImageSizes, ...]
    num_tokens: int
    finished: bool
    refused: str | None
    # IoU of the box that counts, or 1.0 for the right option. Of several boxes `BoxMatching.worst_iou`: all of them are
    # right at the thresholds below it.
    value: float = 0.0
    correct: bool = False
    read: Read | None = None
    well_formed: bool = False  # whether the answer would get the format reward in training
    failure: str | None = None  # the reason if nothing could be parsed
    official_value: float = 0.0
    official_correct: bool = False
    official_read: Read | None = None
    extracted: str | None = None  # the letter that a language model extracted for the official rule (`extraction.py`)
    f1: float | None = None  # of several boxes, at the rule's threshold; None for other answers, and not in the file
    official_f1: float | None = None
    # For average precision: (group, image, hit) of each box (`detections.py`). None: the answer is wrong in any case.
    detections: tuple[tuple[int, ...], ...] | None = None
    official_detections: tuple[tuple[int, ...], ...] | None = None
    image_set: str | None = None  # equal for questions about the same images; None in files of older versions

    def to_json(self) -> dict[str, Any]:
        """A JSON-like record."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if name not in _OPTIONAL or value is not None}
        return values | {
            "answer": answer_to_json(self.answer),
            "image_sizes": image_sizes_to_json(self.image_sizes),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Prediction:
        """Raises ValueError that names missing fields."""
        missing = [field.name for field in fields(cls) if field.name not in record and field.name not in _OPTIONAL]
        if missing:
            raise ValueError(f"no prediction: a record of predictions.jsonl lacks {', '.join(missing)}")
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        values["answer"] = answer_from_json(record["answer"])
        values["box_format"] = BoxFormat(record["box_format"])
        values["image_sizes"] = image_sizes_from_json(record["image_sizes"])
        for name in {"read", "official_read", "detections", "official_detections"} & values.keys():
            values[name] = _tuples(values[name])
        return cls(**values)


def answer_from_json(record: Mapping[str, Any]) -> Answer:
    """The true answer from a record: one option, one box or several boxes."""
    if "boxes" in record:
        return BoxesAnswer(tuple(_box_from_json(box) for box in record["boxes"]))
    if "letter" in record:
        return ChoiceAnswer(record["letter"], tuple(record["choices"]))
    return _box_from_json(record)


def _box_from_json(record: Mapping[str, Any]) -> BoxAnswer:
    return BoxAnswer(record["image"], tuple(record["box"]), record["label"])


def _tuples(value: Any) -> Any:
    """Lists, at any depth, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
