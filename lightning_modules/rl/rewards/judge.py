"""A reward from a language model on an OpenAI-compatible server. All texts of a step are graded in parallel."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Literal

from datamodules.persistence.problems import Problems
from lightning_modules.rl.rewards.completion import Completion, Failed
from lightning_modules.serving.background_loop import event_loop
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings, EndpointUnavailable, RequestRefused

log = logging.getLogger(__name__)
PROMPT = """A model was asked to find an object in several images. Grade how well its reasoning supports its answer.
Question: {question}
The object: {label}
The model wrote:
{text}
Reply with one number from 0 (no support) to {highest} (full support), and nothing else."""
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


class Judge:
    """The grade of a judging model divided by `highest`, 0 to 1. The judge reads only text, no images.

    All completions of a step are sent at once, `concurrency` at a time. A completion without a grade (no answer in
    time, a refused request, a reply without a number from 0 to `highest`) is counted as `reward/<name>/failed`.

    Args:
        base_url: address of the server, such as http://localhost:8000/v1.
        model: name of the model on the server.
        prompt: the request; {question}, {label}, {text} and {highest} are filled in.
        highest: the best grade; 0 is the worst.
        on_failure: "zero" gives 0 to a completion without a grade; "leave_out" skips its whole group in this step.
        max_tokens: largest number of tokens of a reply.
        timeout: seconds for one attempt.
        attempts: number of attempts for a completion.
        concurrency: number of requests at the same time.
        api_key_env: the environment variable that holds the server's key.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        base_url: str,
        model: str,
        prompt: str = PROMPT,
        highest: float = 10,
        on_failure: Literal["zero", "leave_out"] = "zero",
        max_tokens: int = 16,
        timeout: float = 60.0,
        attempts: int = 2,
        concurrency: int = 16,
        api_key_env: str = "OPENAI_API_KEY",
    ) -> None:
        problems = Problems()
        is_request = isinstance(prompt, str) and "{text}" in prompt
        problems.require(is_request, "must be a text with the place {text}", prompt=str(prompt)[:40])
        problems.positive_number(highest=highest, timeout=timeout)
        problems.whole(1, max_tokens=max_tokens, attempts=attempts, concurrency=concurrency)
        problems.one_of(("zero", "leave_out"), on_failure=on_failure)
        named = isinstance(model, str) and bool(model)
        problems.require(named, "must be the server's name of the model", model=model)
        problems.require(isinstance(base_url, str), "must be the address of the server", base_url=base_url)
        problems.raise_all("Judge")
        self.endpoint = EndpointSettings(
            model, base_url, api_key_env, timeout=timeout, attempts=attempts, concurrency=concurrency
        )
        self.prompt, self.highest, self.max_tokens = prompt, highest, max_tokens
        self.failed = Failed(0.0 if on_failure == "zero" else None)
        highest_number = re.escape(f"{highest:g}")
        # A judge may repeat the scale beside its grade: "From 0 to 10: 7", "7/10". These numbers are no grade.
        self._scale = re.compile(
            rf"{_NUMBER.pattern}\s*(?:-|–|to)\s*{highest_number}\b|(?:/|\bof)\s*{highest_number}\b"
        )
        self._is_failing = False  # whether the last step had a failure
        self._was_reached = False  # whether the server has answered in any step

    def score_batch(self, completions: Sequence[Completion]) -> list[float | Failed]:
        """The grades of all completions, in their order.

        Raises:
            EndpointMisused: the key, the model or the path is wrong, so that no request can succeed.
        """
        with event_loop() as run:
            graded = run(lambda: self._grade_all(completions))
        faults = [fault for fault in graded if isinstance(fault, str)]
        if faults and not self._is_failing:  # the metric counts all failures; one line in the log has the reason
            log.warning("judge: %d of %d completions got no grade; first: %s", len(faults), len(graded), faults[0])
        self._is_failing = bool(faults)
        return [self.failed if isinstance(grade, str) else grade for grade in graded]

    def request(self, completion: Completion) -> str:
        """The prompt for one completion."""
        true = completion.true_boxes
        places = {"question": completion.question, "label": true[0].label if true else "", "text": completion.text}
        places["highest"] = f"{self.highest:g}"
        # Replaced in one pass, so that a "{label}" inside a completion is not replaced.
        return re.sub(r"\{(question|label|text|highest)\}", lambda place: places[place[1]], self.prompt)

    async def _grade_all(self, completions: Sequence[Completion]) -> list[float | str]:
        """The grade of each completion, or the reason why it has none."""
        free = asyncio.Semaphore(self.endpoint.concurrency)
        # A client belongs to one event loop, so each step makes its own.
        async with ChatEndpoint(self.endpoint, self._was_reached) as server:

            async def grade(completion: Completion) -> float | str:
                message = {"role": "user", "content": [{"type": "text", "text": self.request(completion)}]}
                try:
                    async with free:
                        reply = await server.complete([message], self.max_tokens, temperature=0.0)
                except (EndpointUnavailable, RequestRefused) as error:
                    return str(error)
                return self._read(reply.text)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(grade(completion)) for completion in completions]
            except ExceptionGroup as errors:  # a misused server gives the same error to all requests
                raise errors.exceptions[0] from None
            self._was_reached = server.was_reached
        return [task.result() for task in tasks]

    def _read(self, reply: str) -> float | str:
        """The number of a reply beside its scale, scaled to 0-1, or the problem of the reply."""
        grades = set(map(float, _NUMBER.findall(self._scale.sub(" ", reply[:1000]))))
        # Of several numbers nobody knows which is the grade: "The 2 images support it: 8".
        if len(grades) != 1 or not 0 <= min(grades) <= self.highest:
            return f"the reply {reply[:80]!r} is not one number from 0 to {self.highest:g}"
        return grades.pop() / self.highest
