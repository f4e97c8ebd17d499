"""Asynchronous rollouts: servers sample the next accumulation windows while the trainer updates.

With staleness S, the prompts of window k go to the servers before the updates of the S windows in front of it. So its
policy is S windows old, never more: window k is sampled with the weights after window k - S - 1, and the first S + 1
windows with those of the start. With S = 0 nothing is ahead.

Which policy samples which window depends on the number of the window alone, not on time. A checkpoint has the adapters
of the windows that are ahead. A resumed run sends their prompts again, with the same seeds, to the same adapters.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.encoding.encoder import Batch
    from lightning_modules.rollouts.base import Rollout, RolloutRequest
    from lightning_modules.rollouts.vllm.engine import VLLMEngine


@dataclass
class Round:
    """Batches whose prompts are sampled together: an accumulation window, or a part of a window that is refilled.

    `request` has the prompts of `batches`, in their order.
    """

    batches: list[Batch]
    first: int  # number of the first batch, of this rank, from 0
    request: RolloutRequest
    policy: int  # number of updates of the policy that samples
    submitted: Future[list[list[Rollout]]] | None = None  # None: not ahead
    adapter: Path | None = None  # file of the adapter that servers sample with; None: the native engine

    @property
    def sample_ids(self) -> list[str]:
        return [sample_id for batch in self.batches for sample_id in batch.sample_ids]


class SamplingAhead:
    """The windows that are ahead, oldest first.

    Args:
        staleness: S, the largest number of windows.
    """

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self._rounds: deque[Round] = deque()
        # From a checkpoint: {"policy": number of updates, "adapter": tensors} of the next windows.
        self._replayed: deque[dict[str, Any]] = deque()
        self._is_older = False  # whether the engine has the adapter of a replayed window

    def clear(self) -> None:
        """Forget the windows of a fit that was stopped; those of a checkpoint stay."""
        self._rounds.clear()

    @property
    def batches(self) -> list[Batch]:
        """The batches of this rank that wait for the training on their window."""
        return [batch for each in self._rounds for batch in each.batches]

    def submit(self, engine: VLLMEngine, window: Round) -> None:
        """Send a window's prompts to the servers. All ranks call this together."""
        if self._replayed:
            saved = self._replayed.popleft()
            engine.sync(saved["adapter"])
            self._is_older, window.policy = True, saved["policy"]
        elif self._is_older:
            engine.sync()
            self._is_older = False
        window.submitted, window.adapter = engine.submit(window.request), engine.adapter
        self._rounds.append(window)

    def due(self, is_last_batch: bool) -> Round | None:
        """The window to train on now: the oldest, if S others are ahead, or after the last batch."""
        is_due = len(self._rounds) > (0 if is_last_batch else self.staleness)
        return self._rounds[0] if is_due else None

    def finish(self, window: Round) -> None:
        """Call after the updates of a window."""
        if window.submitted is not None:
            self._rounds.popleft()

    def cancel(self) -> None:
        """Call after the last update, so that the servers are free for the evaluation that follows."""
        for each in self._rounds:
            each.submitted.cancel()

    def keep(self, engine: VLLMEngine) -> None:
        """Call before the engine is closed, which removes the adapters' files: a later checkpoint still has them."""
        self._replayed = deque(self.state_dict(engine))
        self._rounds.clear()

    def state_dict(self, engine: VLLMEngine) -> list[dict[str, Any]]:
        """For a checkpoint: the policies of the windows that are ahead."""
        own = [{"policy": each.policy, "adapter": engine.tensors(each.adapter)} for each in self._rounds]
        return [*own, *self._replayed]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._replayed = deque(state)
