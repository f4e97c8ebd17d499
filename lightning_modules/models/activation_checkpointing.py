"""Activation checkpointing for the smallest number of layers that fits a memory budget.

A checkpointed layer does not keep its activations; the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

GIB = 1 << 30


class ActivationBudget:
    """Chooses the checkpointed decoder layers for each packed row. A short row needs none.

    The activation memory per token is measured on the last layer during the first row, because it depends on precision,
    LoRA and the attention kernel. Checkpointing is switched off for the *last* layers: the backward pass reaches them
    first and frees their activations before the earlier layers are recomputed.
    """

    def __init__(self, layers: Sequence[nn.Module], gib: float, allocated: Callable[[], int] | None = None) -> None:
        """
        Args:
            layers: transformers' checkpointing layers, with checkpointing enabled.
            gib: budget for the activations of all layers, in GiB.
            allocated: returns the bytes in use; by default those of the current GPU.
        """
        self.layers, self.budget = layers, gib * GIB
        self.allocated = allocated or torch.cuda.memory_allocated
        self.bytes_per_token: float | None = None  # activations of one layer

    def num_kept(self, num_tokens: int) -> int:
        """Number of layers that keep their activations for a row of `num_tokens`."""
        if self.bytes_per_token is None:
            return 1  # the last layer, on which the memory is measured
        # While a layer is recomputed, the memory of one more layer is needed.
        room = int(self.budget // max(self.bytes_per_token * num_tokens, 1))
        return len(self.layers) if room >= len(self.layers) else max(room - 1, 0)

    @contextmanager
    def row(self, num_tokens: int) -> Iterator[None]:
        """Context for the forward pass of a row with gradient."""
        again = len(self.layers) - self.num_kept(num_tokens)
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < again
        if self.bytes_per_token is not None:
            yield
            return
        readings: list[int] = []
        hooks = [
            self.layers[-1].register_forward_pre_hook(lambda *_: readings.append(self.allocated())),
            # Must run before FSDP's hook, which frees the layer's gathered weights.
            self.layers[-1].register_forward_hook(lambda *_: readings.append(self.allocated()), prepend=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        before, after = readings
        self.bytes_per_token = (after - before) / num_tokens
