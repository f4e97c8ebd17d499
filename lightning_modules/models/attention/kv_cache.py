"""KV cache for sampling G completions of each prompt: the prompt's keys and values are kept once, not G times.

In a decoding step, the G completions of a prompt are G queries. They share the keys of the prompt (the prefix), and
each has its own further keys. Attention over the prefix is one matrix product for all G completions and all query heads
of a key-value head. Attention over the completion's own tokens is a small matrix product per completion. One softmax
covers both. Keys and values are not repeated in memory, neither for completions nor for heads.

Shapes: P prompts, G completions per prompt, A rows of a step, H key-value heads, R query heads per key-value head, L
prefix tokens (padded on the right), T largest number of completion tokens, D head width.
Each prompt is in one batch slot; a row is a flat index into [P, G].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.architectures.base import CacheSizes


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
    """The sizes of a `PrefixKVCache` or a `RaggedKVCache`."""

    prompts: int  # prompts for which there is memory when all their completions have their full length
    completions: int  # completions per prompt
    prefix_tokens: int
    completion_tokens: int


class CompletionMemory(ABC):
    """The memory of one layer. A cache returns it in place of the keys, so that the attention function gets it."""

    @abstractmethod
    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of this step's tokens over their prompt and their own completion.

        Args:
            query: [A, H * R, 1, D].
            scaling: factor of the scores. `CpuSamplingModel` passes 1, because its weights contain the factor.

        Returns:
            [A, 1, H * R, D].
        """


class PrefixKVCache:
    """The model's cache while every step computes all rows. `admit` adds prompts, `begin` describes the next step.

    Every tensor is allocated once with its final shape and changed in place, so that a step can be captured in a CUDA
    graph and replayed.

    `begin` and the first `update` of a step set these tensors:

    - `token_index` [P * G]: position of the new token in its completion
    - `num_seen` [P * G]: number of tokens of the completion, with the new one
    - `completion_bias` [P, 1, G, 1, tokens read]: masks later tokens
    """

    def __init__(self, shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype, device: torch.device) -> None:
        """A batch slot without a prompt gets a prefix of one zero token, because a softmax over no keys is NaN."""
        self.num_prompts, self.num_completions = shape.prompts, shape.completions
        rows = torch.arange(shape.prompts * shape.completions, device=device)
        self.prompt_index, self.completion_index = rows // shape.completions, rows % shape.completions
        self.prefix_bias = torch.full((shape.prompts, 1, shape.prefix_tokens), float("-inf"), device=device)
        self.prefix_bias[:, :, 0] = 0
        self.prefix_lengths = torch.ones(shape.prompts, dtype=torch.long, device=device)
        # Number of prefix tokens and of completion tokens that the next step reads.
        self.prefix_width, self.completion_width = shape.prefix_tokens, shape.completion_tokens
        self.layers = [PrefixKVLayer(self, shape, sizes, dtype) for _ in range(sizes.layers)]

    def num_admissible(self) -> int:
        """Number of prompts that could be admitted at most: every batch slot has its own memory."""
        return self.num_prompts

    def admit(self, slots: Tensor, recorder: PrefixRecorder, lengths: Tensor) -> None:
        """Put new prompts into the cache; their completions are empty again.

        Args:
            slots: their batch slots, long [p].
            recorder: has the keys and values of these prompts.
            lengths: long [p], number of tokens of each prompt without padding.
        """
        padding = torch.arange(self.prefix_bias.shape[2], device=lengths.device) >= lengths[:, None]
        self.prefix_bias[slots], self.prefix_lengths[slots] = mask_bias(padding)[:, None], lengths
        for layer, (keys, values) in zip(self.layers, recorder.layers, strict=True):
            layer.prefix_keys[slots, :, : keys.shape[2]] = keys
            layer.prefix_values[slots, :, : values.shape[2]] = values

    def begin(self, token_index: Tensor, width: int) -> None:
        """Describe the next step.

        Args:
            token_index: position of each row's new token in its completion, long [P * G].
            width: number of completion tokens that are read; greater than the largest `token_index`.
        """
        self.token_index, self.num_seen, self.completion_width = token_index, token_index + 1, width

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[PrefixKVLayer, PrefixKVLayer]:
        """Write the keys and values [P * G, H, 1, D] of this step's tokens.

        Returns the layer's memory in place of keys and values, so that the attention function gets it.
        """
        if layer == 0:
            self._prepare()
        memory = self.layers[layer]
        memory.keys[self.prompt_index, :, self.completion_index, self.token_index] = keys[:, :, 0]
        memory.values[self.prompt_index, :, self.completion_index, self.token_index] = values[:, :, 0]
        return memory, memory

    def _prepare(self) -> None:
        """Compute the mask that all layers of a step share.

        The GPU kernels do not need it; they read `token_index` and the lengths.
        """
        hidden = torch.arange(self.completion_width, device=self.token_index.device) > self.token_index[:, None]
        self.completion_bias = mask_bias(hidden).view(self.num_prompts, 1, self.num_completions, 1, -1)


class PrefixKVLayer(CompletionMemory):
    """The memory of one layer of a `PrefixKVCache`."""

    def __init__(self, cache: PrefixKVCache, shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype) -> None:
        self.cache, device = cache, cache.prefix_bias.device
        # Heads before tokens, so that the matrix products of a step need no copy.
        prefix = (shape.prompts, sizes.heads, shape.prefix_tokens, sizes.width)  # [P, H, L, D]
        own = (shape.prompts, sizes.heads, shape.completions, shape.completion_tokens, sizes.width)  # [P, H, G, T, D]
        self.prefix_keys, self.prefix_values = (torch.zeros(prefix, dtype=dtype, device=device) for _ in range(2))
        self.keys, self.values = (torch.zeros(own, dtype=dtype, device=device) for _ in range(2))

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """See `CompletionMemory.attend`. It uses plain reshapes instead of einops, because it runs in every layer of
        every decoding step, where each call counts.
        """
        cache = self.cache
        prompts, heads, completions, _, width = self.keys.shape
        length = cache.prefix_width
        query = (query if scaling == 1 else query * scaling)[:, :, 0]
        query = query.view(prompts, completions, heads, -1, width).transpose(1, 2).contiguous()  # [P, H, G, R, D]
        for_prefix = query.view(prompts * heads, -1, width)  # [P * H, G * R, D]
        for_own = query.view(prompts * heads * completions, -1, width)  # [P * H * G, R, D]
        prefix_keys, prefix_values = (t.flatten(0, 1)[:, :length] for t in (self.prefix_keys, self.prefix_values))
        keys, values = (t.flatten(0, 2)[:, : cache.completion_width] for t in (self.keys, self.values))

        # Scores over the prefix [P * H, G * R, L] and over the own tokens [P * H * G, R, T], joined for one softmax.
        prefix_scores = torch.bmm(for_prefix, prefix_keys.transpose(1, 2))
        prefix_scores = prefix_scores.view(prompts, -1, length) + cache.prefix_bias[:, :, :length]
        own_scores = torch.bmm(for_own, keys.transpose(1, 2))
        by_completion = own_scores.view(prompts, heads, completions, -1, cache.completion_width)
        own_scores = (by_completion + cache.completion_bias).view(own_scores.shape)
        scores = torch.cat([prefix_scores.view(*for_own.shape[:2], length), own_scores], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        prefix_weights = weights[..., :length].reshape(*for_prefix.shape[:2], length)
        out = torch.bmm(prefix_weights, prefix_values).view_as(for_own)
        out = (out + torch.bmm(weights[..., length:], values)).view_as(query)
        return out.transpose(1, 2).reshape(prompts * completions, 1, -1, width)


def mask_bias(hidden: Tensor) -> Tensor:
    """The bias of attention scores: -inf where `hidden` is True, otherwise 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
