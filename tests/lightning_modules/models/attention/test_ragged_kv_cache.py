"""`RaggedKVCache` against attention over plain lists of keys and values, while prompts come and completions end."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lightning_modules.models.architectures.base import CacheSizes
from lightning_modules.models.attention import ragged_kv_cache
from lightning_modules.models.attention.kv_cache import CacheShape, PrefixRecorder
from lightning_modules.models.attention.ragged_kv_cache import RaggedKVCache

SIZES = CacheSizes(layers=2, heads=2, width=8)
SHAPE = CacheShape(prompts=4, completions=3, prefix_tokens=7, completion_tokens=12)


@dataclass
class Row:
    """A completion of the reference: keys and values [H, tokens so far, D] of each layer, the prompt's first."""

    prompt: int
    keys: list[Tensor]
    values: list[Tensor]
    seen: int = field(default=0)


def attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """query [H * R, D], keys and values [H, T, D] -> [H * R, D]."""
    keys, values = (t.repeat_interleave(len(query) // len(t), dim=0) for t in (keys, values))
    return ((keys @ query[:, :, None])[..., 0] * scaling).softmax(-1)[:, None].matmul(values)[:, 0]


class Decoding:
    """A cache and its reference, which get the same random prompts, tokens and ends.

    `per_key`: number of query heads per key-value head.
    """

    def __init__(self, seed: int, per_key: int = 3) -> None:
        self.per_key = per_key
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = RaggedKVCache(SHAPE, SIZES, torch.float32, torch.device("cpu"))
        self.rows: list[Row] = []
        self.num_prompts = 0

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def admit(self, count: int) -> None:
        lengths = torch.randint(1, SHAPE.prefix_tokens + 1, (count,), generator=self.generator)
        recorder = PrefixRecorder()
        for layer in range(SIZES.layers):
            recorder.update(*(self.randn(count, SIZES.heads, int(lengths.max()), SIZES.width) for _ in "kv"), layer)
        self.cache.admit(recorder, lengths)
        for index, length in enumerate(lengths.tolist()):
            keys, values = zip(*((k[index, :, :length], v[index, :, :length]) for k, v in recorder.layers), strict=True)
            rows = (Row(self.num_prompts + index, list(keys), list(values)) for _ in range(SHAPE.completions))
            self.rows.extend(rows)
        self.num_prompts += count

    def step(self) -> None:
        self.cache.begin()
        for layer in range(SIZES.layers):
            keys, values = (self.randn(len(self.rows), SIZES.heads, 1, SIZES.width) for _ in "kv")
            query = self.randn(len(self.rows), SIZES.heads * self.per_key, 1, SIZES.width)
            memory, _ = self.cache.update(keys, values, layer)
            expected = []
            for index, row in enumerate(self.rows):
                row.keys[layer] = torch.cat([row.keys[layer], keys[index]], dim=1)
                row.values[layer] = torch.cat([row.values[layer], values[index]], dim=1)
                expected.append(attention(query[index, :, 0], row.keys[layer], row.values[layer], 0.3))
            torch.testing.assert_close(memory.attend(query, 0.3)[:, 0], torch.stack(expected), rtol=1e-5, atol=1e-5)
        for row in self.rows:
            row.seen += 1

    def end(self, share: float) -> None:
        alive = torch.rand(len(self.rows), generator=self.generator) >= share
        alive &= torch.tensor([row.seen < SHAPE.completion_tokens for row in self.rows])
        if not alive.all():
            self.rows = [self.rows[index] for index in self.cache.keep(alive).tolist()]

    def fits(self) -> int:
        """Number of prompts for which the memory has room, counted in tokens."""
        of_prompt = SHAPE.prefix_tokens + SHAPE.completions * SHAPE.completion_tokens
        prompts = len({row.prompt for row in self.rows})
        used = prompts * SHAPE.prefix_tokens + len(self.rows) * SHAPE.completion_tokens
        return (SHAPE.prompts * of_prompt - used) // of_prompt


@pytest.mark.parametrize("most_padding", [0, 9, 10_000])
def test_attention_is_that_over_each_completions_own_tokens(monkeypatch: pytest.MonkeyPatch, most_padding: int) -> None:
    monkeypatch.setattr(ragged_kv_cache, "MOST_PADDING", most_padding)
    decoding, chunks, prompts = Decoding(most_padding), set(), set()
    for _ in range(60):
        assert decoding.cache.num_admissible() == decoding.fits()
        if fits := min(decoding.fits(), 30 - decoding.num_prompts):
            decoding.admit(fits)
        if decoding.rows:
            chunks.add(len(decoding.cache.chunks))
            prompts.add(len({row.prompt for row in decoding.rows}))
            decoding.step()
            decoding.end(0.15)
    assert decoding.num_prompts == 30 and not decoding.rows
    assert decoding.cache.num_admissible() == SHAPE.prompts  # all memory is free again
    assert (max(chunks) > 2) == (most_padding < 10_000)
    assert max(prompts) > SHAPE.prompts  # completions of other prompts had ended


def test_one_prompt_of_a_model_with_one_query_head_per_key_value_head() -> None:
    decoding = Decoding(0, per_key=1)
    decoding.admit(1)
    for _ in range(3):
        decoding.step()


def test_more_prompts_than_fit_are_refused() -> None:
    decoding = Decoding(0)
    decoding.admit(SHAPE.prompts)
    with pytest.raises(AssertionError, match="no room for these prompts"):
        decoding.admit(1)


def test_only_as_many_rows_move_as_gaps_need() -> None:
    lengths = torch.tensor([9, 9, 9, 5, 5, 2, 2])
    alive = torch.tensor([True, False, True, True, True, True, False])
    # Row 2 fills the gap, row 4 the place of row 2, and row 5 that of row 4: one move for each length, still sorted.
    assert ragged_kv_cache._without_gaps(alive, lengths).tolist() == [0, 2, 4, 3, 5]
