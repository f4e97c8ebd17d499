"""Two attention functions, registered with transformers under names of our own; nothing of transformers is patched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_modules.models.attention.kv_cache import BranchLayer
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.layers.fused_layers import HALF, is_recent_gpu

TEXT_ATTENTION = "shared_prefix_sdpa"
# The vision tower hands over whole sequences with their boundaries only to what is called flash; to anything else
# it makes one call for each window of each image in each layer.
VISION_ATTENTION = "padded_flash"


def register_attention() -> None:
    """Make both names known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(TEXT_ATTENTION, text_attention)
    AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
    AttentionInterface.register(VISION_ATTENTION, vision_attention)


def text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | BranchLayer,
    value: Tensor | BranchLayer,
    attention_mask: Tensor | SharedPrefixAttention | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """[B, heads, L, d] -> [B, L, heads, d]: by what stands in the place of the keys or the mask, otherwise SDPA.

    Transformers hands on untouched what a cache returns as keys, and what is given as a ready mask.
    """
    if isinstance(key, BranchLayer):
        return key.attend(query, module.scaling), None
    if isinstance(attention_mask, SharedPrefixAttention):
        return attention_mask(query, key, value, module.scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Full attention inside each of n segments of one sequence, [1, heads, S, d] -> [1, S, heads, d].

    `cu_seq_lens_q` [n + 1] holds the boundaries of segments (windows, or whole images), `max_length_q` the longest. On
    a GPU in half precision one kernel takes them as they are. Elsewhere they are padded to the longest and run as one
    batch; padding is masked as a key and thrown away as a query.
    """
    num_segments, longest = len(cu_seq_lens_q) - 1, int(max_length_q)
    fits = query.dtype in HALF and query.shape[-1] % 8 == 0
    if fits and dropout == 0 and is_recent_gpu(query.device):
        ends = cu_seq_lens_q.int()
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling)[None], None
    if num_segments * longest == query.shape[2]:
        q, k, v = (t[0].unflatten(1, (num_segments, longest)).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2).flatten(0, 1)[None], None

    batch = torch.cat([query, key, value]).transpose(1, 2)  # [3, S, heads, d]
    starts, ends = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    places = starts + torch.arange(longest, device=batch.device)  # [n, longest]
    real = places < ends
    q, k, v = batch[:, places.clamp(max=batch.shape[1] - 1)].transpose(2, 3)  # each [n, heads, longest, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None], scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2)[real][None], None
