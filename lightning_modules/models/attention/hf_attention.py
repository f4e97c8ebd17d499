"""Two attention functions, registered with transformers under this project's names; nothing in it is patched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_modules.models.attention.kv_cache import PrefixKVLayer
from lightning_modules.models.attention.prefix_attention import SharedPrefixAttention
from lightning_modules.models.layers.fused_layers import HALF, is_recent_gpu

TEXT_ATTENTION = "shared_prefix_sdpa"
# Only to an attention function with "flash" in its name does a vision tower give a whole sequence with its boundaries.
# Any other is called once for each window of each image in each layer.
VISION_ATTENTION = "padded_flash"


def register_attention() -> None:
    """Make both names known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(TEXT_ATTENTION, text_attention)
    AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
    AttentionInterface.register(VISION_ATTENTION, vision_attention)


def text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PrefixKVLayer,
    value: Tensor | PrefixKVLayer,
    attention_mask: Tensor | SharedPrefixAttention | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of the decoder: [B, heads, L, d] -> [B, L, heads, d].

    transformers passes on unchanged what a cache returns as keys, and what it is given as a ready mask. A decoding
    step's cache (in the place of the keys) or a packed row's attention (in the place of the mask) computes; otherwise
    transformers' own SDPA does.
    """
    if isinstance(key, PrefixKVLayer):
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

    On a GPU in half precision one kernel takes the segments as they are. Elsewhere they are padded to the longest and
    run as one batch; padding is masked as keys and dropped as queries.

    Args:
        module: not used.
        query: [1, heads, S, d], as `key` and `value`.
        key: see `query`.
        value: see `query`.
        cu_seq_lens_q: boundaries of the segments (windows, or whole images), [n + 1].
        max_length_q: length of the longest segment.
        scaling: of the scores.
        dropout: of the weights.

    Returns:
        [1, S, heads, d], and None in the place of the weights.
    """
    longest = int(max_length_q)
    fits = query.dtype in HALF and query.shape[-1] % 8 == 0
    if fits and dropout == 0 and is_recent_gpu(query.device):
        ends = cu_seq_lens_q.int()
        q, k, v = (rearrange(t, "1 h s d -> s h d") for t in (query, key, value))
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling)[None], None
    tokens = rearrange(torch.cat([query, key, value]), "qkv h s d -> qkv s h d")
    starts, ends = cu_seq_lens_q[:-1, None].long(), cu_seq_lens_q[1:, None].long()
    index = starts + torch.arange(longest, device=tokens.device)  # [n, longest], of a token in the sequence
    is_token = index < ends  # else padding
    padded = tokens[:, index.clamp(max=tokens.shape[1] - 1)]
    q, k, v = rearrange(padded, "qkv n s h d -> qkv n h s d")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token[:, None, None], scale=scaling, dropout_p=dropout)
    return rearrange(out, "n h s d -> n s h d")[is_token][None], None
