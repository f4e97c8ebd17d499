"""Ask several models the same question, one after the other, while their texts grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, Thread

from PIL import Image

from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import LoadedSample
from experiments.asking.grounding_model import GroundingModel
from experiments.asking.one_question import Answer, describe_boxes, draw_answer, split_text

WAITING = "…"  # the model's turn has not come


@dataclass(frozen=True)
class Shown:
    """One model's answer so far, as the page shows it."""

    thinking: str = WAITING
    answer: str = WAITING
    drawing: Image.Image | None = None  # the images with the boxes, when the answer is complete


class _Left(Exception):
    """Nobody waits for the answer any more."""


def ask_side_by_side(models: Sequence[GroundingModel], loaded: LoadedSample, question: str) -> Iterator[list[Shown]]:
    """Yields the texts and drawings of all models, again and again, until all have answered.

    Args:
        models: asked in this order.
        loaded: the question, as `build_question` makes it.
        question: its text.
    """
    shown = [Shown() for _ in models]
    for number, model in enumerate(models):
        for found in _stream(model, loaded, question):
            if isinstance(found, str):
                shown[number] = Shown(*split_text(found))
            elif isinstance(found, Answer):
                shown[number] = _whole(found, loaded, model.limits.max_image_pixels)
            else:
                shown[number] = replace(shown[number], answer=f"No answer: {found}")
            yield list(shown)


def _whole(answer: Answer, loaded: LoadedSample, max_image_pixels: int) -> Shown:
    written = (answer.answer or answer.text).strip()
    text = "\n".join([written, "", *describe_boxes(answer)]).strip()
    return Shown((answer.thinking or "").strip(), text, draw_answer(loaded.images, answer, max_image_pixels))


def _stream(model: GroundingModel, loaded: LoadedSample, question: str) -> Iterator[str | Answer | UserError]:
    """Yields the growing text of a model, then its answer, or the error of a server.

    The model works in a thread of its own, because it hands its text to a function. The thread ends early when the
    caller stops before the last value.
    """
    found: SimpleQueue[str | Answer | BaseException] = SimpleQueue()
    left = Event()

    def show(text: str) -> None:
        if left.is_set():
            raise _Left
        found.put(text)

    def work() -> None:
        try:
            found.put(model.answer(loaded, question, show=show))
        except _Left:
            pass
        except BaseException as error:  # raised again below, in the thread of the caller
            found.put(error)

    Thread(target=work, daemon=True).start()
    try:
        while True:
            value = _newest(found)
            if isinstance(value, BaseException) and not isinstance(value, UserError):
                raise value
            yield value
            if not isinstance(value, str):
                return
    finally:
        left.set()


def _newest(found: SimpleQueue) -> str | Answer | BaseException:
    """The newest value; waits for one. A page that is slower than the model leaves out texts in between."""
    value = found.get()
    while True:
        try:
            value = found.get_nowait()
        except Empty:
            return value
