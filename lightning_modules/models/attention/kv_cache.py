"""Key-value memory for decoding G completions of each prompt: the prompt's part is kept once, unexpanded.

A decoding step of a prompt has G queries that share the prefix and differ in their suffix. Attention over the prefix is
one matrix product for all G branches and all query heads of a key-value head; attention over the suffixes is a small
product for each branch; one softmax spans both. Nothing is repeated in memory, neither for branches nor for heads.

Shapes: P prompts, G branches, A active rows (branches that go on), H key-value heads, R query heads for each of them,
L prefix tokens (right-padded), T tokens that a branch can grow to, D head width. A slot is a flat index into [P, G].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class PrefixRecorder:
    """Handed to the model as its cache during prefill: keeps each layer's keys and values, rotated, [P, H, L, D].

    What else `update` is given differs between versions of transformers, and bears on its own caches only.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        assert layer == len(self.layers), "layers must come in order"
        self.layers.append((keys, values))
        return keys, values


@dataclass(frozen=True)
class CacheShape:
    """Room for `prompts` prompts of up to `prefix` tokens, with `branches` branches each of up to `branch` tokens."""

    prompts: int
    branches: int
    prefix: int
    branch: int
    layers: int
    heads: int  # key-value heads
    width: int  # of a head


class BranchCache:
    """Handed to the model as its cache while decoding. `admit` fills prompts, `begin` says what the next step is.

    Every tensor has its final shape from the start and is changed in place, so that a step can be captured and
    replayed; only `keep_rows` makes new ones.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Prompts that are not admitted yet have one token of zeros."""
        self.num_prompts, self.num_branches = shape.prompts, shape.branches
        self.slots = torch.arange(shape.prompts * shape.branches, device=device)  # [A]
        self.prefix_bias = torch.full((shape.prompts, 1, shape.prefix), float("-inf"), device=device)
        self.prefix_bias[:, :, 0] = 0
        self.prefix_lengths = torch.ones(shape.prompts, dtype=torch.long, device=device)
        self.prefix_width, self.branch_width = shape.prefix, shape.branch  # how much of them is read
        self.places: Tensor | int = 0
        self.seen: Tensor | int = 1  # tokens of a branch, with this step's
        self.owners = self.branches = self.slots  # prompt and branch of each slot, as of the step that has begun
        self.branch_bias: Tensor | None = None
        self.layers = [BranchLayer(self, shape, dtype, device) for _ in range(shape.layers)]

    @property
    def is_full(self) -> bool:
        """Every branch of every prompt is active, in order."""
        return len(self.slots) == self.num_prompts * self.num_branches

    def admit(self, prompts: Tensor, recorder: PrefixRecorder, lengths: Tensor) -> None:
        """Put prefixes of `lengths` [p] true tokens in the places `prompts` [p]; their branches are empty again."""
        padding = torch.arange(self.prefix_bias.shape[2], device=lengths.device) >= lengths[:, None]
        self.prefix_bias[prompts], self.prefix_lengths[prompts] = _bias(padding)[:, None], lengths
        for layer, (keys, values) in zip(self.layers, recorder.layers, strict=True):
            layer.prefix_keys[prompts, :, : keys.shape[2]] = keys
            layer.prefix_values[prompts, :, : values.shape[2]] = values

    def begin(self, places: Tensor | int, width: int) -> None:
        """The next step writes each active row's token at `places` [A] of its branch; one number if all are alike.

        `width` is how much of the branches is read: places are below it.
        """
        self.places, self.seen, self.branch_width = places, places + 1, width

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[BranchLayer, BranchLayer]:
        """Write the keys and values [A, H, 1, D] of this step's tokens; the layer itself answers `attend`."""
        if layer == 0:
            self._prepare()
        self.layers[layer].write(keys[:, :, 0], values[:, :, 0])
        return self.layers[layer], self.layers[layer]

    def _prepare(self) -> None:
        """What all layers of a step need (but for a GPU's kernels, which see to it themselves)."""
        self.owners, self.branches = self.slots // self.num_branches, self.slots % self.num_branches
        self.branch_bias = None
        if isinstance(self.places, Tensor):
            last = self.places.new_zeros(self.num_prompts * self.num_branches)
            last[self.slots] = self.places
            hidden = torch.arange(self.branch_width, device=last.device) > last[:, None]
            self.branch_bias = _bias(hidden).view(self.num_prompts, 1, self.num_branches, 1, -1)

    def keep_rows(self, rows: Tensor, shrink: bool = True, min_waste: float = 0.25) -> None:
        """Go on with those active rows only (ascending indices into [A]).

        With `shrink` memory is cut to the prompts that go on, and to as many branches as the prompt with most of them
        has, once that drops `min_waste` of it: it copies what stays. Rows stay in order. Nothing can be admitted then.
        """
        self.slots = self.slots[rows]
        if not shrink or len(rows) == 0:
            return
        owners = self.slots // self.num_branches
        alive, counts = torch.unique_consecutive(owners, return_counts=True)
        widest = int(counts.max())
        if len(alive) * widest > (1 - min_waste) * self.num_prompts * self.num_branches:
            return
        first = counts.cumsum(0) - counts
        inside = torch.arange(len(owners), device=owners.device) - first.repeat_interleave(counts)
        prompt = torch.arange(len(alive), device=owners.device).repeat_interleave(counts)
        kept = self.slots.new_zeros(len(alive), widest)  # old branch of each new place; what is not filled is not read
        kept[prompt, inside] = self.slots % self.num_branches
        for layer in self.layers:
            layer.keep(alive, kept)
        self.prefix_bias, self.prefix_lengths = self.prefix_bias[alive], self.prefix_lengths[alive]
        self.num_prompts, self.num_branches = len(alive), widest
        self.slots = prompt * widest + inside


class BranchLayer:
    """One layer's memory. The cache returns it where a model expects keys, so the attention meets it there."""

    def __init__(self, cache: BranchCache, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.cache = cache
        # By head, as they are read at every step: a product needs no copy.
        prefix = (shape.prompts, shape.heads, shape.prefix, shape.width)  # [P, H, L, D]
        branch = (shape.prompts, shape.heads, shape.branches, shape.branch, shape.width)  # [P, H, G, T, D]
        self.prefix_keys, self.prefix_values = (torch.zeros(prefix, dtype=dtype, device=device) for _ in range(2))
        self.keys, self.values = (torch.zeros(branch, dtype=dtype, device=device) for _ in range(2))

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values [A, H, D] of this step's tokens."""
        cache = self.cache
        if cache.is_full and isinstance(cache.places, int):
            grid = (cache.num_prompts, cache.num_branches)
            self.keys.select(3, cache.places).copy_(keys.unflatten(0, grid).transpose(1, 2))
            self.values.select(3, cache.places).copy_(values.unflatten(0, grid).transpose(1, 2))
        else:
            self.keys[cache.owners, :, cache.branches, cache.places] = keys
            self.values[cache.owners, :, cache.branches, cache.places] = values

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Query [A, H * R, 1, D] -> [A, 1, H * R, D]."""
        cache = self.cache
        prompts, heads, branches, _, width = self.keys.shape
        length = cache.prefix_width
        # One operation less in each layer of a step: `CpuSamplingModel` has the scale in its weights.
        query = (query if scaling == 1 else query * scaling)[:, :, 0]
        if not cache.is_full:
            rows = query.new_zeros(prompts * branches, *query.shape[1:])
            rows[cache.slots] = query
            query = rows
        query = query.view(prompts, branches, heads, -1, width).transpose(1, 2).contiguous()  # [P, H, G, R, D]
        together = query.view(prompts * heads, -1, width)  # [P * H, G * R, D]
        apart = query.view(prompts * heads * branches, -1, width)  # [P * H * G, R, D]
        prefix_keys, prefix_values = (t.flatten(0, 1)[:, :length] for t in (self.prefix_keys, self.prefix_values))
        keys, values = (t.flatten(0, 2)[:, : cache.branch_width] for t in (self.keys, self.values))

        over_prefix = torch.bmm(together, prefix_keys.transpose(1, 2))
        over_prefix = over_prefix.view(prompts, -1, length) + cache.prefix_bias[:, :, :length]
        over_branch = torch.bmm(apart, keys.transpose(1, 2))
        if cache.branch_bias is not None:
            by_branch = over_branch.view(prompts, heads, branches, -1, cache.branch_width)
            over_branch = (by_branch + cache.branch_bias).view(over_branch.shape)
        scores = torch.cat([over_prefix.view(*apart.shape[:2], length), over_branch], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        on_prefix = weights[..., :length].reshape(*together.shape[:2], length)
        out = torch.bmm(on_prefix, prefix_values).view_as(apart)
        out = (out + torch.bmm(weights[..., length:], values)).view_as(query)
        out = out.transpose(1, 2).reshape(prompts * branches, 1, -1, width)
        return out if cache.is_full else out[cache.slots]

    def keep(self, prompts: Tensor, branches: Tensor) -> None:
        """Go on with `prompts` [P'] and, of each, the branches [P', G']."""
        self.prefix_keys, self.prefix_values = self.prefix_keys[prompts], self.prefix_values[prompts]
        chosen = (t.transpose(1, 2)[prompts[:, None], branches] for t in (self.keys, self.values))  # [P', G', H, T, D]
        self.keys, self.values = (t.transpose(1, 2).contiguous() for t in chosen)


def _bias(hidden: Tensor) -> Tensor:
    """-inf where `hidden`, 0 elsewhere: what attention adds to its scores."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
