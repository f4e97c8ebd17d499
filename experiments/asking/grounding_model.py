"""A model that is asked about your own images from Python.

model = GroundingModel("outputs/nano/grpo/merged")
answer = model.ask(["a.jpg", "b.jpg"], "Which object of image 1 is in image 2 too?")
print(answer.thinking, answer.boxes)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING

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
from experiments.evaluation.evaluation_settings import Evaluation, QuestionForm, QuestionLimits
from lightning_modules.predictors.base import Decoding, Show

if TYPE_CHECKING:
    from lightning_modules.serving.openai_client import EndpointSettings


class GroundingModel:
    """A model, ready to be asked, in the prompt form of its training. Several threads may ask it.

    Args:
        model: folder or Hub name of a Qwen2.5-VL without an adapter, or of another image-text model; "nano" is
            models/nano-base. With an endpoint, the name of the model on the server.
        form: form of the prompt, for a model that was not trained here.
        limits: limits of image sizes.
        decoding: decoding of the answers.
        dtype: data type of the weights: float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: run code that comes with a model's weights.
        endpoint: an OpenAI-compatible server, by base_url.

    Raises:
        QuestionError: the model does not exist or cannot be loaded, or a setting does not suit it.
        EndpointMisused, EndpointUnavailable: the server's address, key or model is wrong.
    """

    def __init__(
        self,
        model: str,
        form: QuestionForm | None = None,
        limits: QuestionLimits | None = None,
        decoding: Decoding | None = None,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
        endpoint: EndpointSettings | None = None,
    ) -> None:
        from experiments.evaluation.choose_predictor import choose_predictor, make_predictor  # imports torch

        self.name, self.limits = model, limits or QuestionLimits()
        asked = Evaluation(
            model=model,
            data_root="",
            form=form or QuestionForm(),
            limits=self.limits,
            decoding=decoding or Decoding(),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            endpoint=endpoint,
        )
        try:
            settings = choose_predictor(asked)
        except (OSError, ValueError) as error:
            raise QuestionError(str(error)) from error
        self.predictor = make_predictor(settings)
        # A model in this process decodes one question at a time. A server takes several.
        self._lock: AbstractContextManager = Lock() if endpoint is None else nullcontext()
        if endpoint is not None:
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
