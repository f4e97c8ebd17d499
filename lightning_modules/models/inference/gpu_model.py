"""The decoder without gradients on a GPU: the same result with few kernel launches.

The time of a decoding step with few rows depends mainly on reading the weights, and then on the number of kernels.
transformers launches about sixty kernels per layer; this model launches about twelve (`triton_attention`,
`triton_norm_mlp`). Query, key and value are one matrix product, gate and up another one, and both residuals are added
by a matrix product (addmm).

Shapes: B rows, T tokens of each, N = B * T; H key-value heads, R query heads per key-value head, W width of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_modules.models.architectures.base import LayerParts
from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.attention.kv_cache import PrefixKVCache, PrefixRecorder
from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.layers.fused_layers import HALF, has_kernels, silu_gated
from lightning_modules.models.layers.lora import refresh_merged


class GpuSamplingModel(SamplingModel):
    """A `SamplingModel` from the modules of a decoder whose LoRA layers are merged (`QwenVL.decoder`)."""

    @staticmethod
    def can_read(model: nn.Module) -> bool:
        """Whether this class supports `model` with its device and precision."""
        fits = model.dtype in HALF and has_kernels(model.device)
        return fits and architecture_of(model).decoder_parts(model) is not None

    def __init__(self, module: nn.Module, shared: Collection[int] = ()) -> None:
        """Concatenate the weights of `module` that have the same input.

        Args:
            module: a decoder. Its own weights are concatenated in place: its linear layers become views of the joined
                tensors.
            shared: addresses of weights that also belong to the policy; they are not moved. Shared query, key and value
                weights are copied, and `refresh` copies them again. Shared gate and up weights stay two separate
                products.
        """
        super().__init__(module)
        parts = self.architecture.decoder_parts(module)
        self.module, self.lm_head = module, module.get_output_embeddings()
        self.rotary, self.norm = parts.rotary, parts.norm
        self.layers = [_Layer(layer, shared) for layer in parts.layers]

    def refresh(self, source: nn.Module) -> None:
        refresh_merged(self.module, source)
        for layer in self.layers:
            layer.refresh()

    def hidden_states(
        self, context: PrefixKVCache | PrefixRecorder, position_ids: Tensor, inputs_embeds: Tensor
    ) -> Tensor:
        shape, rotary_factors = inputs_embeds.shape, self.rotary(inputs_embeds, position_ids)
        x = inputs_embeds.flatten(0, 1).clone()  # the layers change it in place
        for layer in self.layers:
            layer(x, rotary_factors, context)
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

    def __call__(
        self, x: Tensor, rotary_factors: tuple[Tensor, Tensor], context: PrefixKVCache | PrefixRecorder
    ) -> None:
        """Add attention and MLP to `x` [N, D], in place. `rotary_factors`: cosines and sines, each [B, T, W]."""
        parts = self.parts
        qkv = F.linear(parts.attention_norm(x), self.weight, self.bias)
        attend = self._attend_completions if isinstance(context, PrefixKVCache) else self._attend_prompts
        x.addmm_(attend(qkv, rotary_factors, context).flatten(1), parts.output.weight.t())
        normed = parts.mlp_norm(x)
        if self.gate_up is None:
            gate, up = parts.gate(normed), parts.up(normed)
        else:
            gate, up = F.linear(normed, self.gate_up).chunk(2, dim=1)
        x.addmm_(silu_gated(gate, up), parts.down.weight.t())

    def _attend_completions(self, qkv: Tensor, rotary_factors: tuple[Tensor, Tensor], cache: PrefixKVCache) -> Tensor:
        """A decoding step: one token of every row of the cache -> [N, H * R, W]."""
        # Imported here because it needs Triton, which a CPU build of PyTorch lacks.
        from lightning_modules.models.inference.triton_attention import attend, rotate_and_write

        cos, sin = (factor.flatten(0, 1) for factor in rotary_factors)
        layer = cache.layers[self.parts.index]
        query = rotate_and_write(qkv, cos, sin, cache.token_index, layer.keys, layer.values)
        return attend(
            query,
            (layer.prefix_keys, layer.prefix_values),
            (layer.keys, layer.values),
            (cache.prefix_lengths, cache.num_seen),
            (cache.prefix_width, cache.completion_width),
            self.parts.scaling,
        )

    def _attend_prompts(self, qkv: Tensor, rotary_factors: tuple[Tensor, Tensor], recorder: PrefixRecorder) -> Tensor:
        """The prefill with one prompt per row and causal attention -> [N, H * R, W]."""
        cos, sin = (factor[:, :, None] for factor in rotary_factors)
        heads = qkv.view(*cos.shape[:2], -1, self.width)
        rotated, value = heads[:, :, : -self.num_keys], heads[:, :, -self.num_keys :]
        low, high = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat([-high, low], dim=-1) * sin
        query, key = rotated[:, :, : -self.num_keys], rotated[:, :, -self.num_keys :]
        query, key, value = (rearrange(t, "b t h w -> b h t w") for t in (query, key, value))
        key, value = recorder.update(key, value, self.parts.index)
        scale = self.parts.scaling
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return rearrange(out, "b h t w -> (b t) h w")


def _joined_weight(linears: Sequence[nn.Module], shared: Collection[int]) -> Tensor | None:
    """One tensor with the weights of all `linears`, which become views of it.

    Returns None without changes if one is shared.
    """
    if any(linear.weight.data_ptr() in shared for linear in linears):
        return None
    joined = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, joined.split([linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return joined
