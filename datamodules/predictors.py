"""Whoever answers questions over images: one small interface for models in this process, behind a server, or fake.

Evaluation knows nothing else of a model. An implementation puts each question in its own prompt form and says in which
box format its numbers are to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import LoadedSample, Sample

T = TypeVar("T")
Load = Callable[[Sample], LoadedSample]  # reads the images of a sample; raises SampleError where it cannot
UNANSWERED = "unanswered"  # the rule of a question that a server gave no answer to, this time: it is asked again


@dataclass(frozen=True)
class Reply:
    """What came back for one question.

    Reply(text="<think>…", image_sizes=(ImageSizes((640, 480), (644, 476)),), num_tokens=93)
    """

    text: str
    image_sizes: tuple[ImageSizes, ...]  # one for each image of the question; () if it was refused
    num_tokens: int = 0  # of the completion; 0 where it is not known
    finished: bool = True  # False: cut at the token limit
    refused: str | None = None  # the rule by which the question was not put to the model, or lost: it counts as wrong


class Predictor(Protocol):
    """`window`: as many questions share a batch that their answers may depend on one another's presence (by rounding).

    The evaluation hands out whole windows, always the same ones, so that neither the number of processes nor a kill
    changes an answer. 1 where questions are independent, as they are for a server.
    """

    box_format: BoxFormat
    window: int

    def identity(self) -> Mapping[str, Any]:
        """All that answers depend on beside the question, JSON-like: weights, prompt form, decoding. The cache key."""
        ...

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """One reply for each sample, in any order, as they come.

        The text of a question is `sample.messages` (images and texts interleaved), put by
        `prompts.build_messages`; `sample.answer` is the truth and must not reach the model. A sample that `load`, or
        the model's limits, refuse with SampleError gets a reply with its rule. Any other error surfaces.
        """
        ...


def split_windows(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
