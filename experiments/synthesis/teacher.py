"""Ask a teacher asynchronously for several responses to every question, and write each to the journal."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from datamodules.encoding.chat_request import ChatRequest, RequestForm, build_request
from datamodules.persistence.files import Journal
from datamodules.persistence.problems import Problems
from datamodules.persistence.progress_lines import Counted
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import image_sizes_to_json
from datamodules.samples.sample import SampleError
from datamodules.samples.scores import require_boxes
from datamodules.streaming.shard_reader import ShardReader
from lightning_modules.serving.background_loop import event_loop
from lightning_modules.serving.generation_rules import server_fields
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)

# after this number of refused or unanswered questions before the first answer, the settings are considered wrong
MAX_FAILURES_AT_START = 8
# attempts for a question without an answer while the server answers others; the second attempt comes after all other
# questions
MAX_TRIES = 2
PROBE_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]  # the smallest question


@dataclass(frozen=True)
class Sampling:
    """How the teacher samples.

    Each response has its own seed, made of `seed`, the sample's id and the number of the response. So a server that
    uses seeds gives the same responses in any order and after any interruption.

    Args:
        num_responses: number of responses to each question.
        temperature: temperature of the sampling.
        max_tokens: length of the longest response, in tokens.
        seed: seed of the whole run.
    """

    num_responses: int = 4
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(1, num_responses=self.num_responses, max_tokens=self.max_tokens)
        problems.require(0 <= self.temperature <= 2, "must be in 0..2", temperature=self.temperature)
        if self.num_responses > 1 and self.temperature == 0:
            problems.append(f"temperature=0 makes all num_responses={self.num_responses} responses equal")
        problems.raise_all("sampling")


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; 0 for your own server."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of these tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Session:
    """The counts of one process. The journal holds the results of all processes."""

    requests: int = 0  # requests with an answer
    faults: Counter[str] = field(default_factory=Counter)  # failed attempts by kind
    failed: dict[str, str] = field(default_factory=dict)  # sample id -> last error; the next run asks these again


def request_seed(seed: int, sample_id: str, response: int) -> int:
    """The seed of one response, from 0 to 2^31 - 1: every server accepts this range."""
    digest = hashlib.sha256(f"{seed}/{response}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def missing_responses(records: list[dict[str, Any]], count: int, num_responses: int) -> dict[int, list[int]]:
    """{number of the question: numbers of the missing responses} for the first `count` questions, in order.

    A rejected question needs no responses.
    """
    missing = {number: set(range(num_responses)) for number in range(count)}
    for record in records:
        if "rule" in record:
            missing.pop(record["number"], None)
        elif record["number"] in missing:
            missing[record["number"]].discard(record["response"])
    return {number: sorted(responses) for number, responses in missing.items() if responses}


@dataclass
class _Question:
    """A question in the queue."""

    number: int
    responses: list[int]  # numbers of the responses that are missing
    tries: int = 0


@dataclass
class Teacher:
    """Asks all questions whose responses are not in the journal yet.

    Sampling uses only the temperature. Every request sets all other sampling parameters to neutral values, unless
    `extra_body` overrides them. Each of `concurrency` workers takes a question and requests its responses one by one,
    so a server with a prefix cache encodes the images only once. At most one question per worker is in memory.

    Args:
        reader: the questions.
        endpoint: the teacher's server.
        form: the form of the prompts.
        sampling: number of responses, temperature, length and seed.
        journal: the journal with the responses of all runs.
        prices: for the cost in the progress.
    """

    reader: ShardReader
    endpoint: EndpointSettings
    form: RequestForm
    sampling: Sampling
    journal: Journal
    prices: Prices

    def __post_init__(self) -> None:
        self.settings = replace(self.endpoint, extra_body=server_fields(self.endpoint) | self.endpoint.extra_body)
        self.session = Session()
        self._progress: Counted | None = None
        self._lost = 0  # number of failed tries to get answers
        known = [record for record in self.journal.records if "text" in record]
        # Refusals before the first answer, which are not in the journal yet. If all questions are refused, the settings
        # are wrong, and no question must be marked as refused. None after the first answer.
        self._refused: list[dict[str, Any]] | None = None if known else []
        self._tokens = [sum(record[name] for record in known) for name in ("prompt_tokens", "completion_tokens")]

    def run(self, count: int) -> Session:
        """Ask for all missing responses to the first `count` questions.

        Questions without an answer are in `Session.failed`.

        Raises:
            EndpointUnavailable: the server no longer answers; or it has never answered, and MAX_FAILURES_AT_START
                questions (or all) have no answer.
            EndpointMisused: the server does not know the key or the model; or it has never answered and has refused
                MAX_FAILURES_AT_START questions.
        """
        missing = missing_responses(self.journal.records, count, self.sampling.num_responses)
        if missing:
            try:
                with event_loop() as run:
                    run(lambda: self._ask_all(missing, count))
            except ExceptionGroup as group:  # all workers fail for the same reason, so one error is enough
                raise group.exceptions[0] from None
        if self._refused:
            raise self._misused()
        if self.session.failed and not self._answered:
            raise EndpointUnavailable(next(iter(self.session.failed.values())))
        return self.session

    @property
    def _answered(self) -> bool:
        """Whether the server has answered any question."""
        return self._refused is None

    async def _ask_all(self, missing: dict[int, list[int]], count: int) -> None:
        """Start the workers and wait for them."""
        total = count * self.sampling.num_responses
        asked = sum(len(responses) for responses in missing.values())
        questions = deque(_Question(*each) for each in missing.items())
        # One thread reads and encodes images. The reader is not thread-safe, and one thread is enough, because the
        # server is slower.
        with ThreadPoolExecutor(max_workers=1) as pool:
            self._progress = Counted(total, "teacher", "response", initial=total - asked, note=self._note)
            with self._progress:
                async with ChatEndpoint(self.settings) as endpoint:
                    self.session.faults = endpoint.faults
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(min(self.settings.concurrency, len(missing))):
                            workers.create_task(self._work(questions, endpoint, pool))

    async def _work(self, questions: deque[_Question], endpoint: ChatEndpoint, pool: ThreadPoolExecutor) -> None:
        """A worker: take questions from the queue until it is empty."""
        while questions:
            question = questions.popleft()
            try:
                loop = asyncio.get_running_loop()
                sample_id, request = await loop.run_in_executor(pool, self._prepare, question.number)
                await self._ask(question, sample_id, request, endpoint)
            except SampleError as error:
                # The question itself is unusable, or the server refuses it.
                rejected = {"number": question.number, "id": error.sample_id, "rule": error.rule}
                self._reject(rejected | {"detail": error.detail})
                self._progress.update(len(question.responses))
            except EndpointUnavailable as error:
                # No answer to this question. If the server still answers the smallest question, continue with others. A
                # refusal is an answer too.
                with suppress(RequestRefused):
                    await endpoint.complete(PROBE_MESSAGES, 1, self.sampling.temperature)
                question.tries += 1
                if question.tries < MAX_TRIES:
                    questions.append(question)  # after all other questions
                else:
                    self.session.failed[sample_id] = str(error)
                self._lost += 1
                if not self._answered and self._lost >= MAX_FAILURES_AT_START:
                    raise

    def _reject(self, record: dict[str, Any]) -> None:
        """Write a rejected question to the journal, or hold it back until the server has answered once."""
        if record["rule"] != "refused" or self._refused is None:
            self.journal.append([record])
            return
        self._refused.append(record)
        if len(self._refused) >= MAX_FAILURES_AT_START:
            raise self._misused()

    def _misused(self) -> EndpointMisused:
        """The error for a server that refuses every question."""
        asked = f"base_url={self.settings.base_url!r}, model={self.settings.model!r}"
        return EndpointMisused(
            f"{asked}: {len(self._refused)} questions were refused and none was answered; first: "
            f"{self._refused[0]['detail']}; a server that refuses {', '.join(server_fields(self.settings))} may accept"
            " requests with endpoint.sampling_fields=openai"
        )

    def _prepare(self, number: int) -> tuple[str, ChatRequest]:
        """(sample id, request) of a question. Raises SampleError."""
        loaded = self.reader.read(number)
        require_boxes(loaded.sample, AnswerForm.ONE_BOX)
        return loaded.sample.id, build_request(loaded, self.form)

    async def _ask(self, question: _Question, sample_id: str, request: ChatRequest, endpoint: ChatEndpoint) -> None:
        """Request the missing responses of one question; each is journalled at once, so that a kill loses none."""
        sampling = self.sampling
        sizes = image_sizes_to_json(request.image_sizes)
        while question.responses:
            response = question.responses[0]
            seed = request_seed(sampling.seed, sample_id, response)
            try:
                found = await endpoint.complete(request.messages, sampling.max_tokens, sampling.temperature, seed)
            except RequestRefused as error:
                raise SampleError(sample_id, "refused", str(error)) from error
            record = {"number": question.number, "id": sample_id, "response": response, "text": found.text}
            record |= {"finish": found.finish_reason, "sizes": sizes}
            record |= {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
            self.journal.append([*(self._refused or ()), record])  # the first answer shows that the refusals were real
            self._refused = None
            question.responses.pop(0)
            self.session.requests += 1
            self._tokens[0] += found.prompt_tokens
            self._tokens[1] += found.completion_tokens
            self._progress.update()

    def _note(self) -> str:
        """The totals that are shown with the progress."""
        tokens, cost = f"{self._tokens[0]:,} + {self._tokens[1]:,} tokens", self.prices.cost(*self._tokens)
        lost = f"{self.session.faults.total()} retries, {len(self.session.failed)} failed"
        return f"{tokens}, cost {cost:.2f}, {lost}"
