"""Which layers keep their activations for the backward pass and which compute them again, by a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

GIB = 1 << 30


class ActivationBudget:
    """Checkpoints as few layers as the budget allows, anew for each row: a short row needs none.

    What a layer keeps for a token is not computed from its shapes but measured, at the first row, on its last layer:
    it depends on precision, adapter and attention kernel. The last layers keep theirs: the backward pass frees them
    before it comes to the layers that compute again.
    """

    def __init__(self, layers: Sequence[nn.Module], gib: float, allocated: Callable[[], int] | None = None) -> None:
        """`layers` are transformers' checkpointing layers, enabled; `allocated` tells the bytes in use (the GPU's)."""
        self.layers, self.budget = layers, gib * GIB
        self.allocated = allocated or torch.cuda.memory_allocated
        self.bytes_per_token: float | None = None  # of one layer

    @staticmethod
    def can_count(device: torch.device) -> bool:
        """Whether the memory in use is known there: a CPU's allocator does not tell."""
        return device.type == "cuda"

    def num_kept(self, num_tokens: int) -> int:
        """Layers that keep their activations for a row. One that computes again needs the room of one, too."""
        if self.bytes_per_token is None:
            return 1
        room = int(self.budget // max(self.bytes_per_token * num_tokens, 1))
        return len(self.layers) if room >= len(self.layers) else max(room - 1, 0)

    @contextmanager
    def row(self, num_tokens: int) -> Iterator[None]:
        """Around the forward pass of a row with gradient."""
        again = len(self.layers) - self.num_kept(num_tokens)
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < again
        if self.bytes_per_token is not None:
            yield
            return
        readings: list[int] = []
        hooks = [
            self.layers[-1].register_forward_pre_hook(lambda *_: readings.append(self.allocated())),
            # Before the hook by which a sharded layer lets its weights go.
            self.layers[-1].register_forward_hook(lambda *_: readings.append(self.allocated()), prepend=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        before, after = readings
        self.bytes_per_token = (after - before) / num_tokens
