"""KV cache for completions of very different lengths: memory and time follow the tokens that active completions have.

The mathematics are those of `kv_cache`: the completions of a prompt share its keys, and one softmax covers prompt and
completion. Here nothing has a fixed place. Active completions lie without gaps, the longest first. Their prompts lie
without gaps too, in any order. Where one ends, another moves into its place: steps over a gap would cost far more than
the move. Completions that were admitted together are equally long, so they are read together, without padding.

Rows and prompts share one block of memory, which is as large as its `CacheShape` says. Rows lie at its start, prompts
at its end. A prompt is admitted as soon as completions of any prompts have left enough room. Each row is counted with
the full length of a completion and each prompt with the full length of a prompt, so rows never reach the prompts.

Shapes: A active rows (completions that have not ended), N prompts of active rows, G completions of a new prompt, C
largest number of active completions of a prompt, H key-value heads, R query heads per key-value head, L prefix tokens
(padded on the right), T tokens of a completion, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.architectures.base import CacheSizes
from lightning_modules.models.attention.kv_cache import CacheShape, CompletionMemory, PrefixRecorder, mask_bias

# Completions of different lengths are read together if this adds at most this number of tokens (rows * padding). More
# padding takes longer than the operations that it saves.
MOST_PADDING = 4096


@dataclass
class _Chunk:
    """Rows from `start` to `stop` that are read together."""

    start: int
    stop: int
    width: int  # number of tokens of its longest row, which is its first
    is_padded: bool = False  # whether some rows are shorter
    bias: Tensor | None = None  # [rows, 1, width], masks the padding in a step; None without padding


class RaggedKVCache:
    """The model's cache during decoding. `admit` adds prompts, `begin` announces a step, `keep` drops rows.

    - `num_seen` [A]: number of tokens of each row, with the token of this step
    - `prompt` [A]: the prompt of each row; prompt n is the n-th from the end of the memory
    - `most`: C
    - `place` [A]: index of each row in [N, C]; `row` [N * C]: the row at each place, or any row if there is none
    - `is_full`: whether `place` counts 0, 1, 2, ..., so that no row has to be moved
    """

    def __init__(self, shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, heads, width = shape, sizes.heads, sizes.width
        tokens = shape.prompts * (shape.prefix_tokens + shape.completions * shape.completion_tokens)
        # Zeros, because a masked entry is multiplied by 0 and must be finite. [layers, keys and values, memory]
        memory = torch.zeros(sizes.layers, 2, tokens * heads * width, dtype=dtype, device=device)
        of_row, of_prompt = (n * heads * width for n in (shape.completion_tokens, shape.prefix_tokens))
        rows, prompts = memory.shape[2] // of_row, memory.shape[2] // of_prompt
        # Two views of the same memory, [layers, 2, rows, H, T, D] and [layers, 2, prompts, H, L, D].
        self.own = memory[:, :, : rows * of_row].unflatten(2, (rows, heads, shape.completion_tokens, width))
        prefix = memory[:, :, memory.shape[2] - prompts * of_prompt :]
        self.prefix = prefix.unflatten(2, (prompts, heads, shape.prefix_tokens, width))
        self.num_seen = self.prompt = torch.zeros(0, dtype=torch.long, device=device)
        self.prefix_lengths = self.num_seen  # [N]
        self.chunks: list[_Chunk] = []
        self.layers = [_RaggedKVLayer(self, index) for index in range(sizes.layers)]

    def num_admissible(self) -> int:
        """Number of prompts that could be admitted now, if all their completions become as long as allowed."""
        shape = self.shape
        of_prompt = shape.prefix_tokens + shape.completions * shape.completion_tokens
        used = len(self.prefix_lengths) * shape.prefix_tokens + len(self.num_seen) * shape.completion_tokens
        return shape.prompts - -(-used // of_prompt)

    def admit(self, recorder: PrefixRecorder, lengths: Tensor) -> None:
        """Add p prompts; their p * G empty completions come after all other rows.

        Args:
            recorder: has the keys and values of these prompts.
            lengths: long [p], number of tokens of each prompt without padding.
        """
        assert len(lengths) <= self.num_admissible(), "the cache has no room for these prompts"
        known, count = len(self.prefix_lengths), len(lengths)
        # From the end of the memory to its start, so that prompts of one admission lie in their order.
        prompts = torch.arange(known + count - 1, known - 1, -1, device=lengths.device)
        for layer, (keys, values) in zip(self.prefix, recorder.layers, strict=True):
            layer[0, -1 - prompts, :, : keys.shape[2]], layer[1, -1 - prompts, :, : keys.shape[2]] = keys, values
        self.prefix_lengths = torch.cat([self.prefix_lengths, lengths.flip(0)])
        self.prompt = torch.cat([self.prompt, prompts.repeat_interleave(self.shape.completions)])
        self.num_seen = torch.cat([self.num_seen, prompts.new_zeros(count * self.shape.completions)])
        self._arrange()

    def keep(self, alive: Tensor) -> Tensor:
        """Drop the rows that are False in `alive` [A]; returns the index that each remaining row had, [A']."""
        rows = _without_gaps(alive, self.num_seen)
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        if len(moved):
            used = int(self.num_seen[0])
            self.own[:, :, moved, :, :used] = self.own[:, :, rows[moved], :, :used]
        self.prompt, self.num_seen = self.prompt[rows], self.num_seen[rows]
        has_rows = torch.zeros_like(self.prefix_lengths, dtype=torch.bool).index_fill_(0, self.prompt, True)
        if not has_rows.all():
            prompts = _without_gaps(has_rows, torch.zeros_like(self.prefix_lengths))
            moved = (prompts != torch.arange(len(prompts), device=rows.device)).nonzero()[:, 0]
            self.prefix[:, :, -1 - moved] = self.prefix[:, :, -1 - prompts[moved]]
            now = torch.zeros_like(self.prefix_lengths)
            now[prompts] = torch.arange(len(prompts), device=rows.device)
            self.prompt, self.prefix_lengths = now[self.prompt], self.prefix_lengths[prompts]
        self._arrange()
        return rows

    def begin(self) -> None:
        """Announce a step, which adds a token to every row."""
        self.num_seen = self.num_seen + 1
        for chunk in self.chunks:
            chunk.width += 1
            if chunk.is_padded:
                seen = self.num_seen[chunk.start : chunk.stop, None]
                chunk.bias = mask_bias(torch.arange(chunk.width, device=seen.device) >= seen)[:, None]

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[CompletionMemory, CompletionMemory]:
        """Write the keys and values [A, H, 1, D] of this step's tokens; returns the layer's memory in their place."""
        for memory, new in zip(self.own[layer], (keys, values), strict=True):
            for chunk in self.chunks:
                rows = slice(chunk.start, chunk.stop)
                if chunk.is_padded:  # the new tokens have different places
                    index = torch.arange(chunk.start, chunk.stop, device=keys.device)
                    memory[index, :, self.num_seen[rows] - 1] = new[rows, :, 0]
                else:
                    memory[rows, :, chunk.width - 1] = new[rows, :, 0]
        return self.layers[layer], self.layers[layer]

    def _arrange(self) -> None:
        """Compute what all steps share until rows come or go."""
        self.chunks = []
        lengths, counts = torch.unique_consecutive(self.num_seen, return_counts=True)
        start = padding = 0
        for width, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            stop = start + count
            if self.chunks:
                padding += count * (self.chunks[-1].width - width)
            if self.chunks and padding <= MOST_PADDING:
                self.chunks[-1].stop, self.chunks[-1].is_padded = stop, True
            else:
                self.chunks.append(_Chunk(start, stop, width))
                padding = 0
            start = stop

        num_prompts = len(self.prefix_lengths)
        prompt = num_prompts - 1 - self.prompt  # counted from the first in memory
        per_prompt = torch.bincount(prompt, minlength=num_prompts)
        self.most = int(per_prompt.max()) if num_prompts else 0
        order = prompt.argsort(stable=True)
        counter = torch.arange(len(prompt), device=prompt.device)
        self.place = torch.empty_like(prompt)
        self.place[order] = prompt[order] * self.most + counter - (per_prompt.cumsum(0) - per_prompt)[prompt[order]]
        self.row = prompt.new_zeros(num_prompts * self.most)
        self.row[self.place] = counter
        self.is_full = len(self.row) == len(counter) and bool((self.place == counter).all())
        width = int(self.prefix_lengths.max()) if num_prompts else 0
        padding = torch.arange(width, device=prompt.device) >= self.prefix_lengths.flip(0)[:, None]
        self.prefix_bias = mask_bias(padding)[:, None]  # [N, 1, L]


class _RaggedKVLayer(CompletionMemory):
    """The memory of one layer of a `RaggedKVCache`."""

    def __init__(self, cache: RaggedKVCache, index: int) -> None:
        self.cache, self.own, self.prefix = cache, cache.own[index], cache.prefix[index]

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """See `CompletionMemory.attend`."""
        cache = self.cache
        count, _, length = cache.prefix_bias.shape
        heads, width = self.own.shape[2], self.own.shape[4]
        query = (query if scaling == 1 else query * scaling)[:, :, 0]  # [A, H * R, D]
        keys, values = self.prefix[:, len(self.prefix[0]) - count :].flatten(1, 2)[:, :, :length]  # [N * H, L, D]

        scores = torch.bmm(self._by_prompt(query), keys.transpose(1, 2)).view(count, -1, length) + cache.prefix_bias
        scores = self._by_row(scores, length).reshape(len(query) * heads, -1, length)
        for_own = query.reshape(len(query) * heads, -1, width)  # [A * H, R, D]
        prefix_weights, out = [], []
        for chunk in cache.chunks:
            rows = slice(chunk.start * heads, chunk.stop * heads)
            own_keys, own_values = self.own[:, chunk.start : chunk.stop, :, : chunk.width].flatten(1, 2)
            own_scores = torch.bmm(for_own[rows], own_keys.transpose(1, 2))
            if chunk.bias is not None:
                own_scores.view(chunk.stop - chunk.start, -1, chunk.width).add_(chunk.bias)
            weights = torch.cat([scores[rows], own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
            prefix_weights.append(weights[:, :, :length])
            out.append(torch.bmm(weights[:, :, length:], own_values))
        prefix_out = torch.bmm(self._by_prompt(torch.cat(prefix_weights).view(len(query), -1, length)), values)
        return (self._by_row(prefix_out, width) + torch.cat(out).view(len(query), -1, width))[:, None]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[A, H * R, X] -> [N * H, C * R, X]. Places without a row get another row's values, which `_by_row` drops."""
        cache, heads = self.cache, self.own.shape[2]
        x = x if cache.is_full else x.index_select(0, cache.row)
        by_prompt = x.view(len(cache.prefix_lengths), cache.most, heads, -1, x.shape[-1]).transpose(1, 2)
        return by_prompt.reshape(len(cache.prefix_lengths) * heads, -1, x.shape[-1])

    def _by_row(self, x: Tensor, width: int) -> Tensor:
        """[N * H, C * R, X], of any shape with as many elements -> [A, H * R, X], where X is `width`."""
        cache, heads = self.cache, self.own.shape[2]
        by_place = x.view(len(cache.prefix_lengths), heads, cache.most, -1, width).transpose(1, 2)
        by_place = by_place.reshape(len(cache.row), -1, width)
        return by_place if cache.is_full else by_place.index_select(0, cache.place)


def _without_gaps(alive: Tensor, key: Tensor) -> Tensor:
    """An order of the True entries of `alive` [X] that keeps `key` [X] sorted and leaves as many in place as possible.

    Returns:
        The index of the entry at each place, [number of True entries].
    """
    kept = alive.nonzero()[:, 0]
    here = torch.arange(len(kept), device=kept.device)
    stays = alive[: len(kept)] & (key[: len(kept)] == key[kept])
    leaves = alive.clone()
    leaves[: len(kept)] &= ~stays
    # Gaps and the entries that leave have the same keys in the same order.
    here[~stays] = leaves.nonzero()[:, 0]
    return here
