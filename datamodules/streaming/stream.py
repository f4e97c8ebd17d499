"""The training stream of one rank: an ordered sequence of slots, each with an encoded sample or an error.

The order is a pure function of (seed, epoch, rank, world size) on sample numbers (`epoch_order`). The tars are then
read at the offsets of their members. So the state is one number in an epoch, resuming does not decode skipped samples,
and the order does not depend on the number of workers.
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

Walk = Iterable[tuple[int, int]]  # (slot, number of its sample) in the order of reading

# Advice for the user if no sample is usable because of a rule.
CURES = {
    "missing_thinking": "--data.style=answer trains on answers alone; `make synthesize` writes the thinking",
    "no_box_answer": "training needs one box as the answer",
}


class UnusableData(UserError, ValueError):
    """The samples cannot be used for training: too few for one batch, or none is usable."""


def smaller_batch(count: int, ranks: int) -> str:
    """The settings with which `count` samples are enough for a batch on every rank, for messages."""
    return f"--data.batch_size={count // ranks}" if count >= ranks else f"--trainer.devices={max(1, count)}"


class Slot(NamedTuple):
    """One position in the stream: its content, and the cursor after it."""

    cursor: int
    value: Any  # the result of `encode`, or a SampleError or FetchError; NoRoom if a worker cannot send it


class Window(NamedTuple):
    """A contiguous part of an epoch's order."""

    epoch: int
    order: list[int]  # order of the whole epoch
    cursor: int  # first slot of the part
    length: int


class ShardStream(IterableDataset):
    """The samples of one rank in the order of an epoch. Iterating yields the slots of a window (see `window`).

    After the end of the epoch's order (`EpochOrder`), the order repeats from its beginning.

    Args:
        reader: reads the shards.
        encode: converts a sample to the value of a slot.
        seed, rank, world_size, shuffle_buffer: arguments of `EpochOrder`.
        more: further fields of `EpochOrder`.
        fetching_ahead: downloads remote shards in advance (`ShardReader.fetching_ahead`); None if all shards are local.
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
        """Use order `number` in every epoch; 0 is the first. Positions in the epoch do not change."""
        self.plan = self.plan.reordered(number)
        self._order = None

    def order(self, epoch: int) -> list[int]:
        """The sample numbers of this rank in `epoch`: [num_samples]."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.plan.numbers(epoch)
        return self._order[1]

    def source(self, epoch: int, cursor: int) -> int:
        """The index of the weighted source of the sample before `cursor`."""
        order = self.order(epoch)
        return bisect.bisect_right(self.plan.source_starts(), order[(cursor - 1) % len(order)]) - 1

    def name(self, epoch: int, cursor: int, number: int) -> str:
        """The shard and the position in it of the sample in slot `cursor + number`, for messages."""
        order, starts = self.order(epoch), self.reader.starts
        sample = order[(cursor + number) % len(order)]
        shard = bisect.bisect_right(starts, sample) - 1
        return f"sample {sample - starts[shard]} of {self.reader.paths[shard].name}"

    def window(self, epoch: int, cursor: int, length: int) -> ShardStream:
        """This stream, set to iterate slots `cursor` to `cursor + length` of the epoch."""
        stream = copy.copy(self)
        stream._window = Window(epoch, self.order(epoch), cursor, length)
        return stream

    def __iter__(self) -> Iterator[Slot]:
        # A DataLoader reads its workers in turn. So worker w of W makes every W-th slot, and the order is kept.
        worker = get_worker_info()
        skip, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        _, order, cursor, length = self._window
        # Workers advance together and share the cache, so the first worker downloads in advance for all.
        fetches = self.fetching_ahead is not None and skip == 0 and length > 1
        with self.fetching_ahead(self._walks()) if fetches else nullcontext() as ahead:
            for place in range(cursor + skip, cursor + length, stride):
                if ahead is not None:
                    ahead.reached(place)
                try:
                    value = self.encode(self.reader.read(order[place % len(order)]))
                    value = in_shared_memory(value) if worker is not None else value
                # an error is yielded in place of the sample, and the caller decides about it
                except (SampleError, FetchError) as error:
                    value = error
                yield Slot(place + 1, value)
                # it ends the run; otherwise the run would also wait for the attempts of the next slot
                if isinstance(value, FetchError):
                    return

    def _walks(self) -> Iterator[Walk]:
        """The rest of this epoch and the next epoch. The next order is computed only when it is reached."""
        epoch, order, cursor, _ = self._window
        rest = order[cursor % len(order) :]
        yield enumerate(rest, cursor)
        yield enumerate(self.plan.numbers(epoch + 1), cursor + len(rest))
