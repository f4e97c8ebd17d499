"""The model as sampling and scoring without gradient see it, whatever computes it.

Shapes: B rows, T tokens of each, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_modules.models.architectures.base import CacheSizes
from lightning_modules.models.attention.kv_cache import PrefixKVCache, PrefixRecorder
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention

# What a token attends to: in a decoding step the cache, while prompts are read the tokens before it in its row (the
# recorder keeps their keys and values), in a packed row its prompt and its completion.
Context = PrefixKVCache | PrefixRecorder | SharedPrefixAttention


class SamplingModel(Protocol):
    """A model without gradient; `fastest_sampling_model` chooses the implementation."""

    dtype: torch.dtype
    device: torch.device
    cache_sizes: CacheSizes
    lm_head: Callable[[Tensor], Tensor]  # hidden states [N, D] -> logits [N, V]

    def get_input_embeddings(self) -> nn.Module: ...

    def hidden_states(
        self,
        context: Context,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] behind the last norm.

        Args:
            context: what the tokens attend to. A `PrefixKVCache` wants T = 1 and one row for each of its active rows, a
                `PrefixRecorder` one prompt a row, a `SharedPrefixAttention` one packed row.
            position_ids: long [3, B, T], M-RoPE: time, row and column.
            input_ids: long [B, T]; or `inputs_embeds` instead.
            inputs_embeds: [B, T, D], or wider where the family says so (`Architecture.image_features`).
        """
        ...

    def refresh(self, source: nn.Module) -> None:
        """Take the weights of `source`, the model that this one was made from, as they are now.

        No tensor moves: a captured CUDA graph stays valid.
        """
        ...
