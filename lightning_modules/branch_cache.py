"""Key-value memory for decoding G completions of each prompt: the prompt's part is kept once, unexpanded.

A decoding step of a prompt has G queries that share the prefix and differ in their suffix. Attention over the prefix is
one matrix product for all G branches and all query heads of a key-value head; attention over the suffixes is a small
product for each branch; one softmax spans both. Nothing is repeated in memory, neither for branches nor for heads.

Shapes: P prompts, G branches, A active rows (branches that go on), H key-value heads, R query heads for each of them,
L prefix tokens (right-padded), T tokens that a branch can grow to, D head width. A slot is a flat index into [P, G].
"""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixRecorder:
    """Handed to the model as its cache during prefill: keeps each layer's keys and values, rotated, [P, H, L, D]."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        assert layer == len(self.layers), "layers must come in order"
        self.layers.append((keys, values))
        return keys, values


class BranchCache:
    """Handed to the model as its cache while decoding. All active branches are at the same step."""

    def __init__(self, prefix: PrefixRecorder, lengths: Tensor, num_branches: int, max_new: int) -> None:
        """`lengths` [P] counts the true tokens of each right-padded prefix."""
        keys = prefix.layers[0][0]
        self.num_branches = num_branches
        self.step = 0
        index = torch.arange(keys.shape[2], device=keys.device)
        padding = index[None] >= lengths[:, None]
        self.bias = torch.zeros(padding.shape, dtype=torch.float32, device=keys.device)
        self.bias = self.bias.masked_fill_(padding, float("-inf"))[:, None]  # [P, 1, L]
        self.slots = torch.arange(len(lengths) * num_branches, device=keys.device)  # [A]
        self.layers = [BranchLayer(self, k, v, num_branches, max_new) for k, v in prefix.layers]

    @property
    def num_prompts(self) -> int:
        return self.bias.shape[0]

    @property
    def is_full(self) -> bool:
        """Every branch of every prompt is active, in order."""
        return len(self.slots) == self.num_prompts * self.num_branches

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[BranchLayer, BranchLayer]:
        """Write the keys and values [A, H, 1, D] of this step's tokens; the layer itself answers `attend`."""
        self.layers[layer].write(keys[:, :, 0], values[:, :, 0])
        return self.layers[layer], self.layers[layer]

    def advance(self) -> None:
        self.step += 1

    def keep_rows(self, rows: Tensor, min_waste: float = 0.25) -> None:
        """Go on with those active rows only (ascending indices into [A]).

        Prompts none of whose branches go on are dropped from memory once they are `min_waste` of all prompts: dropping
        copies what stays.
        """
        self.slots = self.slots[rows]
        owners = self.slots // self.num_branches
        alive = torch.unique(owners)
        if len(alive) > (1 - min_waste) * self.num_prompts:
            return
        self.bias = self.bias[alive]
        for layer in self.layers:
            layer.keep_prompts(alive)
        self.slots = torch.searchsorted(alive, owners) * self.num_branches + self.slots % self.num_branches


class BranchLayer:
    """One layer's memory. The cache returns it where a model expects keys, so the attention meets it there."""

    def __init__(self, cache: BranchCache, keys: Tensor, values: Tensor, num_branches: int, max_new: int) -> None:
        prompts, heads, _, width = keys.shape
        self.cache = cache
        # The model lays them out by token; by head, as they are read at every step, a product needs no copy.
        self.prefix_keys, self.prefix_values = keys.contiguous(), values.contiguous()  # [P, H, L, D]
        self.keys = keys.new_zeros(prompts, heads, num_branches, max_new, width)  # [P, H, G, T, D]
        self.values = torch.zeros_like(self.keys)

    def write(self, keys: Tensor, values: Tensor) -> None:
        cache = self.cache
        prompt, branch = cache.slots // cache.num_branches, cache.slots % cache.num_branches
        self.keys[prompt, :, branch, cache.step] = keys
        self.values[prompt, :, branch, cache.step] = values

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Query [A, H * R, 1, D] -> [A, 1, H * R, D]."""
        cache = self.cache
        prompts, heads, branches, _, width = self.keys.shape
        length = self.prefix_keys.shape[2]
        query = (query * scaling)[:, :, 0]
        if not cache.is_full:
            rows = query.new_zeros(prompts * branches, *query.shape[1:])
            rows[cache.slots] = query
            query = rows
        query = query.view(prompts, branches, heads, -1, width).transpose(1, 2).contiguous()  # [P, H, G, R, D]
        together = query.view(prompts * heads, -1, width)  # [P * H, G * R, D]
        apart = query.view(prompts * heads * branches, -1, width)  # [P * H * G, R, D]
        keys, values = (t.flatten(0, 2)[:, : cache.step + 1] for t in (self.keys, self.values))

        over_prefix = torch.bmm(together, self.prefix_keys.flatten(0, 1).transpose(1, 2))
        over_prefix = over_prefix.view(prompts, -1, length) + cache.bias
        over_branch = torch.bmm(apart, keys.transpose(1, 2))
        scores = torch.cat([over_prefix.view(*apart.shape[:2], length), over_branch], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        on_prefix = weights[..., :length].reshape(*together.shape[:2], length)
        out = torch.bmm(on_prefix, self.prefix_values.flatten(0, 1)).view_as(apart)
        out = (out + torch.bmm(weights[..., length:], values)).view_as(query)
        out = out.transpose(1, 2).reshape(prompts * branches, 1, -1, width)
        return out if cache.is_full else out[cache.slots]

    def keep_prompts(self, alive: Tensor) -> None:
        self.prefix_keys, self.prefix_values = self.prefix_keys[alive], self.prefix_values[alive]
        self.keys, self.values = self.keys[alive], self.values[alive]
