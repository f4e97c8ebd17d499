"""Full batches of one rank, with a state from which a killed run resumes exactly at the next sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import SampleError
from datamodules.streaming.prefetch import prefetch
from datamodules.streaming.stream import CURES, ShardStream, Slot, UnusableData, smaller_batch
from datamodules.streaming.url_openers import FetchError
from datamodules.streaming.workers import NoRoom, Workers, no_room, num_ahead_of_each

logger = logging.getLogger(__name__)

NUM_BATCHES_AHEAD = 2  # number of batches that are encoded in advance; it limits the memory
BY_RANK = ("cursors", "taken")  # fields of a state that have one value per rank
WORKER_SECONDS = 600.0  # time limit of a worker for one sample; enough for a slow disk


class Position(NamedTuple):
    """The position of a rank: number of batches of this epoch, and number of samples read for them."""

    epoch: int
    batch: int
    cursor: int
    # for weighted sources: number of samples of each source in all batches since the first epoch
    taken: tuple[int, ...] = ()


class BatchLoader:
    """An endless stream of full batches of one rank; each `iter` yields the rest of the current epoch.

    Every epoch has `len(self)` = samples per rank // batch size batches on every rank, so that all ranks make the same
    number of steps. The remaining samples of an epoch are dropped; they differ between epochs. A rejected sample is
    replaced by the next one in the order: first by the samples that would be dropped, then by the first samples of the
    epoch again. `iter` starts after the last batch that was marked as trained, or after the last finished epoch.
    """

    def __init__(
        self,
        stream: ShardStream,
        batch_size: int,
        num_workers: int,
        rejections: Rejections,
        worker_seconds: float = WORKER_SECONDS,
    ) -> None:
        self.stream, self.batch_size, self.num_workers, self.rejections = stream, batch_size, num_workers, rejections
        self.worker_seconds = worker_seconds
        self.workers: Workers | None = None  # workers of the last iterated epoch, if there are any
        self.settings = {
            "seed": stream.plan.seed,
            "world_size": stream.world_size,
            "batch_size": batch_size,
            "shuffle_buffer": stream.plan.shuffle_buffer,
            "data": stream.reader.fingerprint,
        }
        # Written only if they differ from the values of older versions, so that older states stay valid.
        if stream.plan.order != "buffer":
            self.settings["order"] = stream.plan.order
        if (weights := stream.plan.weights) is not None:
            self.settings["weights"] = list(weights)
        if len(self) == 0:
            count, ranks = stream.reader.count, stream.world_size
            raise UnusableData(
                f"not one batch for every rank: {count} samples, batch_size={batch_size}, world_size={ranks}. Use "
                f"{smaller_batch(count, ranks)}"
            )
        self._trained = Position(0, 0, 0, (0,) * len(weights or ()))
        self._start = self._trained  # start of the next `iter`
        self._rejected: set[str] = set()
        self._num_reported = 0

    def __len__(self) -> int:
        return self.stream.num_samples // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, done, cursor, taken = self._start
        items: list[EncodedSample] = []
        num_misses = 0
        for slot in self._slots(epoch, cursor, (len(self) - done) * self.batch_size):
            if isinstance(slot.value, FetchError):
                raise slot.value
            if isinstance(slot.value, SampleError):
                num_misses += 1
                self._reject(slot.value, num_misses)
                continue
            items.append(slot.value)
            if taken:
                source = self.stream.source(epoch, slot.cursor)
                taken = (*taken[:source], taken[source] + 1, *taken[source + 1 :])
            num_misses = 0
            if len(items) < self.batch_size:
                continue
            done += 1
            is_last = done == len(self)
            position = Position(epoch + 1, 0, 0, taken) if is_last else Position(epoch, done, slot.cursor, taken)
            # set before the yield, because a caller that counts batches does not call `next` after the last one
            if is_last:
                self._start = position
                self.report()
            yield Batch(items, self._state(position), slot.cursor, slot.cursor - done * self.batch_size)
            if is_last:
                return
            items = []

    def mark_trained(self, batch: Batch) -> None:
        self.load_state_dict(batch.position)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last trained batch, with the positions of all ranks. All ranks must call it together."""
        state = self._state(self._trained)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and self.stream.world_size > 1:
            gathered: list[Any] = [None] * self.stream.world_size
            torch.distributed.all_gather_object(gathered, {name: state[name] for name in BY_RANK if name in state})
            for name in gathered[0]:
                state[name] = {rank: value for one in gathered for rank, value in one[name].items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Raises ValueError if it belongs to another stream (data, seed, order, weights, batch size).

        With another number of ranks, the order of samples differs. Then the rest of the epoch is skipped and the stream
        continues with the next epoch, so that no sample occurs twice in an epoch. A state between two epochs loses
        nothing. The batch size may change too, so that the global batch size can stay the same.
        """
        divided_anew = state["stream"].get("world_size") != self.stream.world_size
        free = {"world_size", "batch_size"} if divided_anew else set()
        changed = [
            f"{name}={self.settings.get(name)!r}, saved with {state['stream'].get(name)!r}"
            for name in self.settings | state["stream"]
            if name not in free and state["stream"].get(name) != self.settings.get(name)
        ]
        if not divided_anew and str(self.stream.rank) not in state["cursors"]:
            changed.append(f"rank={self.stream.rank}, saved for ranks {sorted(state['cursors'])}")
        if changed:
            raise ValueError("cannot resume this data stream exactly: " + "; ".join(changed))
        if divided_anew:
            self._trained = Position(state["epoch"] + (state["batch"] > 0), 0, 0, self._taken_by_all(state))
            if state["batch"] > 0 and self.stream.rank == 0:
                logger.warning(
                    "world_size=%d, saved with %d: the rest of epoch %d is left out, the next one begins",
                    *(self.stream.world_size, state["stream"]["world_size"], state["epoch"]),
                )
        else:
            rank = str(self.stream.rank)
            taken = tuple(state["taken"][rank]) if "taken" in state else ()
            self._trained = Position(state["epoch"], state["batch"], state["cursors"][rank], taken)
        self._start = self._trained

    def _taken_by_all(self, state: dict[str, Any]) -> tuple[int, ...]:
        """For another number of ranks: rank 0 continues with the sum of the counts."""
        counts = zip(*state.get("taken", {}).values(), strict=True)
        return tuple(sum(each) if self.stream.rank == 0 else 0 for each in counts)

    def shares(self) -> list[float]:
        """The share of each weighted source in the trained samples of this rank; [] without weights."""
        total = sum(self._trained.taken)
        return [count / total for count in self._trained.taken] if total else []

    def report(self) -> None:
        """Log rejected samples if there are new ones."""
        if len(self.rejections) > self._num_reported:
            self._num_reported = len(self.rejections)
            logger.warning("rank %d: %s", self.stream.rank, self.rejections.summary())

    def _state(self, position: Position) -> dict[str, Any]:
        epoch, batch, cursor, taken = position
        rank = str(self.stream.rank)
        state = {"epoch": epoch, "batch": batch, "cursors": {rank: cursor}, "stream": self.settings}
        return state | ({"taken": {rank: list(taken)}} if taken else {})

    def _slots(self, epoch: int, cursor: int, length: int) -> Iterator[Slot]:
        """Yields the encoded samples of the epoch from the workers, or from a thread without workers.

        First the `length` samples that are enough if none is rejected, then more.
        """
        window, num_ahead = self.stream.window(epoch, cursor, length), NUM_BATCHES_AHEAD * self.batch_size
        if self.num_workers == 0:
            yield from prefetch(window, num_ahead)
        else:
            names = partial(self.stream.name, epoch, cursor)
            self.workers = Workers(window, self.num_workers, num_ahead, self.worker_seconds, names)
            for number, slot in enumerate(self.workers):
                if isinstance(slot.value, NoRoom):
                    raise no_room(number % self.num_workers, slot.value)
                yield slot
        cursor += length
        while True:
            yield from self.stream.window(epoch, cursor, 1)
            cursor += 1

    def _reject(self, error: SampleError, num_misses: int) -> None:
        if error.sample_id not in self._rejected or self.rejections.strict:
            self._rejected.add(error.sample_id)
            self.rejections.add(error)
        if num_misses >= self.stream.num_samples:
            cures = "".join(f"\n{rule}: {CURES[rule]}" for rule in self.rejections.counts if rule in CURES)
            raise UnusableData(f"no usable sample in a whole epoch: {self.rejections.summary()}{cures}")


def num_samples_held(batch_size: int, num_workers: int) -> int:
    """Largest number of encoded samples in memory: those that workers encode in advance, the batch in training, and the
    next one.
    """
    return num_workers * num_ahead_of_each(num_workers, NUM_BATCHES_AHEAD * batch_size) + 2 * batch_size
