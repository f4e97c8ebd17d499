"""Continuous batching: many prompts are decoded in a fixed number of batch slots.

When all completions of a prompt have ended, the next waiting prompt takes its slot. On a CPU each step computes only
the rows that go on, so slots that are done cost nothing. On a GPU a further row is nearly free, and every step computes
all rows at the same shapes, so that it can be captured once as a CUDA graph and replayed (`cuda_graphs`).

Shapes: S batch slots, G completions of each prompt, R = S * G rows, A active rows of a step, T tokens that a completion
can grow to, D hidden width, V vocabulary; p prompts that are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.attention.kv_cache import CacheShape, PrefixKVCache, PrefixRecorder
from lightning_modules.models.inference.base import SamplingModel

CHECK_EVERY = 8  # steps of all rows between two checks which have ended: a check waits for the device

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [A, V], draws [A, 1] in 0-1 -> tokens, log p [A]


@dataclass
class Prefilled:
    """Prompts that the model has read, ready to be decoded."""

    hidden: Tensor  # [p, D] of each prompt's last token
    lengths: Tensor  # long [p], tokens without padding
    next_positions: Tensor  # long [p], of the first completion token
    recorder: PrefixRecorder


@dataclass
class Decoded:
    """All completions of one prompt, on the CPU."""

    number: int  # of the prompt, in the order in which prompts were read
    tokens: list[Tensor]  # G of long [T]
    log_probs: list[Tensor]  # G of [T]
    finished: list[bool]  # whether an end token closes it


@dataclass
class _Slot:
    """A prompt that is being decoded."""

    number: int
    prefix: int  # tokens of the prompt
    steps: int  # tokens sampled by each of its completions that go on


class CompletionDecoder:
    """Decodes prompts in fixed batch slots."""

    def __init__(
        self, model: SamplingModel, choose: Choose, ends: Sequence[int], room: CacheShape, static: bool
    ) -> None:
        """
        Args:
            model: computes the hidden states and logits.
            choose: samples the next tokens.
            ends: tokens that end a completion.
            room: prompts that are decoded at the same time, completions of each, and the longest of both.
            static: compute all rows at each step, with the shapes of the start.
        """
        self.model, self.choose, self.room, self.static = model, choose, room, static
        self.cache = PrefixKVCache(room, model.cache_sizes, model.dtype, model.device)
        device, rows, longest = model.device, room.prompts * room.completions, room.completion_tokens
        self.ends = torch.tensor(ends, device=device)
        self.rows = torch.arange(rows, device=device)
        self.slots: list[_Slot | None] = []
        self.active = self.rows  # rows of the next step
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last one sampled
        self.first = torch.zeros_like(self.token)  # position of the first completion token
        self.length = torch.ones_like(self.token)  # tokens sampled
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)  # the completion has not ended
        self.limit = torch.tensor(longest, device=device)
        # One column more than a completion can fill: a row that has ended reads and writes there.
        self.draws = torch.zeros(rows, longest + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, longest + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, longest + 1, device=device)
        self.run_static: Callable[[int], None] = self.step_all

    def decode(
        self, count: int, prefill: Callable[[int, int], Prefilled], limit: int, draw: Callable[[int], Tensor] | None
    ) -> Iterator[list[Decoded]]:
        """Decode the prompts 0 to `count`; yields prompts as soon as all their completions have ended.

        Free slots are filled again once they are a quarter of all, so that several prompts are read together.

        Args:
            count: number of prompts.
            prefill: `prefill(i, j)` reads the prompts from i to j.
            limit: most tokens of a completion.
            draw: `draw(i)` gives all random numbers of prompt i, float64 [G, limit] in 0-1, so that they do not depend
                on other prompts. None: greedy.
        """
        self.limit.fill_(limit)
        self.alive.zero_()
        slots = self.slots = [None] * self.room.prompts
        taken = num_steps = 0
        while True:
            # 1. Read waiting prompts if enough slots are free, else make one step.
            free = [index for index, slot in enumerate(slots) if slot is None]
            if taken < count and 4 * len(free) >= self.room.prompts:
                chosen = free[: count - taken]
                self._admit(chosen, taken, prefill(taken, taken + len(chosen)), draw)
                taken += len(chosen)
            elif len(free) == self.room.prompts:
                return
            else:
                self._advance([slot for slot in slots if slot is not None])
                num_steps += 1
            # 2. Find prompts whose completions have all ended. On a GPU the check waits for the device, so it is rare.
            longest = max(slot.steps for slot in slots if slot is not None)
            if self.static and num_steps % CHECK_EVERY and longest < limit:
                continue
            alive = self._alive_slots(shrink=taken == count)
            done = [i for i, slot in enumerate(slots) if slot is not None and not alive[i]]
            if done:
                yield self._collect(done, [slots[i].number for i in done])
            for index in done:
                slots[index] = None

    def _admit(
        self, chosen: list[int], number: int, prefilled: Prefilled, draw: Callable[[int], Tensor] | None
    ) -> None:
        """Put the prompts from `number` on into the slots `chosen` and sample the first token of their completions."""
        device = self.rows.device
        self.cache.admit(torch.tensor(chosen, device=device), prefilled.recorder, prefilled.lengths)
        for index, prefix in zip(chosen, prefilled.lengths.tolist(), strict=True):
            self.slots[index] = _Slot(number, prefix, 1)
            number += 1
        rows = self.rows.view(self.room.prompts, self.room.completions)[chosen].flatten()
        if draw is not None:
            numbers = torch.cat([draw(self.slots[index].number) for index in chosen])
            self.draws[rows, : numbers.shape[1]] = numbers.to(device)
        self.alive[rows], self.length[rows] = True, 0
        self.first[rows] = prefilled.next_positions.repeat_interleave(self.room.completions)
        if not self.static:
            self.active = self.cache.active_rows = self.alive.nonzero()[:, 0]
        self._sample(rows, prefilled.hidden.repeat_interleave(self.room.completions, dim=0))

    def _advance(self, slots: list[_Slot]) -> None:
        """One step of all prompts that are being decoded."""
        steps = [slot.steps for slot in slots]
        if self.static:
            self.run_static(self._width(max(steps)))
        else:
            rows = self.active
            self.cache.prefix_width = max(slot.prefix for slot in slots)
            self.cache.begin(self.length[rows] - 1, max(steps))
            self._step(rows)
        for slot in slots:
            slot.steps += 1

    def _width(self, least: int) -> int:
        """How many tokens of the completions a static step reads: one of few widths, because each is captured, and less
        than twice `least`."""
        return min(max(64, 1 << (least - 1).bit_length()), self.room.completion_tokens)

    def step_all(self, width: int) -> None:
        """One step of every row, at shapes that depend on `width` alone."""
        self.cache.begin(self.length - 1, width)
        self._step(self.rows)

    def changed_by_step(self) -> list[Tensor]:
        """Every tensor that a step changes, except the cache. What a step writes there is written again before it is
        read."""
        return [self.token, self.length, self.alive, self.tokens, self.log_probs]

    def _step(self, rows: Tensor) -> None:
        """Compute the last token of each of `rows` and sample the next one. `cache.begin` has been called."""
        positions = (self.first[rows] + self.length[rows] - 1)[None, :, None].expand(3, -1, -1)
        embeddings = self.model.get_input_embeddings()(self.token[rows, None])
        self._sample(rows, self.model.hidden_states(self.cache, positions, embeddings)[:, 0])

    def _sample(self, rows: Tensor, hidden: Tensor) -> None:
        """Add a token, chosen from `hidden` [A, D], to each row that goes on."""
        alive, length = self.alive[rows], self.length[rows]
        chosen, scores = self.choose(self.model.lm_head(hidden), self.draws[rows, length, None])
        column = torch.where(alive, length, self.room.completion_tokens)
        self.tokens[rows, column], self.log_probs[rows, column] = chosen, scores
        self.token[rows] = torch.where(alive, chosen, self.token[rows])
        length = length + alive
        self.length[rows] = length
        self.alive[rows] = alive & (chosen[:, None] != self.ends).all(-1) & (length < self.limit)

    def _alive_slots(self, shrink: bool) -> list[bool]:
        """Whether each slot has a completion that goes on.

        Unless steps compute all rows, the next step leaves out the rows that have ended. With `shrink`, when no prompt
        waits for a slot, the cache also frees their memory.
        """
        kept = self.alive[self.active].nonzero()[:, 0]
        if not self.static and len(kept) < len(self.active):
            self.active = self.active[kept]
            self.cache.keep_rows(kept, shrink)
        return self.alive.view(self.room.prompts, self.room.completions).any(1).tolist()

    def _collect(self, slots: list[int], numbers: list[int]) -> list[Decoded]:
        """The completions in these slots. `numbers`: their prompts."""
        rows = self.rows.view(self.room.prompts, self.room.completions)[slots]
        longest = int(self.length[rows].max())
        tokens, log_probs = self.tokens[rows, :longest].cpu(), self.log_probs[rows, :longest].cpu()
        ends = set(self.ends.tolist())
        decoded = []
        for index, lengths in enumerate(self.length[rows].tolist()):
            ids = [row[:length] for row, length in zip(tokens[index], lengths, strict=True)]
            scores = [row[:length] for row, length in zip(log_probs[index], lengths, strict=True)]
            decoded.append(Decoded(numbers[index], ids, scores, [int(row[-1]) in ends for row in ids]))
        return decoded
