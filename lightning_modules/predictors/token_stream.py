"""Show an answer while it is decoded: from token ids so far to the text so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_modules.predictors.base import Show

Watch = Callable[[list[int]], None]  # gets the token ids of an answer so far


def show_tokens(tokenizer: Any, show: Show) -> Watch:
    """A `Watch` that decodes the tokens and gives the text to `show`.

    A character may be made of several tokens. Until the last of them is there, it is left out.
    """

    def watch(ids: list[int]) -> None:
        show(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))

    return watch


class TokenStreamer:
    """A streamer of transformers' `generate` that gives all token ids so far to `watch`."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.ids: list[int] | None = None

    @classmethod
    def of(cls, config: Any, watch: Watch | None) -> TokenStreamer | None:
        """None without `watch`, or with beam search, whose best beam is known only at the end."""
        return None if watch is None or (config.num_beams or 1) > 1 else cls(watch)

    def put(self, value: Any) -> None:
        """Called by `generate`: first with the prompt, then with each new token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self.watch(self.ids)

    def end(self) -> None:
        """Called by `generate` after the last token."""
