"""The language model of the policy for decoding on a CPU: the same sums with far fewer operations.

On narrow models a token step is bound by the number of operations and not by their size. So LoRA is folded into the
weights; query, key and value are one product, gate and up another, with weights laid out once for oneDNN; rotation is
one product of complex numbers, for which the two halves of a head are interleaved. Queries and keys are permuted alike,
which their products do not see; keys in the cache are in that order, so prompts must be read by the same model.

Shapes: B rows, T tokens of each, D width of the model, H heads, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.adapters import folded_weight
from lightning_modules.branch_cache import BranchLayer
from lightning_modules.products import multiply, packed

ROWS = 16  # products have a multiple of it: oneDNN makes code for each number of rows, for the time of ten products


class LeanModel:
    """Reads the weights of a Qwen2.5-VL, with or without LoRA, as they are now."""

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        return model.device.type == "cpu" and model.dtype == torch.float32

    def __init__(self, model: nn.Module) -> None:
        text = model.model.language_model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.embeddings, self.rotary, self.norm = model.get_input_embeddings(), text.rotary_emb, _Norm(text.norm)
        self.layers = [_Layer(layer) for layer in text.layers]
        self.lm_head = _Product(model.lm_head.weight)
        self._turns = torch.empty(0)  # by position [n, W / 2], of text

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def hidden_states(
        self, cache: Any, position_ids: Tensor, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [B, T, D]. `position_ids` [3, B, T]; with one token a row, a text's: all three are equal.

        Rows of several tokens are prompts: each token sees those before it.
        """
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens, _ = x.shape
        turns = self._text_turns(position_ids[0]) if tokens == 1 else self._rotations(x, position_ids)
        x = _padded(x.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, turns[:, :, None], cache)
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


class _Product:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = packed(weight.detach()), bias

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)


class _Norm:
    def __init__(self, norm: nn.Module) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer:
    """One decoder layer; `x` [N, D] has padded rows at its end."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.num_keys = attention.num_key_value_heads
        turned = [attention.q_proj, attention.k_proj]
        weights = [*(self._interleaved(folded_weight(m)) for m in turned), folded_weight(attention.v_proj)]
        biases = [*(self._interleaved(m.bias.detach()) for m in turned), attention.v_proj.bias.detach()]
        self.qkv = _Product(torch.cat(weights), torch.cat(biases))
        self.out = _Product(folded_weight(attention.o_proj))
        self.gate_up = _Product(torch.cat([folded_weight(mlp.gate_proj), folded_weight(mlp.up_proj)]))
        self.down = _Product(folded_weight(mlp.down_proj))
        self.before_attention, self.before_mlp = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.activation = mlp.act_fn

    def _interleaved(self, by_output: Tensor) -> Tensor:
        """The halves of each head, [a1, a2, ..., b1, b2, ...], as pairs: [a1, b1, a2, b2, ...]."""
        return by_output.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)

    def __call__(self, x: Tensor, turns: Tensor, cache: Any) -> Tensor:
        x = x + self.out(_padded(self._attend(self.qkv(self.before_attention(x)), turns, cache)))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)

    def _attend(self, qkv: Tensor, turns: Tensor, cache: Any) -> Tensor:
        """Of N padded rows the first B * T; `turns` [B, T, 1, W / 2]. Returns [B * T, H * W]."""
        rows, tokens = turns.shape[:2]
        heads = qkv[: rows * tokens].view(rows, tokens, -1, self.width)
        pairs = torch.view_as_complex(heads[:, :, : -self.num_keys].unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        query, key = turned[:, :, : -self.num_keys].transpose(1, 2), turned[:, :, -self.num_keys :].transpose(1, 2)
        key, value = cache.update(key, heads[:, :, -self.num_keys :].transpose(1, 2), self.index)
        if isinstance(key, BranchLayer):
            out = key.attend(query, self.scaling)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True
            ).transpose(1, 2)
        return out.reshape(rows * tokens, -1)


def _padded(x: Tensor) -> Tensor:
    """[N, D] with rows of zeros after it, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x
