"""The training stream: one rank's samples in a shuffled order that can be resumed exactly, and their batches.

The order is a pure function of (seed, epoch, rank, world size), computed on sample numbers alone; tars are then read at
the offsets of their members. So a state is one number in an epoch, resuming decodes nothing of what it skips, and the
number of workers changes nothing.
"""

from __future__ import annotations

import bisect
import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import LoadedSample, Rejections, SampleError
from datamodules.streaming.prefetch import prefetch
from datamodules.streaming.shards import ShardReader
from datamodules.streaming.workers import NoRoom, Workers, in_shared_memory, no_room, num_ahead_of_each

logger = logging.getLogger(__name__)

NUM_BATCHES_AHEAD = 2  # encoded and waiting to be asked for; what bounds memory
WORKER_SECONDS = 600.0  # that a worker may take for one sample: more than a slow disk needs

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
    value: Any  # what `encode` returned, or the SampleError; NoRoom where a worker cannot hand it over


class ShardStream(IterableDataset):
    """One rank's endless walk over the samples of an epoch, a window of which is iterated (see `window`).

    Shards are shuffled by (seed, epoch) and their samples laid in a row, turned by a random offset; each rank takes an
    equal stretch of it (`count % world_size` samples are left out, others in each epoch) and shuffles that through a
    buffer of `shuffle_buffer` numbers, so that it reads from few tars at a time. Past its end, the walk starts over.
    """

    def __init__(
        self,
        reader: ShardReader,
        encode: Callable[[LoadedSample], Any],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 10_000,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..world_size-1, world_size={world_size}")
        self.reader, self.encode = reader, encode
        self.seed, self.rank, self.world_size, self.shuffle_buffer = seed, rank, world_size, shuffle_buffer
        self.num_samples = reader.count // world_size  # of this rank in an epoch
        self._window: tuple[list[int], int, int] = ([], 0, 0)
        self._order: tuple[int, list[int]] | None = None
        self._variant = ""

    def reorder(self, number: int) -> None:
        """Walk every epoch in another order, the `number`-th one; 0 is the first. Positions in it stay as they are."""
        self._variant = f"+{number}" if number else ""
        self._order = None

    def order(self, epoch: int) -> list[int]:
        """The sample numbers of this rank in `epoch`."""
        if self._order is None or self._order[0] != epoch:
            starts = self.reader.starts
            rng = random.Random(f"{self.seed}{self._variant}/{epoch}")
            shards = list(range(len(starts) - 1))
            rng.shuffle(shards)
            row = [number for shard in shards for number in range(starts[shard], starts[shard + 1])]
            first = rng.randrange(len(row)) + self.rank * self.num_samples
            mine = (row[(first + k) % len(row)] for k in range(self.num_samples))
            rng = random.Random(f"{self.seed}{self._variant}/{epoch}/{self.rank}")
            self._order = epoch, list(_shuffle_through_buffer(mine, self.shuffle_buffer, rng))
        return self._order[1]

    def name(self, epoch: int, cursor: int, number: int) -> str:
        """Shard, and place in it, of what lies in slot `cursor + number` of the epoch's walk; for messages."""
        order, starts = self.order(epoch), self.reader.starts
        sample = order[(cursor + number) % len(order)]
        shard = bisect.bisect_right(starts, sample) - 1
        return f"sample {sample - starts[shard]} of {self.reader.paths[shard].name}"

    def window(self, epoch: int, cursor: int, length: int) -> ShardStream:
        """The same stream, set to iterate slots `cursor` to `cursor + length` of the epoch's walk."""
        stream = copy.copy(self)
        stream._window = (self.order(epoch), cursor, length)
        return stream

    def __iter__(self) -> Iterator[Slot]:
        # A DataLoader asks its workers in turn, so worker w of W makes every W-th slot and the order is kept.
        worker = get_worker_info()
        skip, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        order, cursor, length = self._window
        for place in range(cursor + skip, cursor + length, stride):
            try:
                value = self.encode(self.reader.read(order[place % len(order)]))
                value = in_shared_memory(value) if worker is not None else value
            except SampleError as error:
                value = error
            yield Slot(place + 1, value)


class Position(NamedTuple):
    """Where a rank's stream stands: batches given of this epoch, and slots of its walk used for them."""

    epoch: int
    batch: int
    cursor: int


class BatchLoader:
    """Full batches of one rank, endlessly many epochs long; each `iter` gives what is left of the current epoch.

    Every epoch has `len(self)` = samples per rank // batch size batches on every rank, so all ranks step together; what
    would not fill a batch is dropped, other samples in each epoch. A rejected sample's place is taken by the next one
    of the walk: first by those that would have been dropped, then, as the walk starts over, by a second look at its
    first. `iter` starts after the last batch marked as trained, or after the epoch that was iterated to its end.
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
        self.workers: Workers | None = None  # of the last epoch that was iterated, where there are any
        self.settings = {
            "seed": stream.seed,
            "world_size": stream.world_size,
            "batch_size": batch_size,
            "shuffle_buffer": stream.shuffle_buffer,
            "data": stream.reader.fingerprint,
        }
        if len(self) == 0:
            count, ranks = stream.reader.count, stream.world_size
            raise UnusableData(
                f"not one batch for every rank: {count} samples, batch_size={batch_size}, world_size={ranks}. Use "
                f"{smaller_batch(count, ranks)}"
            )
        self._trained = Position(0, 0, 0)
        self._start = Position(0, 0, 0)  # of the next `iter`
        self._rejected: set[str] = set()
        self._num_reported = 0

    def __len__(self) -> int:
        return self.stream.num_samples // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, done, cursor = self._start
        items: list[EncodedSample] = []
        num_misses = 0
        for slot in self._slots(epoch, cursor, (len(self) - done) * self.batch_size):
            if isinstance(slot.value, SampleError):
                num_misses += 1
                self._reject(slot.value, num_misses)
                continue
            items.append(slot.value)
            num_misses = 0
            if len(items) < self.batch_size:
                continue
            done += 1
            is_last = done == len(self)
            position = Position(epoch + 1, 0, 0) if is_last else Position(epoch, done, slot.cursor)
            if is_last:  # before the yield: a caller that counts batches does not come back after the last
                self._start = position
                self.report()
            yield Batch(items, self._state(position))
            if is_last:
                return
            items = []

    def mark_trained(self, batch: Batch) -> None:
        self.load_state_dict(batch.position)

    def state_dict(self) -> dict[str, Any]:
        """State after the last trained batch, with the cursors of all ranks: all must call it, as for a checkpoint."""
        state = self._state(self._trained)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and self.stream.world_size > 1:
            gathered: list[Any] = [None] * self.stream.world_size
            torch.distributed.all_gather_object(gathered, state["cursors"])
            state["cursors"] = {rank: cursor for cursors in gathered for rank, cursor in cursors.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of another stream (data, seed, shuffle buffer, batch size).

        With another number of ranks, samples lie on other ranks in another order: what was left of the state's epoch
        is left out, and the stream goes on with the next epoch, so that none is seen twice in one. A state between two
        epochs loses nothing. The batch size may then change too, so that a global batch stays as large as it was.
        """
        divided_anew = state["stream"].get("world_size") != self.stream.world_size
        free = {"world_size", "batch_size"} if divided_anew else set()
        changed = [
            f"{name}={value!r}, saved with {state['stream'].get(name)!r}"
            for name, value in self.settings.items()
            if name not in free and state["stream"].get(name) != value
        ]
        if not divided_anew and str(self.stream.rank) not in state["cursors"]:
            changed.append(f"rank={self.stream.rank}, saved for ranks {sorted(state['cursors'])}")
        if changed:
            raise ValueError("cannot resume this data stream exactly: " + "; ".join(changed))
        if divided_anew:
            self._trained = Position(state["epoch"] + (state["batch"] > 0), 0, 0)
            if state["batch"] > 0 and self.stream.rank == 0:
                logger.warning(
                    "world_size=%d, saved with %d: the rest of epoch %d is left out, the next one begins",
                    *(self.stream.world_size, state["stream"]["world_size"], state["epoch"]),
                )
        else:
            self._trained = Position(state["epoch"], state["batch"], state["cursors"][str(self.stream.rank)])
        self._start = self._trained

    def report(self) -> None:
        """Log the rejections once there are new ones."""
        if len(self.rejections) > self._num_reported:
            self._num_reported = len(self.rejections)
            logger.warning("rank %d: %s", self.stream.rank, self.rejections.summary())

    def _state(self, position: Position) -> dict[str, Any]:
        epoch, batch, cursor = position
        return {"epoch": epoch, "batch": batch, "cursors": {str(self.stream.rank): cursor}, "stream": self.settings}

    def _slots(self, epoch: int, cursor: int, length: int) -> Iterator[Slot]:
        """The `length` slots that suffice if none is rejected, from the workers, or a thread without any; then more."""
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
    """Encoded samples that there are at once: made ahead by the workers, of the batch in training and of the next."""
    return num_workers * num_ahead_of_each(num_workers, NUM_BATCHES_AHEAD * batch_size) + 2 * batch_size


def _shuffle_through_buffer(items: Iterable[int], size: int, rng: random.Random) -> Iterator[int]:
    buffer: list[int] = []
    for item in items:
        if len(buffer) < max(size, 1):
            buffer.append(item)
            continue
        chosen = rng.randrange(len(buffer))
        yield buffer[chosen]
        buffer[chosen] = item
    rng.shuffle(buffer)
    yield from buffer
