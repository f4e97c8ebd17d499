"""KV cache for sampling G completions of each prompt: the prompt's keys and values are kept once, not G times.

In a decoding step, the G completions of a prompt are G queries. They share the keys of the prompt (the prefix), and
each has its own further keys. Attention over the prefix is one matrix product for all G completions and all query heads
of a key-value head. Attention over the completion's own tokens is a small matrix product per completion. One softmax
covers both. Keys and values are not repeated in memory, neither for completions nor for heads.

Shapes: P prompts, G completions per prompt, A active rows (completions that have not ended), H key-value heads, R query
heads per key-value head, L prefix tokens (padded on the right), T largest number of completion tokens, D head width.
Each prompt is in one batch slot; a row is a flat index into [P, G].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.architectures.base import CacheSizes

MIN_WASTE = 0.25  # the memory shrinks only if this frees at least this share of it, because the rest is copied


class PrefixRecorder:
    """The model's cache during the prefill: stores the rotated keys and the values of each layer, [P, H, L, D].

    transformers passes further arguments to `update`. They differ between versions and matter only for its own caches.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        assert layer == len(self.layers), "layers must come in order"
        self.layers.append((keys, values))
        return keys, values


@dataclass(frozen=True)
class CacheShape:
    """The sizes of a `PrefixKVCache`."""

    prompts: int
    completions: int  # completions per prompt
    prefix_tokens: int
    completion_tokens: int


class PrefixKVCache:
    """The model's cache during decoding. `admit` adds prompts, and `begin` describes the next step.

    Every tensor is allocated once with its final shape and changed in place, so that a step can be captured in a CUDA
    graph and replayed. Only `keep_rows` allocates new tensors.

    `begin` and the first `update` of a step set these tensors:

    - `token_index` [A]: position of the new token in its completion
    - `num_seen` [A]: number of tokens of the completion, with the new one
    - `prompt_index` [A] and `completion_index` [A]
    - `is_full`: whether every completion is active
    - `completion_bias` [P, 1, G, 1, tokens read]: masks later tokens; None if there are none
    """

    def __init__(self, shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype, device: torch.device) -> None:
        """A batch slot without a prompt gets a prefix of one zero token, because a softmax over no keys is NaN."""
        self.num_prompts, self.num_completions = shape.prompts, shape.completions
        self.active_rows = torch.arange(shape.prompts * shape.completions, device=device)  # [A]
        self.prefix_bias = torch.full((shape.prompts, 1, shape.prefix_tokens), float("-inf"), device=device)
        self.prefix_bias[:, :, 0] = 0
        self.prefix_lengths = torch.ones(shape.prompts, dtype=torch.long, device=device)
        # Number of prefix tokens and of completion tokens that the next step reads.
        self.prefix_width, self.completion_width = shape.prefix_tokens, shape.completion_tokens
        self.layers = [PrefixKVLayer(self, shape, sizes, dtype) for _ in range(sizes.layers)]

    def admit(self, slots: Tensor, recorder: PrefixRecorder, lengths: Tensor) -> None:
        """Put new prompts into the cache; their completions are empty again.

        Args:
            slots: their batch slots, long [p].
            recorder: has the keys and values of these prompts.
            lengths: long [p], number of tokens of each prompt without padding.
        """
        padding = torch.arange(self.prefix_bias.shape[2], device=lengths.device) >= lengths[:, None]
        self.prefix_bias[slots], self.prefix_lengths[slots] = _bias(padding)[:, None], lengths
        for layer, (keys, values) in zip(self.layers, recorder.layers, strict=True):
            layer.prefix_keys[slots, :, : keys.shape[2]] = keys
            layer.prefix_values[slots, :, : values.shape[2]] = values

    def begin(self, token_index: Tensor, width: int) -> None:
        """Describe the next step.

        Args:
            token_index: position of each active row's new token in its completion, long [A].
            width: number of completion tokens that are read; greater than the largest `token_index`.
        """
        self.token_index, self.num_seen, self.completion_width = token_index, token_index + 1, width

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[PrefixKVLayer, PrefixKVLayer]:
        """Write the keys and values [A, H, 1, D] of this step's tokens.

        Returns the layer's memory in place of keys and values, so that the attention function gets it.
        """
        if layer == 0:
            self._prepare()
        memory = self.layers[layer]
        memory.keys[self.prompt_index, :, self.completion_index, self.token_index] = keys[:, :, 0]
        memory.values[self.prompt_index, :, self.completion_index, self.token_index] = values[:, :, 0]
        return memory, memory

    def _prepare(self) -> None:
        """Compute the tensors that all layers of a step share.

        The GPU kernels do not need them; they read `token_index` and the lengths.
        """
        self.prompt_index = self.active_rows // self.num_completions
        self.completion_index = self.active_rows % self.num_completions
        self.is_full = len(self.active_rows) == self.num_prompts * self.num_completions
        self.completion_bias = None
        # If all completions are equally long, nothing is masked. On a CPU it is cheap to look at the values.
        if self.token_index.device.type == "cpu" and bool((self.token_index == self.completion_width - 1).all()):
            return
        last = self.token_index.new_zeros(self.num_prompts * self.num_completions)
        last[self.active_rows] = self.token_index
        hidden = torch.arange(self.completion_width, device=last.device) > last[:, None]
        self.completion_bias = _bias(hidden).view(self.num_prompts, 1, self.num_completions, 1, -1)

    def keep_rows(self, rows: Tensor, shrink: bool = True) -> None:
        """Continue with fewer active rows, in the same order.

        Args:
            rows: ascending indices into [A].
            shrink: reduce the memory to the remaining prompts and to the largest number of remaining completions per
                prompt, if this frees enough of it (`MIN_WASTE`). Afterwards, no prompt can be admitted.
        """
        self.active_rows = self.active_rows[rows]
        if not shrink or len(rows) == 0:
            return
        prompts = self.active_rows // self.num_completions
        alive, counts = torch.unique_consecutive(prompts, return_counts=True)
        most = int(counts.max())
        if len(alive) * most > (1 - MIN_WASTE) * self.num_prompts * self.num_completions:
            return
        # New prompt index and new completion index of each row, both numbered from 0.
        prompt = torch.arange(len(alive), device=prompts.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        completion = torch.arange(len(prompts), device=prompts.device) - first.repeat_interleave(counts)
        # The old completion for each new index. Unused entries are 0 and are never read.
        kept = self.active_rows.new_zeros(len(alive), most)
        kept[prompt, completion] = self.active_rows % self.num_completions
        for layer in self.layers:
            layer.keep(alive, kept)
        self.prefix_bias, self.prefix_lengths = self.prefix_bias[alive], self.prefix_lengths[alive]
        self.num_prompts, self.num_completions = len(alive), most
        self.active_rows = prompt * most + completion


class PrefixKVLayer:
    """The memory of one layer. The cache returns it in place of the keys, so that the attention function gets it."""

    def __init__(self, cache: PrefixKVCache, shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype) -> None:
        self.cache, device = cache, cache.active_rows.device
        # Heads before tokens, so that the matrix products of a step need no copy.
        prefix = (shape.prompts, sizes.heads, shape.prefix_tokens, sizes.width)  # [P, H, L, D]
        own = (shape.prompts, sizes.heads, shape.completions, shape.completion_tokens, sizes.width)  # [P, H, G, T, D]
        self.prefix_keys, self.prefix_values = (torch.zeros(prefix, dtype=dtype, device=device) for _ in range(2))
        self.keys, self.values = (torch.zeros(own, dtype=dtype, device=device) for _ in range(2))

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of this step's tokens over their prompt and their own completion.

        It uses plain reshapes instead of einops, because it runs in every layer of every decoding step, where each call
        counts.

        Args:
            query: [A, H * R, 1, D].
            scaling: factor of the scores. `CpuSamplingModel` passes 1, because its weights contain the factor.

        Returns:
            [A, 1, H * R, D].
        """
        cache = self.cache
        prompts, heads, completions, _, width = self.keys.shape
        length = cache.prefix_width
        query = (query if scaling == 1 else query * scaling)[:, :, 0]
        if not cache.is_full:  # rows that have ended get zeros, so that every prompt has G queries
            rows = query.new_zeros(prompts * completions, *query.shape[1:])
            rows[cache.active_rows] = query
            query = rows
        query = query.view(prompts, completions, heads, -1, width).transpose(1, 2).contiguous()  # [P, H, G, R, D]
        for_prefix = query.view(prompts * heads, -1, width)  # [P * H, G * R, D]
        for_own = query.view(prompts * heads * completions, -1, width)  # [P * H * G, R, D]
        prefix_keys, prefix_values = (t.flatten(0, 1)[:, :length] for t in (self.prefix_keys, self.prefix_values))
        keys, values = (t.flatten(0, 2)[:, : cache.completion_width] for t in (self.keys, self.values))

        # Scores over the prefix [P * H, G * R, L] and over the own tokens [P * H * G, R, T], joined for one softmax.
        prefix_scores = torch.bmm(for_prefix, prefix_keys.transpose(1, 2))
        prefix_scores = prefix_scores.view(prompts, -1, length) + cache.prefix_bias[:, :, :length]
        own_scores = torch.bmm(for_own, keys.transpose(1, 2))
        if cache.completion_bias is not None:
            by_completion = own_scores.view(prompts, heads, completions, -1, cache.completion_width)
            own_scores = (by_completion + cache.completion_bias).view(own_scores.shape)
        scores = torch.cat([prefix_scores.view(*for_own.shape[:2], length), own_scores], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        prefix_weights = weights[..., :length].reshape(*for_prefix.shape[:2], length)
        out = torch.bmm(prefix_weights, prefix_values).view_as(for_own)
        out = (out + torch.bmm(weights[..., length:], values)).view_as(query)
        out = out.transpose(1, 2).reshape(prompts * completions, 1, -1, width)
        return out if cache.is_full else out[cache.active_rows]

    def keep(self, prompts: Tensor, completions: Tensor) -> None:
        """Continue with `prompts` [P'] and their `completions` [P', G']."""
        self.prefix_keys, self.prefix_values = self.prefix_keys[prompts], self.prefix_values[prompts]
        # Indexing puts the two indexed axes first: [P', G', H, T, D].
        chosen = (t.transpose(1, 2)[prompts[:, None], completions] for t in (self.keys, self.values))
        self.keys, self.values = (t.transpose(1, 2).contiguous() for t in chosen)


def _bias(hidden: Tensor) -> Tensor:
    """The bias of attention scores: -inf where `hidden` is True, otherwise 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
