from __future__ import annotations

import json
import random
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.encoding.encoder import Batch
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import SampleError
from datamodules.streaming.resumable_loader import BatchLoader
from datamodules.streaming.stream import ShardStream


class NumberReader:
    """Stands for a ShardReader over shards of the given sizes: sample k is the number k, or an error if it is bad."""

    def __init__(self, sizes: list[int], bad: frozenset[int] = frozenset()) -> None:
        self.starts = [0, *accumulate(sizes)]
        self.count = sum(sizes)
        self.fingerprint = str(sizes)
        self.paths = [Path(f"shard-{k}.tar") for k in range(len(sizes))]
        self.bad = bad

    def read(self, number: int) -> Any:
        if number in self.bad:
            raise SampleError(str(number), "bad_number")
        return SimpleNamespace(sample=SimpleNamespace(id=number))


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Setting:
    sizes: tuple[int, ...] = (5, 7, 1, 9)
    bad: frozenset[int] = frozenset()
    seed: int = 0
    world_size: int = 1
    batch_size: int = 3
    shuffle_buffer: int = 6
    num_workers: int = 0
    strict: bool = False

    def stream(self, rank: int = 0) -> ShardStream:
        reader = NumberReader(list(self.sizes), self.bad)
        return ShardStream(reader, same, self.seed, rank, self.world_size, self.shuffle_buffer)

    def loader(self, rank: int = 0) -> BatchLoader:
        return BatchLoader(self.stream(rank), self.batch_size, self.num_workers, Rejections(self.strict))


def train(loader: BatchLoader, num_epochs: int) -> list[list[int]]:
    """The ids of each batch of `num_epochs` epochs from where the loader stands."""
    batches = []
    for _ in range(num_epochs):
        for batch in loader:
            batches.append(batch.sample_ids)
            loader.mark_trained(batch)
    return batches


def random_settings(num: int, bad_share: float) -> list[Setting]:
    rng = random.Random(0)
    settings = []
    while len(settings) < num:
        sizes = tuple(rng.randint(1, 12) for _ in range(rng.randint(1, 5)))
        bad = frozenset(k for k in range(sum(sizes)) if rng.random() < bad_share)
        world_size, batch_size = rng.randint(1, 4), rng.randint(1, 4)
        good = sum(sizes) - len(bad)
        if sum(sizes) // world_size >= batch_size and good > len(bad) + world_size * batch_size:
            settings.append(Setting(sizes, bad, rng.randint(0, 9), world_size, batch_size, rng.randint(1, 20)))
    return settings


@pytest.mark.parametrize("setting", random_settings(12, bad_share=0.0), ids=str)
def test_an_epoch_gives_each_sample_at_most_once_and_drops_less_than_a_batch_per_rank(setting: Setting) -> None:
    count = sum(setting.sizes)
    for epoch in range(3):
        seen = Counter(k for rank in range(setting.world_size) for k in setting.stream(rank).order(epoch))
        assert max(seen.values()) == 1 and len(seen) == count - count % setting.world_size
    for rank in range(setting.world_size):
        batches = train(setting.loader(rank), 1)
        assert len(batches) == count // setting.world_size // setting.batch_size
        ids = [k for batch in batches for k in batch]
        assert ids == setting.stream(rank).order(0)[: len(ids)]


def test_order_depends_on_seed_epoch_and_rank_alone() -> None:
    setting = Setting(sizes=(50, 50), world_size=2)
    stream = setting.stream()
    assert stream.order(3) == setting.stream().order(3)
    others = [
        stream.order(4),
        setting.stream(1).order(3),
        Setting(setting.sizes, seed=1, world_size=2).stream().order(3),
    ]
    assert all(other != stream.order(3) for other in others)
    assert stream.order(3) == setting.stream().order(3)  # asking for other epochs in between changes nothing


def test_dropped_samples_are_others_in_each_epoch() -> None:
    setting = Setting(sizes=(10,), world_size=3, batch_size=3, shuffle_buffer=1)
    dropped = [
        set(range(10)) - {k for rank in range(3) for k in setting.stream(rank).order(epoch)} for epoch in range(30)
    ]
    assert all(len(left_out) == 1 for left_out in dropped) and len(set.union(*dropped)) > 5


def test_buffer_bounds_how_far_samples_move() -> None:
    order = Setting(sizes=(100,) * 20, shuffle_buffer=30).stream().order(0)
    for first in range(0, len(order), 100):
        assert len({k // 100 for k in order[first : first + 100]}) <= 5
    assert len({b - a for a, b in pairwise(order)}) > 50


@pytest.mark.parametrize("num_workers", [1, 2])
def test_number_of_workers_changes_nothing(num_workers: int) -> None:
    alone = Setting(bad=frozenset({1, 2, 11}))
    assert train(Setting(bad=alone.bad, num_workers=num_workers).loader(), 2) == train(alone.loader(), 2)


def test_reading_leaves_the_global_random_states_alone() -> None:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(Setting().loader(), 1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class CountingReader(NumberReader):
    """Knows how many samples were read, and by which threads; sample 7 of the walk raises what is no SampleError."""

    def __init__(self, sizes: list[int], broken: bool = False) -> None:
        super().__init__(sizes)
        self.broken, self.num_read, self.threads = broken, 0, set()

    def read(self, number: int) -> Any:
        self.num_read += 1
        self.threads.add(threading.current_thread())
        if self.broken and self.num_read == 7:
            raise OSError("the disk is gone")
        return super().read(number)


def counting_loader(reader: CountingReader) -> BatchLoader:
    return BatchLoader(ShardStream(reader, same, seed=0, shuffle_buffer=6), 3, 0, Rejections())


def test_a_thread_reads_two_batches_ahead_and_no_more() -> None:
    reader = CountingReader([50])
    loader = counting_loader(reader)
    for given, batch in enumerate(islice(loader, 5), 1):
        deadline = time.monotonic() + 30
        while reader.num_read < 3 * (given + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert reader.num_read == 3 * (given + 2)
        # The state knows nothing of what was read ahead.
        loader.mark_trained(batch)
        assert loader.state_dict()["batch"] == given and loader.state_dict()["cursors"] == {"0": 3 * given}
    assert threading.current_thread() not in reader.threads
    assert not any(thread.is_alive() for thread in reader.threads)  # the epoch was left early


def test_two_open_iterators_give_the_same_batches() -> None:
    loader = counting_loader(CountingReader([50]))
    assert all(one.sample_ids == other.sample_ids for one, other in zip(loader, loader, strict=True))


def test_an_error_that_is_no_rejection_reaches_the_training_thread_in_its_place() -> None:
    reader = CountingReader([50], broken=True)
    batches = iter(counting_loader(reader))
    assert [len(next(batches)) for _ in range(2)] == [3, 3]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(batches)
    assert "read" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not any(thread.is_alive() for thread in reader.threads)


@pytest.mark.parametrize("setting", random_settings(8, bad_share=0.0) + random_settings(8, bad_share=0.2), ids=str)
def test_resume_after_any_batch_equals_the_undisturbed_run(setting: Setting) -> None:
    for rank in range(setting.world_size):
        loader = setting.loader(rank)
        undisturbed = train(loader, 3)
        num_batches = len(loader)
        loader = setting.loader(rank)
        for done in range(2 * num_batches):
            batch = next(iter(loader))
            loader.mark_trained(batch)
            state = json.loads(json.dumps(loader.state_dict()))
            assert batch.sample_ids == undisturbed[done]
            resumed = setting.loader(rank)
            resumed.load_state_dict(state)
            rest = -((done + 1) // -num_batches) * num_batches - (done + 1) or num_batches
            assert [other.sample_ids for other in resumed] == undisturbed[done + 1 : done + 1 + rest]


@pytest.mark.parametrize("setting", random_settings(12, bad_share=0.2), ids=str)
def test_rejected_samples_leave_full_batches_and_the_same_number_on_every_rank(setting: Setting) -> None:
    for rank in range(setting.world_size):
        loader = setting.loader(rank)
        batches = train(loader, 1)
        assert [len(batch) for batch in batches] == [setting.batch_size] * len(loader)
        order = setting.stream(rank).order(0)
        usable = [k for k in order if k not in setting.bad]
        ids = [k for batch in batches for k in batch]
        # Every usable sample before any second look, and no look more often than needed.
        assert ids == list(islice(usable * 99, len(ids)))
        assert loader.rejections.counts["bad_number"] <= len(set(order) & setting.bad)


def test_rejected_samples_are_replaced_by_those_that_would_be_dropped() -> None:
    ids = [k for batch in train(Setting(sizes=(10,), bad=frozenset({4})).loader(), 1) for k in batch]
    assert sorted(ids) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_rejected_sample_is_counted_once_and_reported_once_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    loader = Setting(sizes=(9,), bad=frozenset({4})).loader()
    train(loader, 3)
    assert loader.rejections.counts == {"bad_number": 1}
    assert [record.message for record in caplog.records] == ["rank 0: 1 samples rejected: bad_number 1 (4)"]


def test_strict_raises_the_first_rejection() -> None:
    with pytest.raises(SampleError, match="bad_number"):
        train(Setting(bad=frozenset(range(22)), strict=True).loader(), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_a_usable_sample_is_an_error_and_no_endless_loop(num_workers: int) -> None:
    with pytest.raises(ValueError, match="no usable sample"):
        train(Setting(bad=frozenset(range(22)), num_workers=num_workers).loader(), 1)


def test_only_trained_batches_count() -> None:
    loader = Setting().loader()
    first = next(iter(loader))
    assert loader.state_dict() == Setting().loader().state_dict()
    assert next(iter(loader)).sample_ids == first.sample_ids
    batches = list(loader)  # to the end of the epoch: the last one is given but not trained
    loader.mark_trained(batches[-2])
    resumed = Setting().loader()
    resumed.load_state_dict(loader.state_dict())
    assert [batch.sample_ids for batch in resumed] == [batches[-1].sample_ids]


def test_without_marks_epochs_follow_each_other() -> None:
    loader = Setting().loader()
    epochs = [[batch.sample_ids for batch in loader] for _ in range(2)]
    assert epochs[0] + epochs[1] == train(Setting().loader(), 2)


def test_stopping_early_goes_on_after_the_last_trained_batch() -> None:
    loader = Setting().loader()
    undisturbed = train(Setting().loader(), 1)
    seen = []
    for _ in range(2):
        for batch in islice(loader, 3):
            loader.mark_trained(batch)
            seen.append(batch.sample_ids)
    assert seen == undisturbed[:6]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Setting(seed=1), "seed=1, saved with 0"),
        (Setting(batch_size=2, shuffle_buffer=9), "batch_size=2, saved with 3; shuffle_buffer=9, saved with 6"),
        (Setting(sizes=(22,)), "data="),
        (Setting(world_size=2, shuffle_buffer=9), "shuffle_buffer=9, saved with 6"),
    ],
)
def test_state_of_another_stream_is_refused(other: Setting, message: str) -> None:
    state = Setting().loader().state_dict()
    with pytest.raises(ValueError, match=message):
        other.loader().load_state_dict(state)


@pytest.mark.parametrize(("old", "new"), [((1, 4), (2, 2)), ((2, 2), (1, 4)), ((2, 3), (3, 3))])
def test_another_number_of_ranks_goes_on_with_the_next_epoch(old, new, caplog: pytest.LogCaptureFixture) -> None:
    """(ranks, batch size) before and after; behind the last batch of an epoch nothing is left out."""
    before = Setting(world_size=old[0], batch_size=old[1]).loader()
    after = Setting(world_size=new[0], batch_size=new[1])
    for number, batch in enumerate(before, 1):
        before.mark_trained(batch)
        for rank in range(new[0]):
            resumed, left_alone = after.loader(rank), after.loader(rank)
            resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
            assert [b.sample_ids for b in resumed] == train(left_alone, 2)[len(left_alone) :]
        assert bool(caplog.records) == (number < len(before))
        caplog.clear()


def test_state_lacking_this_rank_is_refused() -> None:
    setting = Setting(world_size=2)
    with pytest.raises(ValueError, match=r"rank=1, saved for ranks \['0'\]"):
        setting.loader(1).load_state_dict(setting.loader(0).state_dict())


def test_too_few_samples_for_every_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="22 samples, batch_size=6, world_size=4"):
        Setting(world_size=4, batch_size=6).loader()


def test_rank_outside_the_world_is_an_error() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        Setting(world_size=2).stream(2)


def test_position_of_a_batch_is_small_and_plain() -> None:
    batch: Batch = next(iter(Setting().loader()))
    assert len(json.dumps(batch.position)) < 300
