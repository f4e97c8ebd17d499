"""Asking a teacher: several responses to every question, asynchronously, each journalled the moment it is there."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from datamodules.encoding.chat_request import ChatRequest, RequestForm, build_request
from datamodules.persistence.files import Journal
from datamodules.samples.boxes import image_sizes_to_json
from datamodules.samples.sample import SampleError
from datamodules.samples.scores import require_box
from datamodules.streaming.shards import ShardReader
from lightning_modules.serving.generation_rules import server_fields
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)

REFUSALS = 8  # or losses, so many before the first answer, and it is the settings that are wrong
TRIES = 2  # of a question that gets no answer while the server answers others, the second one behind all of those
PROBE = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


@dataclass(frozen=True)
class Sampling:
    """`num_responses` to each question. The seed of each follows from `seed`, the sample's id and the number it has.

    So a server that heeds seeds gives the same ones in whatever order and after whichever interruption.
    """

    num_responses: int = 4
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"num_responses": self.num_responses, "max_tokens": self.max_tokens}
        faults = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
        if not 0 <= self.temperature <= 2:
            faults.append(f"temperature={self.temperature} must be in 0..2")
        if self.num_responses > 1 and self.temperature == 0:
            faults.append(f"temperature=0 makes the num_responses={self.num_responses} responses one and the same")
        if faults:
            raise ValueError(f"sampling: {'; '.join(faults)}")


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever currency; 0 for a server of one's own."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Session:
    """What one process did; what all did together is in the journal."""

    requests: int = 0  # answered
    faults: Counter[str] = field(default_factory=Counter)  # retried, by kind
    failed: dict[str, str] = field(default_factory=dict)  # {sample id: last fault}; asked by the next process


def request_seed(seed: int, sample_id: str, response: int) -> int:
    """A seed in 0..2^31-1, the range that every server takes."""
    digest = hashlib.sha256(f"{seed}/{response}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def missing_responses(records: list[dict[str, Any]], count: int, num_responses: int) -> dict[int, list[int]]:
    """{number: responses to ask for} of questions 0..count-1, in order; those that were rejected need none."""
    missing = {number: set(range(num_responses)) for number in range(count)}
    for record in records:
        if "rule" in record:
            missing.pop(record["number"], None)
        elif record["number"] in missing:
            missing[record["number"]].discard(record["response"])
    return {number: sorted(responses) for number, responses in missing.items() if responses}


@dataclass
class _Question:
    number: int
    responses: list[int]  # still to be asked for
    tries: int = 0


class Teacher:
    """One run over the questions that the journal does not answer yet.

    Sampling is by temperature alone: every other sampler is stated as neutral, unless extra_body says otherwise.
    `concurrency` workers take a question each and ask for its responses one after the other (so a server that caches
    prefixes reads the images once). Memory holds no more than one question for each worker.
    """

    def __init__(
        self,
        reader: ShardReader,
        endpoint: EndpointSettings,
        form: RequestForm,
        sampling: Sampling,
        journal: Journal,
        prices: Prices,
    ) -> None:
        self.reader, self.form, self.sampling = reader, form, sampling
        self.settings = replace(endpoint, extra_body=server_fields(endpoint) | endpoint.extra_body)
        self.journal, self.prices = journal, prices
        self.session = Session()
        self._bar: tqdm | None = None  # the live line
        self._refused: list[dict[str, Any]] | None = []  # held back until the server answers anything; then None
        self._lost = 0  # questions that got no answer, each time counted
        known = [record for record in journal.records if "text" in record]
        if known:
            self._refused = None
        self._tokens = [sum(record[name] for record in known) for name in ("prompt_tokens", "completion_tokens")]

    def run(self, count: int) -> Session:
        """Ask for what is missing of the first `count` questions; `Session.failed` are those that got no answer.

        Raises EndpointUnavailable when the server does not answer at all any more, or has answered no question and
        lost `REFUSALS`, or all; and EndpointMisused when it does not know the key or the model, or
        refuses as many before it has answered any: then the settings are wrong, and no question is marked as refused.
        """
        missing = missing_responses(self.journal.records, count, self.sampling.num_responses)
        if missing:
            try:
                asyncio.run(self._ask_all(missing, count))
            except ExceptionGroup as group:  # of the workers; each would say the same
                raise group.exceptions[0] from None
        if self._refused:
            raise self._misused()
        if self.session.failed and not self._answered:
            raise EndpointUnavailable(next(iter(self.session.failed.values())))
        return self.session

    @property
    def _answered(self) -> bool:
        return self._refused is None

    async def _ask_all(self, missing: dict[int, list[int]], count: int) -> None:
        total = count * self.sampling.num_responses
        asked = sum(len(responses) for responses in missing.values())
        questions = deque(_Question(*each) for each in missing.items())
        # One thread reads and encodes images: the reader is not for several, and the server is what takes the time.
        with ThreadPoolExecutor(max_workers=1) as pool:
            self._bar = tqdm(total=total, initial=total - asked, desc="teacher", unit="response", smoothing=0.05)
            with self._bar:
                async with ChatEndpoint(self.settings) as endpoint:
                    self.session.faults = endpoint.faults
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(min(self.settings.concurrency, len(missing))):
                            workers.create_task(self._work(questions, endpoint, pool))

    async def _work(self, questions: deque[_Question], endpoint: ChatEndpoint, pool: ThreadPoolExecutor) -> None:
        while questions:
            question = questions.popleft()
            try:
                loop = asyncio.get_running_loop()
                sample_id, request = await loop.run_in_executor(pool, self._prepare, question.number)
                await self._ask(question, sample_id, request, endpoint)
            except SampleError as error:
                rejected = {"number": question.number, "id": error.sample_id, "rule": error.rule}
                self._reject(rejected | {"detail": error.detail})
                self._bar.update(len(question.responses))
            except EndpointUnavailable as error:
                await self._require_answer(endpoint)
                question.tries += 1
                if question.tries < TRIES:
                    questions.append(question)
                else:
                    self.session.failed[sample_id] = str(error)
                self._lost += 1
                if not self._answered and self._lost >= REFUSALS:
                    raise

    async def _require_answer(self, endpoint: ChatEndpoint) -> None:
        """Raises EndpointUnavailable where the server does not even answer the smallest question."""
        with suppress(RequestRefused):
            await endpoint.complete(PROBE, 1, self.sampling.temperature)

    def _reject(self, record: dict[str, Any]) -> None:
        if record["rule"] != "refused" or self._refused is None:
            self.journal.append([record])
            return
        self._refused.append(record)
        if len(self._refused) >= REFUSALS:
            raise self._misused()

    def _misused(self) -> EndpointMisused:
        asked = f"base_url={self.settings.base_url!r}, model={self.settings.model!r}"
        return EndpointMisused(
            f"{asked}: {len(self._refused)} questions were refused and none was answered; first: "
            f"{self._refused[0]['detail']}; a server that refuses {', '.join(server_fields(self.settings))} may take"
            " requests with endpoint.sampling_fields=openai"
        )

    def _prepare(self, number: int) -> tuple[str, ChatRequest]:
        loaded = self.reader.read(number)
        require_box(loaded.sample)
        return loaded.sample.id, build_request(loaded, self.form)

    async def _ask(self, question: _Question, sample_id: str, request: ChatRequest, endpoint: ChatEndpoint) -> None:
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
            self.journal.append([*(self._refused or ()), record])
            self._refused = None
            question.responses.pop(0)
            self._count(found.prompt_tokens, found.completion_tokens)

    def _count(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.session.requests += 1
        self._tokens[0] += prompt_tokens
        self._tokens[1] += completion_tokens
        shown = {"tokens": f"{self._tokens[0]}+{self._tokens[1]}", "cost": f"{self.prices.cost(*self._tokens):.2f}"}
        shown |= {"retries": self.session.faults.total(), "failed": len(self.session.failed)}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
