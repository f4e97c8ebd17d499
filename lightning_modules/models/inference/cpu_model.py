"""The language model of the policy without gradients on a CPU: the same sums with far fewer operations.

On narrow models a token step is bound by the number of operations and not by their size. So LoRA is folded into the
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

from lightning_modules.models.attention.kv_cache import BranchCache, BranchLayer, PrefixRecorder
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.layers.lora import folded_weight, plain_weight
from lightning_modules.models.layers.onednn_linear import PackedProduct

ROWS = 16  # products have a multiple of it: oneDNN makes code for each number of rows, for the time of ten products

Context = BranchCache | PrefixRecorder | SharedPrefixAttention  # what a token's attention sees


class LeanModel:
    """Reads the weights of a Qwen2.5-VL as they are now, with LoRA folded in or left out."""

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        return (
            model.device.type == "cpu"
            and model.dtype == torch.float32
            and model.config.text_config.hidden_act == "silu"
        )

    def __init__(self, model: nn.Module, with_adapter: bool = True) -> None:
        text, weight = model.model.language_model, folded_weight if with_adapter else plain_weight
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.embeddings, self.rotary, self.norm = model.get_input_embeddings(), text.rotary_emb, text.norm
        self.layers = [_Layer(layer, weight) for layer in text.layers]
        self.lm_head = PackedProduct(model.lm_head.weight.detach())
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


class KeptLean:
    """A `LeanModel` of frozen weights, without adapter, kept from call to call."""

    def __init__(self) -> None:
        self._state: list[tuple[int, int]] = []
        self._lean: LeanModel | None = None

    def __reduce__(self) -> tuple[type[KeptLean], tuple[()]]:
        return KeptLean, ()  # a copy of the policy reads its own weights; what oneDNN has laid out cannot be copied

    def read(self, model: nn.Module) -> LeanModel:
        """Another one where the weights have been written, or moved, since the last call."""
        state = [(w.data_ptr(), w._version) for w in model.parameters() if not w.requires_grad]
        if self._lean is None or self._state != state:
            self._state, self._lean = state, LeanModel(model, with_adapter=False)
        return self._lean


class _Norm:
    """Without its weight, which is in those of the products behind it."""

    def __init__(self, norm: nn.Module) -> None:
        self.eps = torch.tensor(norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()


class _Layer:
    """One decoder layer; `x` [N, D] has padded rows at its end. `weight` gives that of a linear layer."""

    def __init__(self, layer: nn.Module, weight: Callable[[nn.Module], Tensor]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.width = attention.layer_idx, attention.head_dim
        self.num_keys = attention.num_key_value_heads
        self.before_attention, self.before_mlp = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        scale = attention.scaling
        weights = [self._interleaved(weight(q) * scale), self._interleaved(weight(k)), weight(v)]
        biases = [self._interleaved(q.bias.detach() * scale), self._interleaved(k.bias.detach()), v.bias.detach()]
        self.qkv = PackedProduct(torch.cat(weights) * layer.input_layernorm.weight.detach(), torch.cat(biases))
        self.out = PackedProduct(weight(attention.o_proj))
        of_norm = layer.post_attention_layernorm.weight.detach()
        self.gate, self.up = (PackedProduct(weight(m) * of_norm) for m in (mlp.gate_proj, mlp.up_proj))
        self.down = PackedProduct(weight(mlp.down_proj))

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
