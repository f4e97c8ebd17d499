"""The training stream: the slots of one rank's walk over the samples, and what is made of each.

The order is a pure function of (seed, epoch, rank, world size), computed on sample numbers alone (`epoch_order`); tars
are then read at the offsets of their members. So a state is one number in an epoch, resuming decodes nothing of what it
skips, and the number of workers changes nothing.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.streaming.epoch_order import EpochOrder
from datamodules.streaming.fetch_ahead import FetchAhead
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.url_openers import FetchError
from datamodules.streaming.workers import in_shared_memory

Walk = Iterable[tuple[int, int]]  # (slot, number of the sample in it) in the order of reading

# What to do if no sample can be used because of a rule.
CURES = {
    "missing_thinking": "--data.style=answer trains on answers alone; `make synthesize` writes the thinking",
    "no_box_answer": "training needs one box as the answer",
}


class UnusableData(UserError, ValueError):
    """Samples that no run can be made of: too few for one batch, or none that can be used."""


def smaller_batch(count: int, ranks: int) -> str:
    """The setting with which `count` samples make a batch on every rank, for messages."""
    return f"--data.batch_size={count // ranks}" if count >= ranks else f"--trainer.devices={max(1, count)}"


class Slot(NamedTuple):
    """One place in the stream: what it holds, and the cursor after it."""

    cursor: int
    value: Any  # what `encode` returned, or the SampleError or FetchError; NoRoom where a worker cannot hand it over


class Window(NamedTuple):
    """A stretch of an epoch's walk."""

    epoch: int
    order: list[int]  # of the whole epoch
    cursor: int  # its first slot
    length: int


class ShardStream(IterableDataset):
    """One rank's endless walk over the samples of an epoch, a window of which is iterated (see `window`).

    Past the end of an epoch's order (`EpochOrder`), the walk starts over.

    Args:
        reader: the shards.
        encode: makes of a sample what a slot holds.
        seed, rank, world_size, shuffle_buffer: of the order.
        more: further fields of `EpochOrder`.
        fetching_ahead: fetches remote shards ahead of the reading (`ShardReader.fetching_ahead`); None: all are here.
    """

    def __init__(
        self,
        reader: ShardReader,
        encode: Callable[[LoadedSample], Any],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 10_000,
        fetching_ahead: Callable[[Iterable[Walk]], FetchAhead] | None = None,
        **more: Any,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..world_size-1, world_size={world_size}")
        self.reader, self.encode, self.fetching_ahead = reader, encode, fetching_ahead
        self.rank, self.world_size = rank, world_size
        self.plan = EpochOrder(reader.starts, seed, rank, world_size, shuffle_buffer, **more)
        self.num_samples = self.plan.num_samples
        if self.plan.weights is not None:
            for source, (first, end) in enumerate(pairwise(self.plan.source_starts())):
                if end - first < world_size:
                    fault = f"it has {end - first} samples, world_size={world_size}"
                    raise UnusableData(f"source {source} of data.shards cannot be mixed over all ranks: {fault}")
        self._window = Window(0, [], 0, 0)
        self._order: tuple[int, list[int]] | None = None

    def reorder(self, number: int) -> None:
        """Walk every epoch in another order, the `number`-th one; 0 is the first. Positions in it stay as they are."""
        self.plan = self.plan.reordered(number)
        self._order = None

    def order(self, epoch: int) -> list[int]:
        """The sample numbers of this rank in `epoch`. [num_samples]"""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.plan.numbers(epoch)
        return self._order[1]

    def source(self, epoch: int, cursor: int) -> int:
        """Which of the weighted sources the sample in the slot before `cursor` is from."""
        order = self.order(epoch)
        return bisect.bisect_right(self.plan.source_starts(), order[(cursor - 1) % len(order)]) - 1

    def name(self, epoch: int, cursor: int, number: int) -> str:
        """Shard, and place in it, of what lies in slot `cursor + number` of the epoch's walk; for messages."""
        order, starts = self.order(epoch), self.reader.starts
        sample = order[(cursor + number) % len(order)]
        shard = bisect.bisect_right(starts, sample) - 1
        return f"sample {sample - starts[shard]} of {self.reader.paths[shard].name}"

    def window(self, epoch: int, cursor: int, length: int) -> ShardStream:
        """The same stream, set to iterate slots `cursor` to `cursor + length` of the epoch's walk."""
        stream = copy.copy(self)
        stream._window = Window(epoch, self.order(epoch), cursor, length)
        return stream

    def __iter__(self) -> Iterator[Slot]:
        # A DataLoader asks its workers in turn, so worker w of W makes every W-th slot and the order is kept.
        worker = get_worker_info()
        skip, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        _, order, cursor, length = self._window
        # Workers keep pace with each other, and share the cache: the first one fetches ahead for all.
        fetches = self.fetching_ahead is not None and skip == 0 and length > 1
        with self.fetching_ahead(self._walks()) if fetches else nullcontext() as ahead:
            for place in range(cursor + skip, cursor + length, stride):
                if ahead is not None:
                    ahead.reached(place)
                try:
                    value = self.encode(self.reader.read(order[place % len(order)]))
                    value = in_shared_memory(value) if worker is not None else value
                except (SampleError, FetchError) as error:  # an error is handed over in its place, and judged there
                    value = error
                yield Slot(place + 1, value)
                if isinstance(value, FetchError):  # it ends the run, which would wait for the next slot's attempts too
                    return

    def _walks(self) -> Iterator[Walk]:
        """The rest of the epoch, and the next one, whose order is made when somebody gets there."""
        epoch, order, cursor, _ = self._window
        rest = order[cursor % len(order) :]
        yield enumerate(rest, cursor)
        yield enumerate(self.plan.numbers(epoch + 1), cursor + len(rest))
