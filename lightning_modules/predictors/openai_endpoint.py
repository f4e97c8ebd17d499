"""Models other than the policy as predictors: questions with their images in, text out.

`OpenAIPredictor` asks an OpenAI-compatible server; `huggingface.py` has a predictor for models in this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from datamodules.encoding.chat_request import RequestForm, build_request
from datamodules.metrics.predictions import Reply
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from lightning_modules.predictors.base import UNANSWERED, Decoding, Load
from lightning_modules.serving.generation_rules import server_rules
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings, RequestRefused
from lightning_modules.serving.server_questions import ServerQuestions, Unanswered

log = logging.getLogger(__name__)


class OpenAIPredictor:
    """Asks in the form's model family; questions are independent of each other.

    Args:
        settings: address, model and patience.
        form: how questions are put.
        decoding: length of an answer, and by which rules it is decoded.
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
        """What the numbers in an answer mean."""
        return self.form.model_family.box_format

    def identity(self) -> dict[str, Any]:
        """All that answers depend on beside the question, JSON-like. The server's weights are known by name only."""
        rules = server_rules(self.settings, self._server.generation)
        server = {"model": self.settings.model, "extra_body": self.settings.extra_body}
        decoding = {"max_tokens": self.max_tokens} | rules
        return {"endpoint": server, "form": asdict(self.form), "decoding": decoding}

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """One reply for each sample as they come, `concurrency` under way at a time.

        Before the first of all, a grey image is asked about: a wrong address, key, model or setting, or a model that
        takes no images, ends here as an error of `ChatEndpoint` and not in wrong answers. After that, what `load` or
        the server refuses gets a reply with its rule, and so does what gets no answer in all attempts (`UNANSWERED`),
        if the server still answers the grey image; other errors are raised.
        """
        return self._server.ask_all(samples, partial(self._answer, load)) if samples else iter(())

    async def _answer(self, load: Load, endpoint: ChatEndpoint, sample: Sample) -> tuple[Sample, Reply]:
        try:
            request = await asyncio.to_thread(lambda: build_request(load(sample), self.form))
            found = await self._server.complete(endpoint, request.messages)
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
