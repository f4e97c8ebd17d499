"""The interface of a model that answers questions over images: in this process, behind a server, or scripted.

Evaluation knows nothing else of a model. An implementation puts each question in its own prompt form and says in which
box format its numbers are to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from datamodules.metrics.predictions import Reply
from datamodules.persistence.problems import Problems
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import LoadedSample, Sample
from lightning_modules.serving.generation_rules import Generation

T = TypeVar("T")
Load = Callable[[Sample], LoadedSample]  # reads the images of a sample; raises SampleError where it cannot
UNANSWERED = "unanswered"  # the rule of a question that a server gave no answer to, this time: it is asked again


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Args:
        max_new_tokens: the longest answer, in tokens
        prompts_per_batch: questions that a Qwen2.5-VL in this process answers at the same time; other models ignore it
        generation: greedy: the likeliest token, without penalties, the same for every model; model: as the model's
            generation_config.json or its server says (lightning_modules/serving/generation_rules.py), in results of
            their own
    """

    max_new_tokens: int = 1024
    prompts_per_batch: int = 32
    generation: Generation = "greedy"

    def __post_init__(self) -> None:
        problems = Problems()
        problems.positive(max_new_tokens=self.max_new_tokens, prompts_per_batch=self.prompts_per_batch)
        problems.raise_all("decoding")


class Predictor(Protocol):
    """`chunk_size`: number of questions that are decoded together. Floating-point rounding makes an answer depend
    slightly on the batch that it is computed in. The evaluation therefore always forms the same chunks, so that neither
    a restart nor another number of processes changes an answer. 1 where questions are independent, as for a server.
    """

    box_format: BoxFormat
    chunk_size: int

    def identity(self) -> Mapping[str, Any]:
        """All that answers depend on beside the question, JSON-like: weights, prompt form, decoding. The cache key."""

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """One reply for each sample, in any order, as they come.

        The text of a question is `sample.messages` (images and texts interleaved), put by `messages.build_messages`;
        `sample.answer` is the truth and must not reach the model. A sample that `load`, or the model's limits, refuse
        with SampleError gets a reply with its rule. Any other error surfaces.
        """


def split_chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """`values` cut into runs of `size`; the last may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]
