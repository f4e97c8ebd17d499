"""The language model of the policy without gradients on a CPU: the same sums with far fewer operations.

On narrow models a token step is bound by the number of operations and not by their size. So LoRA is merged into the
weights, the weights of norms and the scale of attention too; query, key and value are one product, and what follows a
product (activation, gate, residual) is done by it while its output is at hand; weights are laid out once for oneDNN.
Rotation is one product of complex numbers, for which the two halves of a head are interleaved. Queries and keys are
permuted alike, which their products do not see; keys in the cache are in that order, so prompts must be read by the
same model.

Shapes: B rows, T tokens of each, D width of the model, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.models.architectures.base import LayerParts
from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import BranchLayer
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.inference.base import Context
from lightning_modules.models.layers.lora import merged_weight, plain_weight
from lightning_modules.models.layers.onednn_linear import PrepackedLinear

ROWS = 16  # products have a multiple of it: oneDNN makes code for each number of rows, for the time of ten products


class CpuSamplingModel:
    """Reads the weights of a model as they are now, with LoRA merged or left out."""

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        return (
            model.device.type == "cpu"
            and model.dtype == torch.float32
            and architecture_of(model).decoder_parts(model) is not None
            and not any(isinstance(parameter, DTensor) for parameter in model.parameters())  # sharded
        )

    def __init__(self, model: nn.Module, with_adapter: bool = True) -> None:
        self.dtype, self.device = model.dtype, model.device
        self.cache_sizes = architecture_of(model).cache_sizes(model)
        self._weight = merged_weight if with_adapter else plain_weight
        self.refresh(model)
        self._turns = torch.empty(0)  # by position [n, W / 2], of text

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def hidden_states(
        self,
        context: Context,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [B, T, D]. `position_ids` [3, B, T]; with one token a row, a text's: all three are equal.

        Rows of several tokens are prompts, where each token sees those before it, or one packed row.
        """
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens, _ = x.shape
        turns = self._text_turns(position_ids[0]) if tokens == 1 else self._rotations(x, position_ids)
        x = _padded(x.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, turns[:, :, None], context)
        return self.norm(x[: rows * tokens]).view(rows, tokens, -1)

    def refresh(self, source: nn.Module) -> None:
        parts = architecture_of(source).decoder_parts(source)
        self.embeddings, self.rotary, self.norm = source.get_input_embeddings(), parts.rotary, parts.norm
        self.layers = [_Layer(layer, self._weight) for layer in parts.layers]
        self.lm_head = PrepackedLinear(source.get_output_embeddings().weight.detach())

    def _text_turns(self, positions: Tensor) -> Tensor:
        needed = int(positions.max()) + 1
        if needed > len(self._turns):
            every = torch.arange(2 * needed, device=positions.device)
            self._turns = self._rotations(torch.empty(0), every.expand(3, 1, -1))[0]
        return self._turns[positions]

    def _rotations(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Complex [B, T, W / 2]. The model's own angles, which it gives once for each half of a head."""
        cos, sin = (t.chunk(2, dim=-1)[0] for t in self.rotary(x, position_ids))
        return torch.complex(cos, sin)


class _Norm:
    """Without its weight, which is in those of the products behind it."""

    def __init__(self, norm: nn.Module) -> None:
        self.eps = torch.tensor(norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()


class _Layer:
    """One decoder layer; `x` [N, D] has padded rows at its end. `weight` gives that of a linear layer."""

    def __init__(self, layer: LayerParts, weight: Callable[[nn.Module], Tensor]) -> None:
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
        """The halves of each head, [a1, a2, ..., b1, b2, ...], as pairs: [a1, b1, a2, b2, ...]."""
        return by_output.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)

    def __call__(self, x: Tensor, turns: Tensor, context: Context) -> Tensor:
        x = self.out.plus(_padded(self._attend(self.qkv(self.before_attention(x)), turns, context)), x)
        normed = self.before_mlp(x)
        return self.down.plus(self.up.times(normed, self.gate(normed, "swish")), x)

    def _attend(self, qkv: Tensor, turns: Tensor, context: Context) -> Tensor:
        """Of N padded rows the first B * T; `turns` [B, T, 1, W / 2]. Returns [B * T, H * W]."""
        rows, tokens = turns.shape[:2]
        heads = qkv[: rows * tokens].view(rows, tokens, -1, self.width)
        pairs = torch.view_as_complex(heads[:, :, : -self.num_keys].unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        query, key = turned[:, :, : -self.num_keys].transpose(1, 2), turned[:, :, -self.num_keys :].transpose(1, 2)
        value = heads[:, :, -self.num_keys :].transpose(1, 2)
        if isinstance(context, SharedPrefixAttention):
            return context(query, key, value, 1.0).reshape(rows * tokens, -1)
        key, value = context.update(key, value, self.index)
        if isinstance(key, BranchLayer):
            return key.attend(query, 1.0).reshape(rows * tokens, -1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows * tokens, -1)


def _padded(x: Tensor) -> Tensor:
    """[N, D] with rows of zeros after it, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x
