"""How much memory the key-value cache of sampling takes, checked before the first step of a run."""

from __future__ import annotations

import torch

from datamodules.persistence.user_error import SettingsError
from lightning_modules.models.architectures.base import CacheSizes
from lightning_modules.models.attention.kv_cache import CacheShape

GIB = 2**30


def cache_bytes(shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype) -> int:
    """Bytes of a key-value cache of this shape: keys and values of each prompt once, and of each completion."""
    tokens = shape.prompts * (shape.prefix_tokens + shape.completions * shape.completion_tokens)
    return 2 * sizes.layers * sizes.heads * sizes.width * dtype.itemsize * tokens


def check_cache(shape: CacheShape, sizes: CacheSizes, dtype: torch.dtype, limit_gib: float | None) -> None:
    """Refuse a cache that may become larger than `limit_gib`; None: no limit.

    Args:
        shape: the longest prompts and completions that the settings allow, in all batch slots.
        sizes: of the model.
        dtype: of the cache.
        limit_gib: `rollout.kv_cache_gib`.

    Raises:
        SettingsError: names the limit, the need, and the settings that lower it.
    """
    need = cache_bytes(shape, sizes, dtype)
    if limit_gib is None or need <= limit_gib * GIB:
        return
    fitting = int(limit_gib * GIB * shape.prompts / need)
    fix = f"set rollout.prompts_per_batch={fitting}" if fitting else "not even one prompt fits: raise it"
    raise SettingsError(
        f"rollout.kv_cache_gib={limit_gib:g} is less than the {need / GIB:.2f} GiB that sampling may need: "
        f"{shape.prompts} prompts of {shape.prefix_tokens} tokens (data.max_prompt_tokens), each with "
        f"{shape.completions} completions of {shape.completion_tokens} (rollout.max_new_tokens); {fix}"
    )
