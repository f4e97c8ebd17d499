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

from lightning_modules.models.architectures.base import LayerParts
from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import BranchCache, PrefixRecorder
from lightning_modules.models.layers.fused_layers import HALF, has_kernels, silu_gated
from lightning_modules.models.layers.lora import refresh_merged


class GpuSamplingModel:
    """Reads a decoder (`QwenVL.decoder`) whose LoRA layers are merged.

    Weights that are the decoder's own are joined in place: it then reads parts of the joined ones. Those `shared` with
    the policy (addresses) stay where they are; only query, key and value are copied, and `refresh` copies them again.
    """

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        fits = model.dtype in HALF and has_kernels(model.device)
        return fits and architecture_of(model).decoder_parts(model) is not None

    def __init__(self, module: nn.Module, shared: Collection[int] = ()) -> None:
        architecture = architecture_of(module)
        parts = architecture.decoder_parts(module)
        self.module, self.dtype, self.device = module, module.dtype, module.device
        self.cache_sizes = architecture.cache_sizes(module)
        self.embeddings, self.rotary, self.norm = module.get_input_embeddings(), parts.rotary, parts.norm
        self.lm_head = module.get_output_embeddings()
        self.layers = [_Layer(layer, shared) for layer in parts.layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def refresh(self, source: nn.Module) -> None:
        refresh_merged(self.module, source)
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
    def __init__(self, layer: LayerParts, shared: Collection[int]) -> None:
        self.parts = layer
        self.num_keys, self.width = layer.num_key_heads, layer.head_width
        self.qkv = [layer.query, layer.key, layer.value]
        self.weight, self.bias = _joined_weight(self.qkv, shared), torch.cat([m.bias.detach() for m in self.qkv])
        self.is_copy = self.weight is None
        if self.is_copy:
            self.weight = torch.cat([m.weight.detach() for m in self.qkv])
        self.gate_up = _joined_weight([layer.gate, layer.up], shared)

    def refresh(self) -> None:
        if self.is_copy:
            torch.cat([m.weight.detach() for m in self.qkv], out=self.weight)
            torch.cat([m.bias.detach() for m in self.qkv], out=self.bias)

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], context: BranchCache | PrefixRecorder) -> None:
        """Add the layer's two parts to `x` [N, D]. `turns`: cosines and sines [B, T, W]."""
        parts = self.parts
        qkv = F.linear(parts.attention_norm(x), self.weight, self.bias)
        attend = self._attend_branches if isinstance(context, BranchCache) else self._attend_prompts
        x.addmm_(attend(qkv, turns, context).flatten(1), parts.output.weight.t())
        normed = parts.mlp_norm(x)
        if self.gate_up is None:
            gate, up = parts.gate(normed), parts.up(normed)
        else:
            gate, up = F.linear(normed, self.gate_up).chunk(2, dim=1)
        x.addmm_(silu_gated(gate, up), parts.down.weight.t())

    def _attend_branches(self, qkv: Tensor, turns: tuple[Tensor, Tensor], cache: BranchCache) -> Tensor:
        # Needs Triton, which a CPU's PyTorch does not bring.
        from lightning_modules.models.inference.triton_attention import attend, rotate_and_write

        cos, sin = (turn.flatten(0, 1) for turn in turns)
        layer = cache.layers[self.parts.index]
        query = rotate_and_write(qkv, cos, sin, cache.places, layer.keys, layer.values)
        return attend(
            query,
            (layer.prefix_keys, layer.prefix_values),
            (layer.keys, layer.values),
            (cache.prefix_lengths, cache.seen),
            (cache.prefix_width, cache.branch_width),
            self.parts.scaling,
        )

    def _attend_prompts(self, qkv: Tensor, turns: tuple[Tensor, Tensor], recorder: PrefixRecorder) -> Tensor:
        cos, sin = (turn[:, :, None] for turn in turns)
        heads = qkv.view(*cos.shape[:2], -1, self.width)
        turned, value = heads[:, :, : -self.num_keys], heads[:, :, -self.num_keys :]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-high, low], dim=-1) * sin
        query, key = turned[:, :, : -self.num_keys], turned[:, :, -self.num_keys :]
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        key, value = recorder.update(key, value, self.parts.index)
        scale = self.parts.scaling
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
