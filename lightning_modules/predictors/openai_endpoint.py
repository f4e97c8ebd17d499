"""Models other than the policy as predictors: questions with their images in, text out.

`OpenAIPredictor` asks an OpenAI-compatible server; `huggingface.py` has a predictor for models in this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from typing import Any

from PIL import Image

from datamodules.encoding.chat_request import RequestForm, build_request
from datamodules.metrics.predictions import Reply
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from lightning_modules.predictors.base import UNANSWERED, Decoding, Load
from lightning_modules.serving.generation_rules import require_taken, server_rules, stating
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)

log = logging.getLogger(__name__)

CHECK_ATTEMPTS = 3  # a mistyped address should be known before every attempt has failed


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
        self.settings, self.form = settings, form
        self.max_tokens, self.generation = decoding.max_new_tokens, decoding.generation
        self.temperature = 0.0 if self.generation == "greedy" else None
        self._stating = stating(settings, self.generation)
        self._checked = False

    @property
    def box_format(self) -> BoxFormat:
        """What the numbers in an answer mean."""
        return self.form.model_family.box_format

    def identity(self) -> dict[str, Any]:
        """All that answers depend on beside the question, JSON-like. The server's weights are known by name only."""
        decoding = {"max_tokens": self.max_tokens} | server_rules(self.settings, self.generation)
        server = {"model": self.settings.model, "extra_body": self.settings.extra_body}
        return {"endpoint": server, "form": asdict(self.form), "decoding": decoding}

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """One reply for each sample as they come, `concurrency` under way at a time.

        Before the first of all, a grey image is asked about: a wrong address, key, model or setting, or a model that
        takes no images, ends here as an error of `ChatEndpoint` and not in wrong answers. After that, what `load` or
        the server refuses gets a reply with its rule, and so does what gets no answer in all attempts (`UNANSWERED`),
        if the server still answers the grey image; other errors are raised.
        """
        with asyncio.Runner() as runner:
            stream = self._stream(samples, load)

            async def following() -> tuple[Sample, Reply] | None:
                return await anext(stream, None)

            while (found := runner.run(following())) is not None:
                yield found

    async def _stream(self, samples: Sequence[Sample], load: Load) -> AsyncIterator[tuple[Sample, Reply]]:
        waiting, running = iter(samples), set()
        async with ChatEndpoint(self._stating) as endpoint:
            if samples and not self._checked:
                await self._check(endpoint)
            while True:
                while len(running) < self.settings.concurrency and (sample := next(waiting, None)) is not None:
                    running.add(asyncio.create_task(self._answer(sample, load, endpoint)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()

    async def _check(self, endpoint: ChatEndpoint) -> None:
        messages = build_request(_grey_question(), self.form).messages
        try:
            await endpoint.complete(messages, self.max_tokens, self.temperature, attempts=CHECK_ATTEMPTS)
        except RequestRefused as error:
            await require_taken(self.settings, self.generation, messages, self.max_tokens)
            where = f"base_url={self.settings.base_url!r}, model={self.settings.model!r}"
            raise EndpointMisused(f"{where}: refuses a question about one small image: {error}") from error
        self._checked = True

    async def _require_answer(self, endpoint: ChatEndpoint) -> None:
        """Raises EndpointUnavailable where it is not one question that the server fails on: it is gone."""
        with suppress(RequestRefused):
            messages = build_request(_grey_question(), self.form).messages
            await endpoint.complete(messages, 1, self.temperature)

    async def _answer(self, sample: Sample, load: Load, endpoint: ChatEndpoint) -> tuple[Sample, Reply]:
        try:
            request = await asyncio.to_thread(lambda: build_request(load(sample), self.form))
            found = await endpoint.complete(request.messages, self.max_tokens, self.temperature)
        except SampleError as error:
            return sample, Reply("", (), refused=error.rule)
        except RequestRefused:
            return sample, Reply("", (), refused="refused")
        except EndpointUnavailable as error:
            await self._require_answer(endpoint)
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
