"""Ask a server many independent questions, several at a time.

A wrong server is distinguished from questions without an answer.

A server is wrong if its address, key, model or settings are wrong. This ends the work. If a single question is refused
or gets no answer in all attempts, while the server answers others, this is only the result of that question.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from lightning_modules.serving.background_loop import event_loop
from lightning_modules.serving.generation_rules import OPENAI_FIELDS, SERVER_FIELDS, Generation, stating
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)
from lightning_modules.serving.responses import Completion

CHECK_ATTEMPTS = 3  # few attempts, so that a mistyped address is reported early
Messages = list[dict[str, Any]]
Q = TypeVar("Q")
R = TypeVar("R")


class Unanswered(RuntimeError):
    """One question got no answer in all attempts; the server answers others."""


class ServerQuestions:
    """Asks a server.

    Args:
        name: name of the settings, for messages.
        settings: address, model, time limits and attempts.
        generation: the decoding rules.
        max_tokens: length of the longest answer, in tokens.
        check: a question that every working server answers. It is asked before the first question, and after each
            question without an answer.
        check_words: description of `check`, for messages.
        read_check: checks the reply to `check`, and raises ValueError with the reason if it is useless.
    """

    def __init__(
        self,
        name: str,
        settings: EndpointSettings,
        generation: Generation,
        max_tokens: int,
        check: Messages,
        check_words: str,
        read_check: Callable[[str], object] = str,
    ) -> None:
        self.name, self.settings, self.generation, self.max_tokens = name, settings, generation, max_tokens
        self.temperature = 0.0 if generation == "greedy" else None
        self.check, self.check_words, self.read_check = check, check_words, read_check
        self._stating = stating(settings, generation)
        self._is_checked = False

    def ask_all(self, questions: Sequence[Q], ask: Callable[[ChatEndpoint, Q], Awaitable[R]]) -> Iterator[R]:
        """Yields the result of `ask` for each question, in the order of arrival, with up to `concurrency` questions at
        a time.

        The first call checks the server, even without questions.

        Args:
            questions: the questions in order.
            ask: asks one question with `complete`; must not return None.

        Raises:
            EndpointMisused: the server refuses `check`, or its reply is useless.
            Exception: the errors of `ask`.
        """
        with event_loop() as run:
            stream = self._stream(questions, ask)
            while (found := run(lambda: anext(stream, None))) is not None:
                yield found

    async def complete(
        self, endpoint: ChatEndpoint, messages: Messages, show: Callable[[str], None] | None = None
    ) -> Completion:
        """The server's answer to one question; `show` gets the text so far, as in `ChatEndpoint.complete`.

        Raises:
            RequestRefused: the server refuses this question.
            Unanswered: this question got no answer.
            EndpointUnavailable: `check` gets no answer either, so the server is gone.
        """
        try:
            return await endpoint.complete(messages, self.max_tokens, self.temperature, show=show)
        except EndpointUnavailable as error:
            with suppress(RequestRefused):
                await endpoint.complete(self.check, 1, self.temperature)
            raise Unanswered(str(error)) from error

    async def _stream(self, questions: Sequence[Q], ask: Callable[[ChatEndpoint, Q], Awaitable[R]]) -> AsyncIterator[R]:
        waiting, running = iter(questions), set()
        async with ChatEndpoint(self._stating) as endpoint:
            if not self._is_checked:
                await self._require_fit(endpoint)
                self._is_checked = True
            try:
                while True:
                    while len(running) < self.settings.concurrency and (question := next(waiting, None)) is not None:
                        running.add(asyncio.ensure_future(ask(endpoint, question)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    # Every error is read: asyncio prints the traceback of an error that nobody has read.
                    errors = {task: task.exception() for task in done}
                    for task in (task for task, error in errors.items() if error is None):
                        yield task.result()
                    for error in filter(None, errors.values()):
                        raise error
            finally:  # before the endpoint is closed: a request on a closed endpoint fails
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _require_fit(self, endpoint: ChatEndpoint) -> None:
        """Raises EndpointMisused for a server that does not answer `check`."""
        where = f"{self.name}: base_url={self.settings.base_url!r}, model={self.settings.model!r}"
        try:
            reply = await endpoint.complete(self.check, self.max_tokens, self.temperature, attempts=CHECK_ATTEMPTS)
            self.read_check(reply.text)
        except RequestRefused as error:
            await self._require_taken(where)
            raise EndpointMisused(f"{where}: refuses {self.check_words}: {error}") from error
        except ValueError as error:
            raise EndpointMisused(f"{where}: {error}") from error

    async def _require_taken(self, where: str) -> None:
        """Raises EndpointMisused, with what to set, if the server refuses `check` only because of sampling parameters.

        It is asked again without the fields that OpenAI's API does not have. If the server then accepts it, these
        fields are the reason.
        """
        if self.generation == "model" or self.settings.sampling_fields == "openai":
            return
        plain = stating(replace(self.settings, sampling_fields="openai"), self.generation)
        with suppress(RequestRefused):
            async with ChatEndpoint(plain) as endpoint:
                await endpoint.complete(self.check, self.max_tokens, 0.0, attempts=1)
            fields = ", ".join(sorted(SERVER_FIELDS.keys() - OPENAI_FIELDS.keys()))
            raise EndpointMisused(
                f"{where}: the server refuses requests with the fields {fields}, and accepts them without; set"
                " sampling_fields=openai for this endpoint, if the server has no such rules of its own"
            )
