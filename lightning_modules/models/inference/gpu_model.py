"""The language model of a decoder on a GPU: the same sums in few launches.

A step of a few rows is bound by reading the weights, and then by the number of its kernels: transformers makes about
sixty of each layer, here it is a dozen (`triton_attention`, `triton_norm_mlp`). Query, key and value are one
product, gate and up another; both residual sums are the accumulation of a product.

Shapes: B rows, T tokens of each, N = B * T; H key-value heads, R query heads for each of them, W width of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.attention.kv_cache import BranchCache, PrefixRecorder
from lightning_modules.models.layers.fused_layers import HALF, has_kernels


class FusedModel:
    """Reads a decoder (`QwenVL.decoder`) whose adapter is folded in.

    Weights that are the decoder's own are joined in place: it then reads parts of the joined ones. Those `shared` with
    the policy (addresses) stay where they are; only query, key and value are copied, and `refresh` copies them again.
    """

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        fits = model.dtype in HALF and model.config.text_config.hidden_act == "silu"
        return fits and has_kernels(model.device)

    def __init__(self, module: nn.Module, shared: Collection[int] = ()) -> None:
        text = module.model.language_model
        self.module, self.config, self.dtype, self.device = module, module.config, module.dtype, module.device
        self.embeddings, self.rotary, self.norm = module.get_input_embeddings(), text.rotary_emb, text.norm
        self.lm_head = module.lm_head
        self.layers = [_Layer(layer, shared) for layer in text.layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def refresh(self) -> None:
        """After the weights of the decoder have changed. No tensor moves: what is captured stays valid."""
        for layer in self.layers:
            layer.refresh()

    def hidden_states(
        self,
        context: BranchCache | PrefixRecorder,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [B, T, D]. `position_ids` [3, B, T].

        With a `BranchCache` one token of every row; else prompts, where each token sees those before it.
        """
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        shape, turns = x.shape, self.rotary(x, position_ids)
        x = x.flatten(0, 1).clone()  # changed in place
        for layer in self.layers:
            layer(x, turns, context)
        return self.norm(x).view(shape)


class _Layer:
    def __init__(self, layer: nn.Module, shared: Collection[int]) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.index, self.width = self.attention.layer_idx, self.attention.head_dim
        self.num_keys = self.attention.num_key_value_heads
        self.qkv = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        self.weight, self.bias = _joined_weight(self.qkv, shared), torch.cat([m.bias.detach() for m in self.qkv])
        self.is_copy = self.weight is None
        if self.is_copy:
            self.weight = torch.cat([m.weight.detach() for m in self.qkv])
        self.gate_up = _joined_weight([self.mlp.gate_proj, self.mlp.up_proj], shared)

    def refresh(self) -> None:
        if self.is_copy:
            torch.cat([m.weight.detach() for m in self.qkv], out=self.weight)
            torch.cat([m.bias.detach() for m in self.qkv], out=self.bias)

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], context: BranchCache | PrefixRecorder) -> None:
        """Add the layer's two parts to `x` [N, D]. `turns`: cosines and sines [B, T, W]."""
        qkv = F.linear(self.before_attention(x), self.weight, self.bias)
        attend = self._attend_branches if isinstance(context, BranchCache) else self._attend_prompts
        x.addmm_(attend(qkv, turns, context).flatten(1), self.attention.o_proj.weight.t())
        normed = self.before_mlp(x)
        if self.gate_up is None:
            gate, up = self.mlp.gate_proj(normed), self.mlp.up_proj(normed)
        else:
            gate, up = F.linear(normed, self.gate_up).chunk(2, dim=1)
        x.addmm_(self.mlp.activate(gate, up), self.mlp.down_proj.weight.t())

    def _attend_branches(self, qkv: Tensor, turns: tuple[Tensor, Tensor], cache: BranchCache) -> Tensor:
        # Needs Triton, which a CPU's PyTorch does not bring.
        from lightning_modules.models.inference.triton_attention import attend, rotate_and_write

        cos, sin = (turn.flatten(0, 1) for turn in turns)
        layer = cache.layers[self.index]
        query = rotate_and_write(qkv, cos, sin, cache.places, layer.keys, layer.values)
        return attend(
            query,
            (layer.prefix_keys, layer.prefix_values),
            (layer.keys, layer.values),
            (cache.prefix_lengths, cache.seen),
            (cache.prefix_width, cache.branch_width),
            self.attention.scaling,
        )

    def _attend_prompts(self, qkv: Tensor, turns: tuple[Tensor, Tensor], recorder: PrefixRecorder) -> Tensor:
        cos, sin = (turn[:, :, None] for turn in turns)
        heads = qkv.view(*cos.shape[:2], -1, self.width)
        turned, value = heads[:, :, : -self.num_keys], heads[:, :, -self.num_keys :]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-high, low], dim=-1) * sin
        query, key = turned[:, :, : -self.num_keys], turned[:, :, -self.num_keys :]
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        key, value = recorder.update(key, value, self.index)
        scale = self.attention.scaling
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def _joined_weight(linears: Sequence[nn.Module], shared: Collection[int]) -> Tensor | None:
    """Their weights as one, of which each then reads its part; None, and nothing done, if one of them is shared."""
    if any(linear.weight.data_ptr() in shared for linear in linears):
        return None
    joined = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, joined.split([linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return joined
