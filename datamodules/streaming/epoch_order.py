"""The order in which one rank reads an epoch's samples: a pure function of seed, epoch, rank and number of ranks.

It is computed on sample numbers alone, before anything is read. So the position in an epoch is one number, and resuming
reads nothing of what it skips.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np

Order = Literal["buffer", "block"]


@dataclass(frozen=True)
class EpochOrder:
    """The walk of one rank over the samples of each epoch.

    Shards are shuffled by (seed, epoch) and their samples laid in a row, turned by a random offset; each rank takes an
    equal stretch of it (`count % world_size` samples are left out, others in each epoch) and shuffles that.

    With `weights`, each source has an order of its own, epoch after epoch of it, and gives its weight's share of the
    slots, which they take in a fixed pattern: after any number of slots the shares are exact to within a few samples.

    Args:
        starts: numbers of each shard's first sample, and of all samples behind the last. [number of shards + 1]
        seed: of the shuffles, with the epoch and the rank.
        rank, world_size: this process, and the number of processes that divide the samples.
        shuffle_buffer: "buffer" draws the next sample at random out of so many; "block" shuffles each run of so many
            samples, which needs the shards of one block at a time.
        order: which of the two.
        weights: share of each source, with a sum of 1; None reads the sources as one. [number of sources]
        spans: number of shards of each source; needed with weights. [number of sources]
        variant: 0, or the number of another order of everything (`ShardStream.reorder`).
    """

    starts: Sequence[int]
    seed: int
    rank: int = 0
    world_size: int = 1
    shuffle_buffer: int = 10_000
    order: Order = "buffer"
    weights: Sequence[float] | None = None
    spans: Sequence[int] = ()
    variant: int = 0

    @property
    def num_samples(self) -> int:
        """Of this rank in an epoch."""
        return self.starts[-1] // self.world_size

    def numbers(self, epoch: int) -> list[int]:
        """The sample numbers of this rank in `epoch`. [num_samples]"""
        seed = f"{self.seed}+{self.variant}" if self.variant else f"{self.seed}"
        if self.weights is None:
            return self._plain(self.starts, seed, epoch)
        return self._mixed(seed, epoch)

    def source_starts(self) -> list[int]:
        """Numbers of each source's first sample, and of all samples behind the last. [number of sources + 1]"""
        return [self.starts[shard] for shard in accumulate(self.spans, initial=0)]

    def _plain(self, starts: Sequence[int], seed: str, epoch: int) -> list[int]:
        # The row of all ranks.
        rng = random.Random(f"{seed}/{epoch}")
        shards = list(range(len(starts) - 1))
        rng.shuffle(shards)
        row = [number for shard in shards for number in range(starts[shard], starts[shard + 1])]
        # This rank's stretch of it.
        num_samples = len(row) // self.world_size
        first = rng.randrange(len(row)) + self.rank * num_samples
        mine = (row[(first + k) % len(row)] for k in range(num_samples))
        rng = random.Random(f"{seed}/{epoch}/{self.rank}")
        shuffled = _shuffle_blocks if self.order == "block" else _shuffle_through_buffer
        return list(shuffled(mine, max(self.shuffle_buffer, 1), rng))

    def _mixed(self, seed: str, epoch: int) -> list[int]:
        slots = self._sources(self.num_samples)
        numbers = np.empty(self.num_samples, np.int64)
        ends = list(accumulate(self.spans))
        for source, end in enumerate(ends):
            # Every epoch takes as many of a source: its walk goes on where the last epoch's has ended.
            starts = self.starts[end - self.spans[source] : end + 1]
            places = np.flatnonzero(slots == source)
            walk = self._walk(starts, f"{seed}/{source}", epoch * len(places), len(places))
            numbers[places] = np.fromiter(walk, np.int64, len(places))
        return numbers.tolist()

    def _sources(self, length: int) -> np.ndarray:
        """The source of each slot. [length]

        Source s gives its k-th sample at the time (k + 1/2) / weight, on a clock that ticks once a slot. So by the
        time t it has given weight * t of them, rounded.
        """
        assert self.weights is not None
        counts = [int(weight * length) + len(self.weights) + 2 for weight in self.weights]  # more than are taken
        times = [(np.arange(count) + 0.5) / weight for count, weight in zip(counts, self.weights, strict=True)]
        sources = np.repeat(np.arange(len(counts)), counts)
        return sources[np.argsort(np.concatenate(times), kind="stable")[:length]]

    def _walk(self, starts: Sequence[int], seed: str, first: int, length: int) -> Iterator[int]:
        """`length` samples of one source from the `first`-th of its own epochs' walks on."""
        per_epoch = (starts[-1] - starts[0]) // self.world_size
        while length > 0:
            epoch, place = divmod(first, per_epoch)
            taken = self._plain(starts, seed, epoch)[place : place + length]
            yield from taken
            first, length = first + len(taken), length - len(taken)

    def reordered(self, variant: int) -> EpochOrder:
        """Another order of every epoch, the `variant`-th; 0 is the first."""
        return replace(self, variant=variant)


def _shuffle_through_buffer(items: Iterable[int], size: int, rng: random.Random) -> Iterator[int]:
    buffer: list[int] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        chosen = rng.randrange(len(buffer))
        yield buffer[chosen]
        buffer[chosen] = item
    rng.shuffle(buffer)
    yield from buffer


def _shuffle_blocks(items: Iterable[int], size: int, rng: random.Random) -> Iterator[int]:
    block: list[int] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            rng.shuffle(block)
            yield from block
            block = []
    rng.shuffle(block)
    yield from block
