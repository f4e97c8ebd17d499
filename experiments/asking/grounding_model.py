"""A model that is asked about your own images from Python.

model = GroundingModel("outputs/nano/grpo/merged")
answer = model.ask(["a.jpg", "b.jpg"], "Which object of image 1 is in image 2 too?")
print(answer.thinking, answer.boxes)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

from PIL import Image

from datamodules.samples.sample import LoadedSample
from experiments.asking.one_question import (
    Answer,
    ImageSource,
    QuestionError,
    build_question,
    draw_answer,
    read_answer,
)
from experiments.evaluation.evaluation_settings import AskedModel
from lightning_modules.predictors.base import Show


class GroundingModel:
    """A model, ready to be asked, in the prompt form of its training. Several threads may ask it.

    Args:
        model: folder or Hub name of a Qwen2.5-VL without an adapter, or of another image-text model; "nano" is
            models/nano-base. With an endpoint, the name of the model on the server.
        settings: fields of `AskedModel`, such as dtype="bfloat16", device="cuda", or endpoint=EndpointSettings(…).

    Raises:
        QuestionError: the model does not exist or cannot be loaded, or a setting does not suit it.
        EndpointMisused, EndpointUnavailable: the server's address, key or model is wrong.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        from experiments.evaluation.choose_predictor import choose_predictor, make_predictor  # imports torch

        asked = AskedModel(**settings)
        self.name, self.limits = model, asked.limits
        try:
            chosen = choose_predictor(model, asked)
        except (OSError, ValueError) as error:
            raise QuestionError(str(error)) from error
        self.predictor = make_predictor(chosen)
        # A model in this process decodes one question at a time. A server takes several.
        self._lock: AbstractContextManager = Lock() if asked.endpoint is None else nullcontext()
        if asked.endpoint is not None:
            self.predictor.check()

    def ask(
        self, images: Sequence[ImageSource], question: str, target: int | None = None, show: Show | None = None
    ) -> Answer:
        """Ask one question.

        Args:
            images: paths of files, or Pillow images, in the order in which the model sees them.
            question: the text; <image> marks, one for each image, may define the position of each image.
            target: number of the image for the answer's box, from 1. None takes the image that the thinking or the
                question names.
            show: gets the text so far, again and again, while the model writes it.

        Returns:
            thinking, answer, and boxes in pixels of the original images. The image of a box counts from 1.

        Raises:
            QuestionError: an image cannot be read, the question is empty, or `target` or the marks are wrong.
        """
        return self.answer(
            build_question(images, question, self.limits.max_image_pixels, target), question, target, show
        )

    def answer(
        self, loaded: LoadedSample, question: str, target: int | None = None, show: Show | None = None
    ) -> Answer:
        """The same for the result of `build_question`."""
        with self._lock:
            reply = self.predictor.stream(loaded, show or (lambda text: None))
        return read_answer(reply, question, self.predictor.box_format, target)

    def draw(self, images: Sequence[ImageSource], answer: Answer) -> Image.Image:
        """All images side by side with the boxes of the answer."""
        loaded = build_question(images, "-", self.limits.max_image_pixels)
        return draw_answer(loaded.images, answer, self.limits.max_image_pixels)
