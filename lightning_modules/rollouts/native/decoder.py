"""Continuous batching: many prompts are decoded at the same time, and waiting prompts take the place of those that end.

On a CPU, each step computes only active rows (`ragged_kv_cache`), and a prompt is admitted as soon as completions that
have ended leave enough memory. On a GPU, an additional row is nearly free, and every step computes all rows with the
same shapes, so that it can be captured once as a CUDA graph and replayed (`cuda_graphs`). There a prompt waits for the
slot of another one.

Shapes: S slots, G completions per prompt, R = S * G rows, A active rows of a step, T largest number of tokens of
a completion, D hidden width, V vocabulary, p prompts in one prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.models.attention.kv_cache import CacheShape, PrefixKVCache, PrefixRecorder
from lightning_modules.models.attention.ragged_kv_cache import RaggedKVCache
from lightning_modules.models.inference.base import SamplingModel

# There are SLOTS * `prompts_per_batch` slots where steps compute only active rows. A prompt keeps its slot until its
# last completion has ended. The memory of its other completions goes to further prompts earlier; these need slots too.
SLOTS = 2
CHECK_EVERY = 8  # number of steps of all rows between two checks for ended rows, because a check waits for the device

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [A, V], draws [A, 1] in 0-1 -> tokens, log p [A]


@dataclass
class Prefilled:
    """The result of the prefill of some prompts."""

    hidden: Tensor  # [p, D], hidden state of each prompt's last token
    lengths: Tensor  # long [p], tokens without padding
    next_positions: Tensor  # long [p], position of the first completion token
    recorder: PrefixRecorder


@dataclass
class Decoded:
    """All completions of one prompt, on the CPU."""

    number: int  # number of the prompt, in the order of reading
    tokens: list[Tensor]  # G tensors, long [T]
    log_probs: list[Tensor]  # G tensors [T]
    finished: list[bool]  # whether it ends with an end token


@dataclass
class _Slot:
    """A prompt that is being decoded."""

    number: int
    steps: int  # number of tokens of each of its active completions


class CompletionDecoder:
    """Decodes prompts; each has a slot, a fixed range of rows in the tensors below, until all its completions end."""

    def __init__(
        self, model: SamplingModel, choose: Choose, ends: Sequence[int], room: CacheShape, static: bool
    ) -> None:
        """
        Args:
            model: computes the hidden states and logits.
            choose: samples the next tokens.
            ends: tokens that end a completion.
            room: sizes of the cache. With `static`, its number of prompts is also the number of slots.
            static: compute all rows in each step, with constant shapes.
        """
        self.model, self.choose, self.room, self.static = model, choose, room, static
        kind, self.num_slots = (PrefixKVCache, room.prompts) if static else (RaggedKVCache, SLOTS * room.prompts)
        self.cache = kind(room, model.cache_sizes, model.dtype, model.device)
        device, rows, longest = model.device, self.num_slots * room.completions, room.completion_tokens
        self.ends = torch.tensor(ends, device=device)
        self.rows = torch.arange(rows, device=device)
        self.slots: list[_Slot | None] = []
        self.active = self.rows if static else self.rows[:0]  # rows that the next step computes, in the cache's order
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last sampled token
        self.first = torch.zeros_like(self.token)  # position of the first completion token
        self.length = torch.ones_like(self.token)  # number of sampled tokens
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)  # whether the completion has not ended
        self.limit = torch.tensor(longest, device=device)
        # One column more than a completion needs, because a row that has ended reads and writes there.
        self.draws = torch.zeros(rows, longest + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, longest + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, longest + 1, device=device)
        self.run_static: Callable[[int], None] = self.step_all

    def decode(
        self,
        count: int,
        prefill: Callable[[int, int], Prefilled],
        limit: int,
        draw: Callable[[int], Tensor] | None,
        watch: Callable[[list[int]], None] | None = None,
    ) -> Iterator[list[Decoded]]:
        """Decode the prompts 0 to `count`; yields each prompt as soon as all its completions have ended.

        Waiting prompts are admitted when there is room for all of them or for a quarter of `room.prompts`, so that
        several prompts are read together.

        Args:
            count: number of prompts.
            prefill: `prefill(i, j)` reads the prompts from i to j.
            limit: largest number of tokens of a completion.
            draw: `draw(i)` returns all random numbers of prompt i, float64 [G, limit] in 0-1, so that they do not
                depend on other prompts. None means greedy.
            watch: called with the tokens so far of the only completion, after each step, or with `static` after
                several.
        """
        self.limit.fill_(limit)
        self.alive.zero_()
        self._alive_slots()  # the cache drops the rows of an earlier call that ended with an error
        slots = self.slots = [None] * self.num_slots
        taken = num_steps = 0
        while True:
            # 1. Read waiting prompts if there is room for enough of them; otherwise make one step.
            free = [index for index, slot in enumerate(slots) if slot is None]
            chosen = free[: min(count - taken, self.cache.num_admissible())]
            if chosen and 4 * len(chosen) >= min(4 * (count - taken), self.room.prompts):
                self._admit(chosen, taken, prefill(taken, taken + len(chosen)), draw)
                taken += len(chosen)
            elif len(free) == len(slots):
                return
            else:
                self._advance([slot for slot in slots if slot is not None])
                num_steps += 1
            # 2. Find prompts whose completions have all ended. On a GPU the check waits for the device, so it is rare.
            longest = max(slot.steps for slot in slots if slot is not None)
            if self.static and num_steps % CHECK_EVERY and longest < limit:
                continue
            alive = self._alive_slots()
            done = [i for i, slot in enumerate(slots) if slot is not None and not alive[i]]
            if watch is not None and not done:
                watch(self.tokens[0, : slots[0].steps].tolist())
            if done:
                yield self._collect(done, [slots[i].number for i in done])
            for index in done:
                slots[index] = None

    def _admit(
        self, chosen: list[int], number: int, prefilled: Prefilled, draw: Callable[[int], Tensor] | None
    ) -> None:
        """Put the prompts from `number` on into the slots `chosen` and sample the first token of their completions."""
        device = self.rows.device
        for place, index in enumerate(chosen):
            self.slots[index] = _Slot(number + place, 1)
        rows = self.rows.view(self.num_slots, self.room.completions)[chosen].flatten()
        if draw is not None:
            numbers = torch.cat([draw(self.slots[index].number) for index in chosen])
            self.draws[rows, : numbers.shape[1]] = numbers.to(device)
        self.alive[rows], self.length[rows] = True, 0
        self.first[rows] = prefilled.next_positions.repeat_interleave(self.room.completions)
        if self.static:
            self.cache.admit(torch.tensor(chosen, device=device), prefilled.recorder, prefilled.lengths)
        else:
            self.cache.admit(prefilled.recorder, prefilled.lengths)
            self.active = torch.cat([self.active, rows])
        self._sample(rows, prefilled.hidden.repeat_interleave(self.room.completions, dim=0))

    def _advance(self, slots: list[_Slot]) -> None:
        """One step of all prompts that are being decoded."""
        if self.static:
            self.run_static(self._width(max(slot.steps for slot in slots)))
        else:
            self.cache.begin()
            self._step(self.active)
        for slot in slots:
            slot.steps += 1

    def _width(self, least: int) -> int:
        """Number of completion tokens that a static step reads.

        There are only few widths, because each is captured; the width is less than twice `least`.
        """
        return min(max(64, 1 << (least - 1).bit_length()), self.room.completion_tokens)

    def step_all(self, width: int) -> None:
        """One step of every row, with shapes that depend only on `width`."""
        self.cache.begin(self.length - 1, width)
        self._step(self.rows)

    def changed_by_step(self) -> list[Tensor]:
        """Every tensor that a step changes, except the cache, because entries of the cache are written again before
        they are read.
        """
        return [self.token, self.length, self.alive, self.tokens, self.log_probs]

    def _step(self, rows: Tensor) -> None:
        """Compute the last token of each row in `rows` and sample the next token. `cache.begin` has been called."""
        positions = (self.first[rows] + self.length[rows] - 1)[None, :, None].expand(3, -1, -1)
        embeddings = self.model.get_input_embeddings()(self.token[rows, None])
        self._sample(rows, self.model.hidden_states(self.cache, positions, embeddings)[:, 0])

    def _sample(self, rows: Tensor, hidden: Tensor) -> None:
        """Add a token, sampled from `hidden` [A, D], to each active row."""
        alive, length = self.alive[rows], self.length[rows]
        chosen, scores = self.choose(self.model.lm_head(hidden), self.draws[rows, length, None])
        column = torch.where(alive, length, self.room.completion_tokens)
        self.tokens[rows, column], self.log_probs[rows, column] = chosen, scores
        self.token[rows] = torch.where(alive, chosen, self.token[rows])
        length = length + alive
        self.length[rows] = length
        self.alive[rows] = alive & (chosen[:, None] != self.ends).all(-1) & (length < self.limit)

    def _alive_slots(self) -> list[bool]:
        """Whether each slot has an active completion.

        Unless steps compute all rows, the cache drops the rows that have ended, and the next step skips them.
        """
        if not self.static and not (alive := self.alive[self.active]).all():
            self.active = self.active[self.cache.keep(alive)]
        return self.alive.view(self.num_slots, self.room.completions).any(1).tolist()

    def _collect(self, slots: list[int], numbers: list[int]) -> list[Decoded]:
        """The completions in these slots. `numbers`: their prompts."""
        rows = self.rows.view(self.num_slots, self.room.completions)[slots]
        longest = int(self.length[rows].max())
        tokens, log_probs = self.tokens[rows, :longest].cpu(), self.log_probs[rows, :longest].cpu()
        ends = set(self.ends.tolist())
        decoded = []
        for index, lengths in enumerate(self.length[rows].tolist()):
            ids = [row[:length] for row, length in zip(tokens[index], lengths, strict=True)]
            scores = [row[:length] for row, length in zip(log_probs[index], lengths, strict=True)]
            decoded.append(Decoded(numbers[index], ids, scores, [int(row[-1]) in ends for row in ids]))
        return decoded
