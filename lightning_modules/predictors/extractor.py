"""A language model on a server that finds the chosen option in an answer, if the official parser finds no letter.

Replies are stored with a hash of their requests, so that no request is sent again if an evaluation is repeated or
rescored:

    <folder>/extractor-<key>.jsonl   {"key", "reply", "letter"}; the key in the file name is a hash of the model and its
    rules
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datamodules.metrics.extraction import Unread, extraction_request, read_extraction
from datamodules.persistence.files import Journal, fingerprint
from lightning_modules.serving.generation_rules import server_rules
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings, RequestRefused
from lightning_modules.serving.server_questions import ServerQuestions, Unanswered

log = logging.getLogger(__name__)
MAX_TOKENS = 1024  # enough for a letter after some thinking
CHECK = extraction_request("Which colour is the ball?", ("red", "green"), "The ball is green, so B.")


class Extractor:
    """Asks with greedy decoding, with up to `settings.concurrency` requests at a time.

    `failures` counts answers without a letter: "refused" and "unanswered" by the server (the next evaluation asks
    again), and "unreadable" replies.
    """

    def __init__(self, settings: EndpointSettings, folder: Path) -> None:
        self.settings = settings
        check = _messages(CHECK), "a short text", _require_letter
        self._server = ServerQuestions("extractor", settings, "greedy", MAX_TOKENS, *check)
        rules = [settings.model, settings.extra_body, server_rules(settings, "greedy"), MAX_TOKENS]
        key = fingerprint("extractor", rules)
        self._journal = Journal(folder / f"extractor-{key}.jsonl", key)
        self._replies = {record["key"]: record["reply"] for record in self._journal.records}
        self.failures: Counter[str] = Counter()

    def check_first(self) -> None:
        """Ask about a simple answer before hours of questions, unless a reply is stored already.

        Raises EndpointMisused or EndpointUnavailable if the server, the model or the key is wrong, or if the reply is
        not a letter.
        """
        if not self._replies:
            list(self._server.ask_all((), self._ask))

    def letters(self, answers: Sequence[Unread]) -> list[str | None]:
        """A letter for each answer; NO_OPTION if the answer picks no option; None if the request failed.

        Raises EndpointMisused and EndpointUnavailable; earlier replies stay stored.
        """
        missing = {answer.key: answer for answer in answers if answer.key not in self._replies}
        failed = dict(self._server.ask_all([*missing.values()], self._ask)) if missing else {}
        found = []
        for answer in answers:
            reply = self._replies.get(answer.key)
            found.append(None if reply is None else read_extraction(reply, answer.num_choices))
            if found[-1] is None:
                self.failures[failed.get(answer.key, "unreadable")] += 1
        return found

    async def _ask(self, endpoint: ChatEndpoint, answer: Unread) -> tuple[str, str]:
        """Write the reply about one answer to the journal. Returns (key, name of the failure if there is no letter)."""
        try:
            found = await self._server.complete(endpoint, _messages(answer.text))
        except (RequestRefused, Unanswered) as error:
            log.warning("no letter was extracted: %s", error)
            return answer.key, "refused" if isinstance(error, RequestRefused) else "unanswered"
        self._replies[answer.key] = found.text
        letter = read_extraction(found.text, answer.num_choices)
        self._journal.append([{"key": answer.key, "reply": found.text, "letter": letter}])
        return answer.key, "unreadable"


def _require_letter(reply: str) -> None:
    if read_extraction(reply, 2) is None:
        raise ValueError(f"asked for the letter of a plain answer, it replied {reply[:200]!r}")


def _messages(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]
