"""The order in which a rank reads the samples of an epoch: a pure function of seed, epoch, rank and number of ranks.

The order is computed from sample numbers, before any sample is read. So the position in an epoch is one number, and
resuming does not read the skipped samples.
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
    """The order of samples of one rank in each epoch.

    The shards are shuffled with (seed, epoch), and their samples are concatenated and rotated by a random offset. Each
    rank takes a contiguous part of equal length and shuffles it. `count % world_size` samples are skipped, other ones
    in each epoch.

    With `weights`, each source has its own order, over as many of its own epochs as needed. The sources alternate in a
    fixed pattern, so that after any number of samples each source has its weight's share, within a few samples.

    Args:
        starts: [number of shards + 1], the number of each shard's first sample, and the total number of samples.
        seed: seed of the shuffles, together with the epoch and the rank.
        rank, world_size: this process, and the number of processes that divide the samples.
        shuffle_buffer: size of the buffer from which "buffer" draws the next sample at random, or of the blocks that
            "block" shuffles. With "block", only the shards of one block are needed at a time.
        order: "buffer" or "block".
        weights: [number of sources], the share of each source, with sum 1; None joins all sources.
        spans: [number of sources], the number of shards of each source; needed with `weights`.
        variant: number of the order; 0 is the first one (`ShardStream.reorder`).
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
        """Number of samples of this rank in an epoch."""
        return self.starts[-1] // self.world_size

    def numbers(self, epoch: int) -> list[int]:
        """The sample numbers of this rank in `epoch`: [num_samples]."""
        seed = f"{self.seed}+{self.variant}" if self.variant else f"{self.seed}"
        if self.weights is None:
            return self._plain(self.starts, seed, epoch)
        return self._mixed(seed, epoch)

    def source_starts(self) -> list[int]:
        """[number of sources + 1]: the number of each source's first sample, and the total number of samples."""
        return [self.starts[shard] for shard in accumulate(self.spans, initial=0)]

    def _plain(self, starts: Sequence[int], seed: str, epoch: int) -> list[int]:
        # The concatenated samples of all ranks.
        rng = random.Random(f"{seed}/{epoch}")
        shards = list(range(len(starts) - 1))
        rng.shuffle(shards)
        row = [number for shard in shards for number in range(starts[shard], starts[shard + 1])]
        # The part of this rank.
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
            # Every epoch takes the same number of samples from a source, and continues after the last epoch's samples.
            starts = self.starts[end - self.spans[source] : end + 1]
            places = np.flatnonzero(slots == source)
            walk = self._walk(starts, f"{seed}/{source}", epoch * len(places), len(places))
            numbers[places] = np.fromiter(walk, np.int64, len(places))
        return numbers.tolist()

    def _sources(self, length: int) -> np.ndarray:
        """The source of each slot: [length].

        Source s gives its k-th sample at the time (k + 1/2) / weight, where one slot is one unit of time. So until time
        t, it gives round(weight * t) samples.
        """
        assert self.weights is not None
        counts = [int(weight * length) + len(self.weights) + 2 for weight in self.weights]  # more than needed
        times = [(np.arange(count) + 0.5) / weight for count, weight in zip(counts, self.weights, strict=True)]
        sources = np.repeat(np.arange(len(counts)), counts)
        return sources[np.argsort(np.concatenate(times), kind="stable")[:length]]

    def _walk(self, starts: Sequence[int], seed: str, first: int, length: int) -> Iterator[int]:
        """`length` samples of one source, from position `first` in its endless order."""
        per_epoch = (starts[-1] - starts[0]) // self.world_size
        while length > 0:
            epoch, place = divmod(first, per_epoch)
            taken = self._plain(starts, seed, epoch)[place : place + length]
            yield from taken
            first, length = first + len(taken), length - len(taken)

    def reordered(self, variant: int) -> EpochOrder:
        """Change the order of every epoch to number `variant`; 0 is the first one."""
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
