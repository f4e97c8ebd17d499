"""Two attention functions, registered with transformers under this project's names, without any patching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_modules.models.attention.kv_cache import CompletionMemory
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.layers.fused_layers import HALF, is_recent_gpu

TEXT_ATTENTION = "shared_prefix_sdpa"
# The vision tower passes a whole sequence with its boundaries only to attention functions with "flash" in their name.
# It calls other functions once for each window of each image in each layer.
VISION_ATTENTION = "padded_flash"


def register_attention() -> None:
    """Register both names with transformers. Calling it again changes nothing."""
    AttentionInterface.register(TEXT_ATTENTION, text_attention)
    AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
    AttentionInterface.register(VISION_ATTENTION, vision_attention)


def text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CompletionMemory,
    value: Tensor | CompletionMemory,
    attention_mask: Tensor | SharedPrefixAttention | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of the decoder: [B, heads, L, d] -> [B, L, heads, d].

    transformers passes the keys from a cache and a prepared mask unchanged to this function. If `key` is the cache of a
    decoding step, it computes the attention. If the mask is the attention of a packed row, that computes it. Otherwise
    transformers' SDPA computes it.
    """
    if isinstance(key, CompletionMemory):
        return key.attend(query, module.scaling), None
    if isinstance(attention_mask, SharedPrefixAttention):
        return attention_mask(query, key, value, module.scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of a vision tower: full attention inside each of n segments of one sequence.

    On a GPU in half precision, one kernel processes the segments without padding. Otherwise they are padded to the
    longest segment and computed as one batch. Padding is masked in the keys and removed from the queries.

    Args:
        module: not used.
        query: [1, heads, S, d].
        key: [1, heads, S, d].
        value: [1, heads, S, d].
        cu_seq_lens_q: boundaries of the segments (windows, or whole images), [n + 1].
        max_length_q: length of the longest segment.
        scaling: factor of the scores.
        dropout: dropout of the attention weights.

    Returns:
        [1, S, heads, d], and None instead of the attention weights.
    """
    num_segments, longest = len(cu_seq_lens_q) - 1, int(max_length_q)
    fits = query.dtype in HALF and query.shape[-1] % 8 == 0
    if fits and dropout == 0 and is_recent_gpu(query.device):
        ends = cu_seq_lens_q.int()
        q, k, v = (rearrange(t, "1 h s d -> s h d") for t in (query, key, value))
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling)[None], None
    if num_segments * longest == query.shape[2]:  # all segments have one length: views, no copy
        q, k, v = (rearrange(t, "1 h (n s) d -> n h s d", n=num_segments) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        return rearrange(out, "n h s d -> 1 (n s) h d"), None
    tokens = rearrange(torch.cat([query, key, value]), "qkv h s d -> qkv s h d")
    starts, ends = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    index = starts + torch.arange(longest, device=tokens.device)  # [n, longest], index of a token in the sequence
    is_token = index < ends  # False for padding
    padded = tokens[:, index.clamp(max=tokens.shape[1] - 1)]
    q, k, v = rearrange(padded, "qkv n s h d -> qkv n h s d")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token[:, None, None], scale=scaling, dropout_p=dropout)
    return rearrange(out, "n h s d -> n s h d")[is_token][None], None
