"""A model behind an OpenAI-compatible endpoint as an answerer: a question with its images in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datamodules.boxes import Convention, ImageGeometry
from datamodules.chat_requests import RequestForm, build_request
from datamodules.samples import LoadedSample, SampleError
from lightning_modules.endpoint import ChatEndpoint, Completion, EndpointSettings, RequestRefused


@dataclass(frozen=True)
class EndpointAnswer:
    """What the model wrote, and the geometries (one for each image) that its numbers are read in."""

    completion: Completion
    geometries: tuple[ImageGeometry, ...]

    @property
    def text(self) -> str:
        return self.completion.text


class EndpointAnswerer:
    """Asks in the form's dialect, greedily unless told otherwise; `convention` is how the model writes boxes."""

    def __init__(
        self, settings: EndpointSettings, form: RequestForm, max_tokens: int = 1024, temperature: float = 0.0
    ) -> None:
        self.settings, self.form = settings, form
        self.max_tokens, self.temperature = max_tokens, temperature

    @property
    def convention(self) -> Convention:
        return self.form.dialect.convention

    async def answer(self, loaded: LoadedSample, endpoint: ChatEndpoint) -> EndpointAnswer:
        """Raises SampleError for a sample that cannot be asked ("refused" where the server says so), and the errors of
        `ChatEndpoint.complete`."""
        request = await asyncio.to_thread(build_request, loaded, self.form)
        try:
            completion = await endpoint.complete(request.messages, self.max_tokens, self.temperature)
        except RequestRefused as error:
            raise SampleError(loaded.sample.id, "refused", str(error)) from error
        return EndpointAnswer(completion, request.geometries)

    def answer_all(
        self,
        samples: Sequence[LoadedSample],
        on_answer: Callable[[int, EndpointAnswer | SampleError], None] = lambda index, answer: None,
    ) -> list[EndpointAnswer | SampleError]:
        """The answers in the order of `samples`, `concurrency` at a time; `on_answer` hears of each as it comes."""

        async def ask() -> list[EndpointAnswer | SampleError]:
            slots = asyncio.Semaphore(self.settings.concurrency)

            async def one(index: int, loaded: LoadedSample) -> EndpointAnswer | SampleError:
                async with slots:
                    try:
                        found: EndpointAnswer | SampleError = await self.answer(loaded, endpoint)
                    except SampleError as error:
                        found = error
                on_answer(index, found)
                return found

            async with ChatEndpoint(self.settings) as endpoint:
                return await asyncio.gather(*(one(index, loaded) for index, loaded in enumerate(samples)))

        return asyncio.run(ask())
