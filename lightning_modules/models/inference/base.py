"""The interface of a model for sampling and for scoring without gradient, for all implementations.

Shapes: B rows, T tokens per row, D width of the model, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import PrefixKVCache, PrefixRecorder
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.attention.ragged_kv_cache import RaggedKVCache

# The tokens to which a token attends. In a decoding step: the cache. In the prefill: the earlier tokens of its row (the
# recorder stores their keys and values). In a packed row: its prompt and its completion.
Context = PrefixKVCache | RaggedKVCache | PrefixRecorder | SharedPrefixAttention


class SamplingModel(ABC):
    """A model without gradient; `fastest_sampling_model` chooses the implementation."""

    lm_head: Callable[[Tensor], Tensor]  # hidden states [N, D] -> logits [N, V]

    def __init__(self, model: nn.Module) -> None:
        """`model` is the whole transformers module."""
        self.dtype, self.device = model.dtype, model.device
        self.architecture = architecture_of(model)
        self.cache_sizes = self.architecture.cache_sizes(model)
        self.get_input_embeddings = model.get_input_embeddings

    @abstractmethod
    def hidden_states(self, context: Context, position_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the final norm.

        Args:
            context: the tokens to which tokens attend. A cache needs T = 1 and one row for each of its active rows, a
                `PrefixRecorder` one prompt per row, a `SharedPrefixAttention` one packed row.
            position_ids: long [3, B, T], M-RoPE: time, row and column.
            inputs_embeds: [B, T, D], or wider for some families (`Architecture.image_features`).
        """

    @abstractmethod
    def refresh(self, source: nn.Module) -> None:
        """Copy the present weights of `source`, the model from which this one was made.

        The addresses of tensors do not change, so that a captured CUDA graph stays valid.
        """
