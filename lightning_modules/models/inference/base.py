"""The model as sampling and scoring without gradient see it, whatever computes it.

Shapes: B rows, T tokens of each, D width of the model, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import PrefixKVCache, PrefixRecorder
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention

# What a token attends to: in a decoding step the cache, while prompts are read the tokens before it in its row (the
# recorder keeps their keys and values), in a packed row its prompt and its completion.
Context = PrefixKVCache | PrefixRecorder | SharedPrefixAttention


class SamplingModel(ABC):
    """A model without gradient; `fastest_sampling_model` chooses the implementation."""

    lm_head: Callable[[Tensor], Tensor]  # hidden states [N, D] -> logits [N, V]

    def __init__(self, model: nn.Module) -> None:
        """`model`: the whole transformers module that is computed."""
        self.dtype, self.device = model.dtype, model.device
        self.architecture = architecture_of(model)
        self.cache_sizes = self.architecture.cache_sizes(model)
        self.get_input_embeddings = model.get_input_embeddings

    @abstractmethod
    def hidden_states(self, context: Context, position_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Hidden states [B, T, D] behind the last norm.

        Args:
            context: what the tokens attend to. A `PrefixKVCache` wants T = 1 and one row for each of its active rows, a
                `PrefixRecorder` one prompt a row, a `SharedPrefixAttention` one packed row.
            position_ids: long [3, B, T], M-RoPE: time, row and column.
            inputs_embeds: [B, T, D], or wider where the family says so (`Architecture.image_features`).
        """

    @abstractmethod
    def refresh(self, source: nn.Module) -> None:
        """Take the weights of `source`, the model that this one was made from, as they are now.

        No tensor moves: a captured CUDA graph stays valid.
        """
