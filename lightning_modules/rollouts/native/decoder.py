"""Continuous batching: a fixed number of places, in which the next prompt follows when all branches of one have ended.

On a CPU a step computes only the rows that go on. On a GPU every step computes all rows at the same shapes, so that it
can be captured once and replayed (`cuda_graphs`); there a row costs almost nothing.

Shapes: S places for prompts, G branches of each, R = S * G rows, A rows of a step, T tokens that a row can grow to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.attention.kv_cache import CacheShape, PrefixKVCache, PrefixRecorder
from lightning_modules.models.inference.base import SamplingModel

CHECK_EVERY = 8  # steps of all rows between two checks for ended rows: a check waits for the device

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [A, V], draws [A, 1] in 0-1 -> tokens, log p [A]


@dataclass
class Prefilled:
    """Prompts read by the model, ready to be decoded."""

    hidden: Tensor  # [p, D] of each prompt's last token
    lengths: Tensor  # [p] true tokens
    next_positions: Tensor  # [p]
    recorder: PrefixRecorder


@dataclass
class Decoded:
    """All branches of one prompt, on the CPU."""

    number: int  # of the prompt, in the order of admission
    tokens: list[Tensor]  # G of [T]
    log_probs: list[Tensor]  # G of [T]
    finished: list[bool]


@dataclass
class _Place:
    """A prompt that is being decoded."""

    number: int
    prefix: int  # tokens of the prompt
    steps: int  # tokens sampled by each of its branches that go on


class BranchDecoder:
    """Decodes G branches of each prompt in fixed places."""

    def __init__(
        self,
        model: SamplingModel,
        choose: Choose,
        ends: Sequence[int],
        num_places: int,
        group: int,
        prefix_room: int,
        branch_room: int,
        static: bool,
    ) -> None:
        """Allocates the memory of all places.

        Args:
            model: the language model.
            choose: logits [A, V] and draws [A, 1] -> sampled tokens [A] and their log-probabilities [A].
            ends: token ids that end a completion.
            num_places: prompts that are decoded at the same time, S.
            group: branches of each prompt, G.
            prefix_room: longest prompt in tokens.
            branch_room: longest completion in tokens.
            static: compute all rows at each step, at fixed shapes.
        """
        self.model, self.choose, self.static = model, choose, static
        self.num_places, self.group, self.prefix_room, self.branch_room = num_places, group, prefix_room, branch_room
        sizes, device, rows = model.cache_sizes, model.device, num_places * group
        shape = CacheShape(num_places, group, prefix_room, branch_room, sizes.layers, sizes.heads, sizes.width)
        self.cache = PrefixKVCache(shape, model.dtype, device)
        self.ends = torch.tensor(ends, device=device)
        self.rows = torch.arange(rows, device=device)
        self.active = self.rows  # those of the next step
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last sampled
        self.first = torch.zeros_like(self.token)  # position of the first completion token
        self.length = torch.ones_like(self.token)  # tokens sampled
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.limit = torch.tensor(branch_room, device=device)
        # One column more than a row can hold: what a row that has ended would read or write is there.
        self.draws = torch.zeros(rows, branch_room + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, branch_room + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, branch_room + 1, device=device)
        self.run_static: Callable[[int], None] = self.step_all

    def decode(
        self, count: int, prefill: Callable[[int, int], Prefilled], limit: int, draw: Callable[[int], Tensor] | None
    ) -> Iterator[list[Decoded]]:
        """Yield the prompts 0 to `count` - 1 in the order in which they are complete.

        Args:
            count: number of prompts.
            prefill: (i, j) -> the prompts i to j - 1, read by the model.
            limit: most tokens of a completion.
            draw: i -> all random numbers of prompt i, float64 [G, limit] in 0-1, so that they depend on no other
                prompt; None for greedy decoding.
        """
        self.limit.fill_(limit)
        self.alive.zero_()
        places: list[_Place | None] = [None] * self.num_places
        taken = num_steps = 0
        while True:
            free = [index for index, place in enumerate(places) if place is None]
            # Fill free places once they are a quarter of all, so that several prompts are read together.
            if taken < count and 4 * len(free) >= self.num_places:
                chosen = free[: count - taken]
                self._admit(places, chosen, taken, prefill(taken, taken + len(chosen)), draw)
                taken += len(chosen)
            elif len(free) == self.num_places:
                return
            else:
                self._advance([place for place in places if place is not None])
                num_steps += 1
            longest = max(place.steps for place in places if place is not None)
            if self.static and num_steps % CHECK_EVERY and longest < limit:
                continue
            alive = self._look(shrink=taken == count)
            done = [i for i, place in enumerate(places) if place is not None and not alive[i]]
            if done:
                yield self._collect(done, [places[i].number for i in done])
            for index in done:
                places[index] = None

    def _admit(
        self,
        places: list[_Place | None],
        chosen: list[int],
        number: int,
        prefilled: Prefilled,
        draw: Callable[[int], Tensor] | None,
    ) -> None:
        device = self.rows.device
        self.cache.admit(torch.tensor(chosen, device=device), prefilled.recorder, prefilled.lengths)
        for index, prefix in zip(chosen, prefilled.lengths.tolist(), strict=True):
            places[index] = _Place(number, prefix, 1)
            number += 1
        rows = self.rows.view(self.num_places, self.group)[chosen].flatten()
        if draw is not None:
            numbers = torch.cat([draw(places[index].number) for index in chosen])
            self.draws[rows, : numbers.shape[1]] = numbers.to(device)
        self.alive[rows], self.length[rows] = True, 0
        self.first[rows] = prefilled.next_positions.repeat_interleave(self.group)
        if not self.static:
            self.active = self.cache.batch_slots = self.alive.nonzero()[:, 0]
        self._sample(rows, prefilled.hidden.repeat_interleave(self.group, dim=0))

    def _advance(self, places: list[_Place]) -> None:
        steps = [place.steps for place in places]
        if self.static:
            self.run_static(self._width(max(steps)))
        else:
            rows = self.active
            self.cache.prefix_width = max(place.prefix for place in places)
            self.cache.begin(steps[0] - 1 if len(set(steps)) == 1 else self.length[rows] - 1, max(steps))
            self._step(rows)
        for place in places:
            place.steps += 1

    def _width(self, least: int) -> int:
        """Of the branches, how much to read: few widths, as each is captured, and never twice as much as needed."""
        return min(max(64, 1 << (least - 1).bit_length()), self.branch_room)

    def step_all(self, width: int) -> None:
        """One step of every row, at shapes that depend on `width` alone."""
        self.cache.begin(self.length - 1, width)
        self._step(self.rows)

    def changed_by_step(self) -> list[Tensor]:
        """All that a step changes, but for the cache, where it writes no place that is read before it is rewritten."""
        return [self.token, self.length, self.alive, self.tokens, self.log_probs]

    def _step(self, rows: Tensor) -> None:
        """Run the last token of each of `rows` and sample the next. The cache has been told of it (`begin`)."""
        hidden = self.model.hidden_states(
            self.cache,
            input_ids=self.token[rows, None],
            position_ids=(self.first[rows] + self.length[rows] - 1)[None, :, None].expand(3, -1, -1),
        )
        self._sample(rows, hidden[:, 0])

    def _sample(self, rows: Tensor, hidden: Tensor) -> None:
        """Add to each row that goes on a token chosen from `hidden` [A, D]."""
        alive, length = self.alive[rows], self.length[rows]
        chosen, scores = self.choose(self.model.lm_head(hidden), self.draws[rows, length, None])
        place = torch.where(alive, length, self.branch_room)
        self.tokens[rows, place], self.log_probs[rows, place] = chosen, scores
        self.token[rows] = torch.where(alive, chosen, self.token[rows])
        length = length + alive
        self.length[rows] = length
        self.alive[rows] = alive & (chosen[:, None] != self.ends).all(-1) & (length < self.limit)

    def _look(self, shrink: bool) -> list[bool]:
        """Whether each place has a branch that goes on. Unless steps take all rows, the next one takes those that do;
        with `shrink` (no prompt waits for a place) the others leave the cache."""
        kept = self.alive[self.active].nonzero()[:, 0]
        if not self.static and len(kept) < len(self.active):
            self.active = self.active[kept]
            self.cache.keep_rows(kept, shrink)
        return self.alive.view(self.num_places, self.group).any(1).tolist()

    def _collect(self, places: list[int], numbers: list[int]) -> list[Decoded]:
        rows = self.rows.view(self.num_places, self.group)[places]
        longest = int(self.length[rows].max())
        tokens, log_probs = self.tokens[rows, :longest].cpu(), self.log_probs[rows, :longest].cpu()
        ends = set(self.ends.tolist())
        decoded = []
        for index, lengths in enumerate(self.length[rows].tolist()):
            ids = [row[:length] for row, length in zip(tokens[index], lengths, strict=True)]
            scores = [row[:length] for row, length in zip(log_probs[index], lengths, strict=True)]
            decoded.append(Decoded(numbers[index], ids, scores, [int(row[-1]) in ends for row in ids]))
        return decoded
