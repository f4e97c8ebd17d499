"""The interface of a model that answers questions about images: in this process, on a server, or scripted for tests.

Evaluation uses only this interface. An implementation asks each question in its own prompt form, and states the box
format of its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from datamodules.metrics.predictions import Reply
from datamodules.persistence.problems import Problems
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import LoadedSample, Sample
from lightning_modules.serving.generation_rules import Generation

T = TypeVar("T")
Load = Callable[[Sample], LoadedSample]  # reads the images of a sample; may raise SampleError
Show = Callable[[str], None]  # gets the text of an answer so far, while it is decoded
# the rule for a question without an answer from the server; it is asked again by the next call
UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Decoding:
    """The decoding of answers.

    Args:
        max_new_tokens: largest number of tokens of an answer
        prompts_per_batch: number of questions that a Qwen2.5-VL in this process answers at the same time; other models
            ignore it
        generation: greedy takes the most likely token without penalties, equal for every model; model uses the model's
            generation_config.json or the server's settings (lightning_modules/serving/generation_rules.py), with
            separate results
    """

    max_new_tokens: int = 1024
    prompts_per_batch: int = 32
    generation: Generation = "greedy"

    def __post_init__(self) -> None:
        problems = Problems()
        problems.positive(max_new_tokens=self.max_new_tokens, prompts_per_batch=self.prompts_per_batch)
        problems.raise_all("decoding")


class Predictor(Protocol):
    """`chunk_size`: number of questions that are decoded together.

    Because of floating-point rounding, an answer depends slightly on the other questions in its batch. So the
    evaluation always forms the same chunks, and answers do not depend on restarts or on the number of processes. It is
    1 if questions are independent, such as with a server.
    """

    box_format: BoxFormat
    answer_form: AnswerForm
    chunk_size: int

    def identity(self) -> Mapping[str, Any]:
        """Everything that answers depend on except the question, as JSON-like data: weights, prompt form, decoding.

        It is part of the cache key.
        """

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """Yields one reply for each sample, in the order in which they arrive.

        The text of a question is `sample.messages` (images and texts interleaved), converted by
        `messages.build_messages`. `sample.answer` is the true answer and must not reach the model. If `load` or the
        model's limits raise SampleError, the reply has its rule. Any other error is raised.
        """

    def stream(self, loaded: LoadedSample, show: Show) -> Reply:
        """The reply to one question, as `answers` gives it. `show` gets the text so far, again and again.

        An error that `show` raises ends the answer.
        """


def split_chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """`values` in consecutive chunks of `size`; the last chunk may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]
