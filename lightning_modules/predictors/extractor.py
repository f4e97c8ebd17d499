"""A language model behind a server that says which option an answer picks, where an official reader finds no letter.

Replies are kept by the content of their requests, so that an evaluation that is run or scored again asks nothing twice:

    <folder>/extractor-<key>.jsonl   {"key", "reply", "letter"}; the file's key is of the model and its rules
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datamodules.metrics.extraction import Unread, extraction_request, read_extraction
from datamodules.persistence.files import Journal, fingerprint
from lightning_modules.serving.generation_rules import require_taken, server_rules, stating
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)

log = logging.getLogger(__name__)
MAX_TOKENS = 1024  # a letter, after whatever thinking the model cannot leave out
CHECK_ATTEMPTS = 3
CHECK = extraction_request("Which colour is the ball?", ("red", "green"), "The ball is green, so B.")


class Extractor:
    """Asks greedily, with `settings.concurrency` requests under way at a time.

    `failures` counts answers without a letter: "refused" and "unanswered" by the server, about which the next
    evaluation asks again, and "unreadable" replies.
    """

    def __init__(self, settings: EndpointSettings, folder: Path) -> None:
        self.settings = settings
        self._stating = stating(settings, "greedy")
        rules = [settings.model, settings.extra_body, server_rules(settings, "greedy"), MAX_TOKENS]
        key = fingerprint("extractor", rules)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder / f"extractor-{key}.jsonl", key)
        self._replies = {record["key"]: record["reply"] for record in self._journal.records}
        self.failures: Counter[str] = Counter()
        self._checked = False

    def check_first(self) -> None:
        """Ask about a plain answer before hours of questions, unless a reply is kept already.

        Raises EndpointMisused or EndpointUnavailable if the server, the model or the key is wrong, or if the reply is
        no letter.
        """
        if not self._replies and not self._checked:
            asyncio.run(self._ask_all({}))

    def letters(self, answers: Sequence[Unread]) -> list[str | None]:
        """A letter for each, NO_OPTION where the answer picks none, None where it failed.

        Raises EndpointMisused and EndpointUnavailable; earlier replies are kept.
        """
        missing = {answer.key: answer for answer in answers if answer.key not in self._replies}
        failed: dict[str, str] = asyncio.run(self._ask_all(missing)) if missing else {}
        found = []
        for answer in answers:
            reply = self._replies.get(answer.key)
            found.append(None if reply is None else read_extraction(reply, answer.num_choices))
            if found[-1] is None:
                self.failures[failed.get(answer.key, "unreadable")] += 1
        return found

    async def _ask_all(self, missing: dict[str, Unread]) -> dict[str, str]:
        """Journals the replies; {key: kind of failure} of those that got none."""
        failed: dict[str, str] = {}
        waiting = iter(missing.values())
        async with ChatEndpoint(self._stating) as endpoint:
            if not self._checked:
                await self._check(endpoint)

            async def work() -> None:
                for answer in waiting:  # one iterator for all workers: each takes the next answer
                    kind = await self._ask(endpoint, answer)
                    if kind is not None:
                        failed[answer.key] = kind

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.settings.concurrency, len(missing))):
                        workers.create_task(work())
            except ExceptionGroup as group:  # each would say the same
                raise group.exceptions[0] from None
        return failed

    async def _ask(self, endpoint: ChatEndpoint, answer: Unread) -> str | None:
        try:
            found = await endpoint.complete(_messages(answer.text), MAX_TOKENS, 0.0)
        except RequestRefused as error:
            log.warning("no letter was extracted: %s", error)
            return "refused"
        except EndpointUnavailable as error:
            with suppress(RequestRefused):  # raises if the server is gone; else it fails on this one request
                await endpoint.complete(_messages(CHECK), 1, 0.0)
            log.warning("no letter was extracted: %s", error)
            return "unanswered"
        self._replies[answer.key] = found.text
        letter = read_extraction(found.text, answer.num_choices)
        self._journal.append([{"key": answer.key, "reply": found.text, "letter": letter}])
        return None

    async def _check(self, endpoint: ChatEndpoint) -> None:
        where = f"extractor: base_url={self.settings.base_url!r}, model={self.settings.model!r}"
        try:
            reply = (await endpoint.complete(_messages(CHECK), MAX_TOKENS, 0.0, attempts=CHECK_ATTEMPTS)).text
        except RequestRefused as error:
            await require_taken(self.settings, "greedy", _messages(CHECK), MAX_TOKENS)
            raise EndpointMisused(f"{where}: refuses a short text: {error}") from error
        if read_extraction(reply, 2) is None:
            raise EndpointMisused(f"{where}: asked for the letter of a plain answer, it replied {reply[:200]!r}")
        self._checked = True


def _messages(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]
