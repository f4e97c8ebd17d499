"""The orders of reading: as they always were, block by block, and mixed by weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import accumulate, pairwise

import pytest

from datamodules.samples.rejections import Rejections
from datamodules.streaming.epoch_order import EpochOrder
from datamodules.streaming.resumable_loader import BatchLoader
from datamodules.streaming.stream import ShardStream, UnusableData
from tests.datamodules.streaming.test_stream import NumberReader, same, train

# (shard sizes, seed, number of ranks, buffer, reorder number): a hash of the orders of epochs 0, 1 and 7 of all ranks,
# made before there was any other order. A run of then goes on with the very next sample.
PINNED = [
    ((5, 7, 1, 9), 0, 1, 6, 0, "4ca2390c5b13ff48"),
    ((5, 7, 1, 9), 3, 3, 4, 0, "98e991e9f5cf235b"),
    ((500,) * 40, 1, 2, 10_000, 0, "6994073963dd04d8"),
    ((500,) * 40, 1, 2, 1_000, 2, "9e51ebc04fc7bdf0"),
    ((3000, 17, 250), 11, 4, 1, 1, "d0e78b5421c0c49d"),
]


def starts(sizes: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(sizes)]


@pytest.mark.parametrize(("sizes", "seed", "ranks", "buffer", "variant", "digest"), PINNED)
def test_the_order_is_that_of_all_earlier_runs(sizes, seed, ranks, buffer, variant, digest) -> None:
    orders = [
        EpochOrder(starts(sizes), seed, rank, ranks, buffer, variant=variant).numbers(epoch)
        for rank in range(ranks)
        for epoch in (0, 1, 7)
    ]
    assert hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("order", ["buffer", "block"])
def test_an_epoch_gives_each_sample_at_most_once(order: str, ranks: int) -> None:
    sizes = (50, 7, 120, 1)
    for epoch in range(3):
        plans = [EpochOrder(starts(sizes), 0, rank, ranks, 16, order) for rank in range(ranks)]
        seen = Counter(number for plan in plans for number in plan.numbers(epoch))
        assert max(seen.values()) == 1 and len(seen) == sum(sizes) - sum(sizes) % ranks


def test_a_block_is_read_whole_before_the_next_one_begins() -> None:
    sizes, block = (100,) * 20, 200
    first = starts(sizes)
    numbers = EpochOrder(first, 0, 0, 1, block, "block").numbers(0)
    shards = [number // 100 for number in numbers]
    for k in range(0, len(numbers), block):
        # A turned row: the first and the last shard of a stretch are in part.
        assert len(set(shards[k : k + block])) <= 3
    assert numbers[:block] != sorted(numbers[:block])
    last_use = {shard: place for place, shard in enumerate(shards)}
    first_use = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    spans = sorted(last_use[shard] - first_use[shard] for shard in last_use)
    assert spans[-2] < 2 * block, "but for the shard at which the row is turned, each is done with soon"


def mixture(weights: tuple[float, ...], sizes: tuple[int, ...], seed: int = 0, **more: object) -> EpochOrder:
    """One shard of each size for each source."""
    return EpochOrder(starts(sizes), seed, weights=weights, spans=(1,) * len(sizes), **more)


def source_of(plan: EpochOrder, number: int) -> int:
    return next(k for k, (first, end) in enumerate(pairwise(plan.source_starts())) if first <= number < end)


def test_weights_are_realised_after_any_number_of_samples() -> None:
    weights = (0.7, 0.2, 0.1)
    plan = mixture(weights, (3_000, 10_000, 7_000), shuffle_buffer=100)
    numbers = plan.numbers(0)
    assert len(numbers) == 20_000
    counts = [0, 0, 0]
    for given, number in enumerate(numbers, 1):
        counts[source_of(plan, number)] += 1
        assert all(abs(count - weight * given) <= 3 for count, weight in zip(counts, weights, strict=True))
    assert all(abs(count / 20_000 - weight) < 0.01 * weight for count, weight in zip(counts, weights, strict=True)), (
        counts
    )


def test_each_source_gives_all_its_samples_before_any_again() -> None:
    plan = mixture((0.6, 0.3, 0.1), (13, 40, 29))
    for source in range(3):
        given = [n for epoch in range(9) for n in plan.numbers(epoch) if source_of(plan, n) == source]
        size = (13, 40, 29)[source]
        rounds = [given[k : k + size] for k in range(0, len(given) - size + 1, size)]
        assert rounds and all(len(set(one)) == size for one in rounds)
        assert len(rounds) < 2 or rounds[0] != rounds[1], "in another order"


def test_ranks_of_a_mixture_read_different_samples() -> None:
    plans = [mixture((0.5, 0.5), (60, 60), rank=rank, world_size=3) for rank in range(3)]
    seen = Counter(number for plan in plans for number in plan.numbers(0))
    assert max(seen.values()) == 1 and len(seen) == 120
    assert [len(plan.numbers(0)) for plan in plans] == [40] * 3


def test_many_sources_and_odd_weights_fill_every_slot() -> None:
    for num_sources in (1, 2, 7, 40):
        raw = [1.0 + (k * 7919) % 13 for k in range(num_sources)]
        weights = tuple(value / sum(raw) for value in raw)
        numbers = mixture(weights, (11,) * num_sources).numbers(2)
        assert len(numbers) == 11 * num_sources


def loader(weights: tuple[float, ...] | None, rank: int = 0, ranks: int = 1, bad=frozenset(), **more) -> BatchLoader:
    reader = NumberReader([30, 40, 50], bad)
    stream = ShardStream(reader, same, 0, rank, ranks, 8, weights=weights, spans=(1, 1, 1), **more)
    return BatchLoader(stream, 4, 0, Rejections())


def test_a_killed_mixture_goes_on_with_the_same_samples_and_shares() -> None:
    weights = (0.5, 0.3, 0.2)
    whole = loader(weights)
    undisturbed = train(whole, 2)
    resumed = loader(weights)
    done = 0
    while done < len(undisturbed):
        for batch in resumed:  # some batches, then a kill
            resumed.mark_trained(batch)
            assert batch.sample_ids == undisturbed[done]
            done += 1
            if done % 7 == 0:
                break
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = loader(weights)
        resumed.load_state_dict(state)
    assert resumed.shares() == whole.shares() and sum(state["taken"]["0"]) == 4 * len(undisturbed)
    assert all(abs(share - weight) < 0.01 for share, weight in zip(whole.shares(), weights, strict=True))


def test_a_mixture_of_20_000_samples_that_is_killed_in_the_middle_is_the_undisturbed_one() -> None:
    """0.7, 0.2 and 0.1, each realised to within 1 % of itself; two ranks, so each rank trains on half."""
    weights, sizes = (0.7, 0.2, 0.1), [3_000, 10_000, 7_000]

    def make(rank: int) -> BatchLoader:
        stream = ShardStream(NumberReader(sizes), same, 0, rank, 2, 100, weights=weights, spans=(1, 1, 1))
        return BatchLoader(stream, 8, 0, Rejections())

    trained = [0, 0, 0]
    for rank in range(2):
        whole = make(rank)
        undisturbed = train(whole, 1)
        killed = make(rank)
        first: list[list[int]] = []
        for batch in killed:
            if len(first) == 617:  # given, and not trained on
                break
            killed.mark_trained(batch)
            first.append(batch.sample_ids)
        state = json.loads(json.dumps(killed.state_dict()))
        resumed = make(rank)
        resumed.load_state_dict(state)
        assert first + train(resumed, 1) == undisturbed
        assert resumed.shares() == whole.shares()
        for number in (number for batch in undisturbed for number in batch):
            trained[0 if number < 3_000 else 1 if number < 13_000 else 2] += 1
    assert sum(trained) == 20_000
    assert all(abs(count / 20_000 - w) < 0.01 * w for count, w in zip(trained, weights, strict=True)), trained


def test_shares_count_the_samples_that_were_used() -> None:
    used = loader((0.5, 0.3, 0.2), bad=frozenset(range(15)))
    ids = [k for batch in train(used, 1) for k in batch]
    counts = [sum(first <= k < end for k in ids) for first, end in pairwise((0, 30, 70, 120))]
    assert used.shares() == [count / len(ids) for count in counts]


def test_states_without_weights_and_blocks_are_what_they_were() -> None:
    state = loader(None).state_dict()
    assert state.keys() == {"epoch", "batch", "cursors", "stream"}
    assert state["stream"].keys() == {"seed", "world_size", "batch_size", "shuffle_buffer", "data"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"weights": None}, {"weights": (0.5, 0.3, 0.2)}, r"weights=\[0.5, 0.3, 0.2\], saved with None"),
        ({"weights": (0.5, 0.3, 0.2)}, {"weights": None}, r"weights=None, saved with \[0.5, 0.3, 0.2\]"),
        ({"weights": (0.5, 0.3, 0.2)}, {"weights": (0.4, 0.4, 0.2)}, r"weights=\[0.4"),
        ({"weights": None}, {"weights": None, "order": "block"}, "order='block', saved with None"),
        ({"weights": None, "order": "block"}, {"weights": None}, "order=None, saved with 'block'"),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(old: dict, new: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader(**new).load_state_dict(loader(**old).state_dict())


def test_counts_of_all_ranks_go_on_where_their_number_changes() -> None:
    weights = (0.5, 0.3, 0.2)
    states = []
    for rank in range(2):
        one = loader(weights, rank, 2)
        train(one, 1)
        states.append(one.state_dict())
    state = states[0] | {"taken": {rank: s["taken"][rank] for s, rank in zip(states, "01", strict=True)}}
    single = loader(weights)
    single.load_state_dict(state)
    assert single._trained.taken == tuple(map(sum, zip(*state["taken"].values(), strict=True)))


def test_a_source_with_fewer_samples_than_ranks_is_named() -> None:
    with pytest.raises(UnusableData, match=r"source 0 of data\.shards .* it has 30 samples, world_size=31"):
        loader((0.5, 0.3, 0.2), 0, 31)
