"""Typed samples and their JSON form (the `.json` member of a shard)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from datamodules.samples.answer_text import has_answer_tags
from datamodules.samples.boxes import Box, box_fault
from datamodules.samples.option_mentions import option_letters

# Special tokens of Qwen. In a text they would become a placeholder without an image, or end the user's turn.
RESERVED = re.compile(r"<\|(?:image_pad|video_pad|vision_(?:start|end|pad)|im_start|im_end|endoftext)\|>")
_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(ValueError):
    """A sample breaks a rule. `rule` is a fixed snake_case name under which a run counts such samples."""

    def __init__(self, sample_id: str, rule: str, detail: str = "") -> None:
        super().__init__(sample_id, rule, detail)  # pickle calls __init__ with these: worker processes send the error
        self.sample_id = sample_id
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"sample {self.sample_id!r}: {self.rule}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class TextPart:
    """A piece of the question's text, without special tokens of the model."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """The place of an image in the question."""

    image: int  # index into Sample.images


@dataclass(frozen=True)
class BoxPart:
    """A box inside the question."""

    image: int  # index into Sample.images
    box: Box  # unit xyxy of this image
    text: str  # the notation of the box in the published data set


@dataclass(frozen=True)
class BoxAnswer:
    """The true box."""

    image: int  # index into Sample.images
    box: Box  # unit xyxy of the original image
    label: str  # the name of the object


@dataclass(frozen=True)
class BoxesAnswer:
    """All true boxes of a question, over all its images.

    In a benchmark it may be empty: the object is in no image. In training data it is never empty.
    """

    boxes: tuple[BoxAnswer, ...]


@dataclass(frozen=True)
class ChoiceAnswer:
    """The letter of the right option."""

    letter: str  # "A" is choices[0], "B" is choices[1], …
    choices: tuple[str, ...]


Part = TextPart | ImagePart | BoxPart
Answer = BoxAnswer | BoxesAnswer | ChoiceAnswer


@dataclass(frozen=True)
class Sample:
    """One question over one or several images.

    Sample(id="s1", source="nano", task="diff", images=("a.png", "b.png"),
           messages=(ImagePart(0), ImagePart(1), TextPart("What changed?")),
           answer=BoxAnswer(image=1, box=(0.1, 0.2, 0.5, 0.6), label="red circle"))
    """

    id: str
    source: str
    task: str  # metrics are reported by task
    images: tuple[str, ...]  # file names
    messages: tuple[Part, ...]  # the user's turn: text, images and boxes; every image once, in the order of `images`
    answer: Answer
    thinking: str | None = None  # a reference rationale, the target of CoT-SFT
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # further facts, such as the difficulty

    @property
    def question(self) -> str:
        """The text of the question, with its boxes as the data set writes them."""
        return "".join(part.text for part in self.messages if isinstance(part, TextPart | BoxPart)).strip()

    def to_json(self) -> dict[str, Any]:
        """The JSON record of the sample; `from_json` reads it back as an equal sample."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        messages, answer = [_part_to_json(part) for part in self.messages], answer_to_json(self.answer)
        values |= {"images": list(self.images), "messages": messages, "answer": answer, "extra": dict(self.extra)}
        return values

    @classmethod
    def from_json(cls, record: Mapping[str, Any], strict_boxes: bool = True) -> Sample:
        """Validate a record and make a sample of it. Raises SampleError with the id and the broken rule.

        `strict_boxes=False` accepts degenerate and out-of-range answer boxes, which benchmarks score as they are, and
        answers without a box.
        """
        if not isinstance(record, Mapping):
            raise SampleError("unknown", "field_type", f"a record is an object, got {type(record).__name__}")
        sample_id = record.get("id")
        known = isinstance(sample_id, str) and sample_id != ""
        return _Reader(sample_id if known else "unknown", strict_boxes).sample(record)


@dataclass(frozen=True)
class LoadedSample:
    """A sample together with the content of its image files."""

    sample: Sample
    images: tuple[bytes, ...]  # encoded (JPEG, PNG, …), unchanged from the shard or disk, in the order of sample.images


def _part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return {"type": "image", "image": part.image}
    if isinstance(part, BoxPart):
        return {"type": "box", "image": part.image, "box": list(part.box), "text": part.text}
    return {"type": "text", "text": part.text}


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """The record of an answer, as in samples and predictions."""
    if isinstance(answer, BoxesAnswer):
        return {"boxes": [answer_to_json(box) for box in answer.boxes]}
    if isinstance(answer, ChoiceAnswer):
        return {"letter": answer.letter, "choices": list(answer.choices)}
    return {"image": answer.image, "box": list(answer.box), "label": answer.label}


class _Reader:
    """Reads one record; every failed check raises a SampleError with this record's id."""

    def __init__(self, sample_id: str, strict_boxes: bool) -> None:
        self.sample_id = sample_id
        self.strict_boxes = strict_boxes
        self.num_images = 0  # set before messages and answer are read: their image indices are checked against it

    def sample(self, record: Mapping[str, Any]) -> Sample:
        self.fields(record, "record", ("id", "source", "task", "images", "messages", "answer"), ("thinking", "extra"))
        images = tuple(self.name(name, "images") for name in self.items(record["images"], "images"))
        if not images:
            self.fail("no_images", "images is empty")
        self.num_images = len(images)
        thinking, extra = record.get("thinking"), record.get("extra", {})
        if thinking is not None and has_answer_tags(self.text(thinking, "thinking")):
            self.fail("tag_in_thinking", "thinking holds a think or answer tag")
        if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
            self.fail("field_type", "extra is not an object with string keys")
        return Sample(
            id=self.name(record["id"], "id"),
            source=self.name(record["source"], "source"),
            task=self.name(record["task"], "task"),
            images=images,
            messages=self.messages(record["messages"]),
            answer=self.answer(record["answer"]),
            thinking=thinking,
            extra=dict(extra),
        )

    def messages(self, value: Any) -> tuple[Part, ...]:
        parts = tuple(self.part(item) for item in self.items(value, "messages"))
        shown = [part.image for part in parts if isinstance(part, ImagePart)]
        # The model pairs images with placeholders only by their order. Another order here would silently swap images.
        if shown != list(range(self.num_images)):
            self.fail("image_order", f"messages show images {shown}, not each of {self.num_images} once and in order")
        if not any(isinstance(part, TextPart) and part.text.strip() for part in parts):
            self.fail("no_question", "messages hold no text")
        return parts

    def part(self, value: Any) -> Part:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "image":
            self.fields(value, "image part", ("type", "image"))
            return ImagePart(self.index(value["image"]))
        if kind == "text":
            self.fields(value, "text part", ("type", "text"))
            return TextPart(self.text(value["text"], "text"))
        if kind == "box":
            self.fields(value, "box part", ("type", "image", "box", "text"))
            box = self.box(value["box"], strict=True)  # a question must be well-formed, in a benchmark too
            return BoxPart(self.index(value["image"]), box, self.text(value["text"], "box text"))
        return self.fail("part_type", f"a message part is of type image, text or box, got {_brief(value)}")

    def answer(self, value: Any) -> Answer:
        if isinstance(value, Mapping) and "boxes" in value:
            self.fields(value, "answer", ("boxes",))
            boxes = tuple(self.box_answer(item) for item in self.items(value["boxes"], "boxes"))
            if not boxes and self.strict_boxes:
                self.fail("no_boxes", "answer.boxes is empty")
            return BoxesAnswer(boxes)
        if isinstance(value, Mapping) and "letter" in value:
            return self.choice(value)
        return self.box_answer(value)

    def box_answer(self, value: Any) -> BoxAnswer:
        self.fields(value, "answer", ("image", "box", "label"))
        box = self.box(value["box"], strict=self.strict_boxes)
        return BoxAnswer(self.index(value["image"]), box, self.text(value["label"], "label"))

    def choice(self, value: Mapping[str, Any]) -> ChoiceAnswer:
        self.fields(value, "answer", ("letter", "choices"))
        choices = tuple(self.text(item, "choices") for item in self.items(value["choices"], "choices"))
        letters = option_letters(min(len(choices), 26))
        if self.text(value["letter"], "letter") not in letters:
            self.fail("choice_letter", f"letter {_brief(value['letter'])} is not one of {letters}")
        return ChoiceAnswer(value["letter"], choices)

    def box(self, value: Any, strict: bool) -> Box:
        numbers = self.items(value, "box")
        if len(numbers) != 4:
            self.fail("box_length", f"a box has four numbers, got {len(numbers)}")
        if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):  # bool is an int
            self.fail("field_type", f"a box has four numbers, got {_brief(numbers)}")
        try:
            x1, y1, x2, y2 = (float(number) for number in numbers)
        except OverflowError:  # an integer that is too large for a float
            self.fail("not_finite_box", "a number is too large")
        fault = box_fault((x1, y1, x2, y2))
        if fault is not None and (strict or fault == "not_finite"):
            self.fail(f"{fault}_box", f"{[x1, y1, x2, y2]}")
        return x1, y1, x2, y2

    def index(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail("field_type", f"an image index is an integer, got {_brief(value)}")
        if not 0 <= value < self.num_images:
            self.fail("image_index", f"image {_brief(value)} of {self.num_images}")
        return value

    def name(self, value: Any, where: str) -> str:
        return self.text(value, where) or self.fail("empty_field", f"{where} is empty")

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self.fail("field_type", f"{where} is not a string but {type(value).__name__}")
        if _SURROGATE.search(value):
            self.fail("not_unicode", f"{where} holds a lone surrogate, which no tokenizer accepts")
        if token := RESERVED.search(value):
            self.fail("reserved_token", f"{where} holds {token.group()}")
        return value

    def items(self, value: Any, where: str) -> Any:
        return value if isinstance(value, list | tuple) else self.fail("field_type", f"{where} is not a list")

    def fields(self, value: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        if not isinstance(value, Mapping):
            self.fail("field_type", f"{where} is not an object")
        if missing := [key for key in required if key not in value]:
            self.fail("missing_field", f"{where} lacks {', '.join(missing)}")
        if unknown := [str(key) for key in value if key not in required + optional]:
            self.fail("unknown_field", f"{where} has {', '.join(unknown)}")

    def fail(self, rule: str, detail: str) -> NoReturn:
        raise SampleError(self.sample_id, rule, detail)


def _brief(value: Any) -> str:
    """A short repr for messages."""
    try:
        return f"{value!r:.100}"
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; very deep nesting
        return f"an unprintable {type(value).__name__}"
