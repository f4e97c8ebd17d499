"""A predictor for a model on an OpenAI-compatible server.

`huggingface.py` has the predictor for models in this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from datamodules.encoding.chat_request import RequestForm, build_request
from datamodules.metrics.predictions import Reply
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from lightning_modules.predictors.base import UNANSWERED, Decoding, Load, Show
from lightning_modules.serving.generation_rules import server_rules
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings, RequestRefused
from lightning_modules.serving.server_questions import ServerQuestions, Unanswered

log = logging.getLogger(__name__)


class OpenAIPredictor:
    """Asks with the prompt of the model family in `form`. Questions are independent of each other.

    Args:
        settings: address, model, time limits and attempts.
        form: form of the prompts.
        decoding: length and decoding rules of answers.
    """

    chunk_size = 1

    def __init__(self, settings: EndpointSettings, form: RequestForm, decoding: Decoding | None = None) -> None:
        decoding = decoding or Decoding()
        self.settings, self.form, self.max_tokens = settings, form, decoding.max_new_tokens
        rules = decoding.generation, self.max_tokens
        check = build_request(_grey_question(), form).messages, "a question about one small image"
        self._server = ServerQuestions("endpoint", settings, *rules, *check)

    @property
    def box_format(self) -> BoxFormat:
        """The box format of the answers."""
        return self.form.model_family.box_format

    @property
    def answer_form(self) -> AnswerForm:
        """What an answer consists of."""
        return self.form.answer_form

    def identity(self) -> dict[str, Any]:
        """Everything that answers depend on except the question, as JSON-like data.

        Only the name of the server's model is known.
        """
        rules = server_rules(self.settings, self._server.generation)
        server = {"model": self.settings.model, "extra_body": self.settings.extra_body}
        decoding = {"max_tokens": self.max_tokens} | rules
        return {"endpoint": server, "form": self.form.facts(), "decoding": decoding}

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """Yields one reply for each sample as they arrive, with up to `concurrency` requests at a time.

        The first request is about a grey image. So a wrong address, key, model or setting, or a model without image
        input, raises an error of `ChatEndpoint` instead of causing wrong answers. After that, if `load` or the server
        refuses a question, the reply has the rule. If all attempts get no answer but the server still answers the grey
        image, the rule is `UNANSWERED`. Other errors are raised.
        """
        return self._server.ask_all(samples, partial(self._answer, load)) if samples else iter(())

    def stream(self, loaded: LoadedSample, show: Show) -> Reply:
        """The reply to one question; `show` gets the text so far, again and again, if the server streams."""
        ask = partial(self._answer, lambda _: loaded, show=show)
        ((_, reply),) = self._server.ask_all([loaded.sample], ask)
        return reply

    def check(self) -> None:
        """Ask about a grey image, so that a wrong address, key, model or setting raises an error of `ChatEndpoint`."""
        list(self._server.ask_all((), self._answer))

    async def _answer(
        self, load: Load, endpoint: ChatEndpoint, sample: Sample, show: Show | None = None
    ) -> tuple[Sample, Reply]:
        try:
            request = await asyncio.to_thread(lambda: build_request(load(sample), self.form))
            found = await self._server.complete(endpoint, request.messages, show)
        except SampleError as error:
            return sample, Reply("", (), refused=error.rule)
        except RequestRefused:
            return sample, Reply("", (), refused="refused")
        except Unanswered as error:
            log.warning("counted as wrong: sample %r: %s", sample.id, error)
            return sample, Reply("", (), refused=UNANSWERED)
        finished = found.finish_reason != "length"
        return sample, Reply(found.text, request.image_sizes, found.completion_tokens, finished)


def _grey_question() -> LoadedSample:
    file = BytesIO()
    Image.new("RGB", (84, 84), "grey").save(file, "PNG")
    messages = (ImagePart(0), TextPart("Which colour is this?"))
    sample = Sample("check", "check", "check", ("grey.png",), messages, BoxAnswer(0, (0.0, 0.0, 1.0, 1.0), "grey"))
    return LoadedSample(sample, (file.getvalue(),))
