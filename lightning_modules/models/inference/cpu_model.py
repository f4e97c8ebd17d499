"""The decoder without gradients on a CPU: the same result with far fewer operations.

For narrow models, the time of a decoding step depends on the number of operations, not on their size. Therefore:

- LoRA, the weights of the norms and the scale of attention are multiplied into the linear weights.
- Query, key and value are one matrix product. SiLU, gate and residual are fused into the product before them.
- Weights are in oneDNN's own layout (`PrepackedLinear`).
- The rotary embedding is one product of complex numbers. For this, the two halves of a head are interleaved in queries
  and keys, which does not change their dot products. Keys in a cache have this order, so prefill and decoding must use
  the same model.

Shapes: B rows, T tokens per row, N = B * T, D width of the model, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.models.architectures.base import LayerParts
from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import CompletionMemory
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.inference.base import Context, SamplingModel
from lightning_modules.models.layers.lora import merged_weight, plain_weight
from lightning_modules.models.layers.onednn_linear import PrepackedLinear

# The rows of each matrix product are padded to a multiple of this number: oneDNN generates code for each number of
# rows, which takes as long as ten products.
ROWS = 16


class CpuSamplingModel(SamplingModel):
    """A `SamplingModel` with the present weights of a model; LoRA is merged or ignored."""

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        """Whether this class supports `model` with its device and precision."""
        return (
            model.device.type == "cpu"
            and model.dtype == torch.float32
            and architecture_of(model).decoder_parts(model) is not None
            and not any(isinstance(parameter, DTensor) for parameter in model.parameters())  # sharded
        )

    def __init__(self, model: nn.Module, with_adapter: bool = True) -> None:
        super().__init__(model)
        self._weight = merged_weight if with_adapter else plain_weight
        self.refresh(model)

    def hidden_states(self, context: Context, position_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        rows, tokens, _ = inputs_embeds.shape
        # The rotary module gives both halves of a head the same angles; cos + i sin, complex [B, T, W / 2].
        cos, sin = (t.chunk(2, dim=-1)[0] for t in self.rotary(inputs_embeds, position_ids))
        factors = torch.complex(cos, sin)
        x = _padded(inputs_embeds.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, factors[:, :, None], context)
        return self.norm(x[: rows * tokens]).view(rows, tokens, -1)

    def refresh(self, source: nn.Module) -> None:
        parts = self.architecture.decoder_parts(source)
        self.rotary, self.norm = parts.rotary, parts.norm
        self.layers = [_Layer(layer, self._weight) for layer in parts.layers]
        self.lm_head = PrepackedLinear(source.get_output_embeddings().weight.detach())


class _Norm:
    """An RMS norm without its weight, which is multiplied into the linear weights that follow."""

    def __init__(self, norm: nn.Module) -> None:
        self.eps = torch.tensor(norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        # x / sqrt(eps + |x|^2 / D), with as few operations as possible.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()


class _Layer:
    """One decoder layer, for x [N', D]: N rows and padding up to a multiple of `ROWS`."""

    def __init__(self, layer: LayerParts, weight: Callable[[nn.Module], Tensor]) -> None:
        """`weight` returns the weight of a linear layer, with LoRA merged or ignored."""
        self.index, self.width, self.num_keys = layer.index, layer.head_width, layer.num_key_heads
        self.before_attention, self.before_mlp = _Norm(layer.attention_norm), _Norm(layer.mlp_norm)
        q, k, v, scale = layer.query, layer.key, layer.value, layer.scaling
        weights = [self._interleaved(weight(q) * scale), self._interleaved(weight(k)), weight(v)]
        biases = [self._interleaved(q.bias.detach() * scale), self._interleaved(k.bias.detach()), v.bias.detach()]
        self.qkv = PrepackedLinear(torch.cat(weights) * layer.attention_norm.weight.detach(), torch.cat(biases))
        self.out = PrepackedLinear(weight(layer.output))
        of_norm = layer.mlp_norm.weight.detach()
        self.gate, self.up = (PrepackedLinear(weight(linear) * of_norm) for linear in (layer.gate, layer.up))
        self.down = PrepackedLinear(weight(layer.down))

    def _interleaved(self, by_output: Tensor) -> Tensor:
        """A weight or bias with the outputs [a1, a2, ..., b1, b2, ...] of each head as [a1, b1, a2, b2, ...]."""
        return rearrange(by_output, "(heads two half) ... -> (heads half two) ...", two=2, half=self.width // 2)

    def __call__(self, x: Tensor, factors: Tensor, context: Context) -> Tensor:
        x = self.out.plus(_padded(self._attend(self.qkv(self.before_attention(x)), factors, context)), x)
        normed = self.before_mlp(x)
        return self.down.plus(self.up.times(normed, self.gate(normed, "swish")), x)

    def _attend(self, qkv: Tensor, factors: Tensor, context: Context) -> Tensor:
        """Attention of the first N rows.

        Args:
            qkv: queries, keys and values, [N', (H + 2 key-value heads) * W].
            factors: rotary factors, complex [B, T, 1, W / 2].
            context: see `SamplingModel`.

        Returns:
            [N, H * W].
        """
        rows, tokens = factors.shape[:2]
        heads = qkv[: rows * tokens].view(rows, tokens, -1, self.width)
        pairs = torch.view_as_complex(heads[:, :, : -self.num_keys].unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * factors).flatten(-2)
        query, key = rotated[:, :, : -self.num_keys].transpose(1, 2), rotated[:, :, -self.num_keys :].transpose(1, 2)
        value = heads[:, :, -self.num_keys :].transpose(1, 2)
        if isinstance(context, SharedPrefixAttention):
            return context(query, key, value, 1.0).reshape(rows * tokens, -1)
        key, value = context.update(key, value, self.index)
        if isinstance(key, CompletionMemory):
            return key.attend(query, 1.0).reshape(rows * tokens, -1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows * tokens, -1)


def _padded(x: Tensor) -> Tensor:
    """x [N, D], padded with rows of zeros to a multiple of `ROWS`."""
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x
