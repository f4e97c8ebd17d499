"""The memory of the key-value cache: as large as the cache that is made, and refused before the first step."""

from __future__ import annotations

import pytest
import torch

from datamodules.persistence.user_error import UserError
from lightning_modules.models.architectures.base import CacheSizes
from lightning_modules.models.attention.kv_cache import CacheShape, PrefixKVCache
from lightning_modules.models.attention.ragged_kv_cache import RaggedKVCache
from lightning_modules.rollouts.native.cache_room import GIB, cache_bytes, check_cache

SIZES = CacheSizes(layers=3, heads=2, width=16)
SHAPE = CacheShape(prompts=8, completions=4, prefix_tokens=50, completion_tokens=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_cache(dtype: torch.dtype) -> None:
    cache = PrefixKVCache(SHAPE, SIZES, dtype, torch.device("cpu"))
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer.prefix_keys, layer.prefix_values, layer.keys, layer.values)
    ]
    assert cache_bytes(SHAPE, SIZES, dtype) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_cache_of_ragged_completions(dtype: torch.dtype) -> None:
    cache = RaggedKVCache(SHAPE, SIZES, dtype, torch.device("cpu"))
    assert cache.own.untyped_storage().data_ptr() == cache.prefix.untyped_storage().data_ptr()
    assert cache_bytes(SHAPE, SIZES, dtype) == cache.own.untyped_storage().nbytes()


def test_a_cache_above_its_limit_is_refused_with_the_number_of_prompts_that_fits() -> None:
    need = cache_bytes(SHAPE, SIZES, torch.float32) / GIB
    check_cache(SHAPE, SIZES, torch.float32, None)
    check_cache(SHAPE, SIZES, torch.float32, need)
    with pytest.raises(UserError, match=r"rollout\.kv_cache_gib=.* set rollout\.prompts_per_batch=3$"):
        check_cache(SHAPE, SIZES, torch.float32, need * 3.5 / 8)
    with pytest.raises(UserError, match="not even one prompt fits: raise it"):
        check_cache(SHAPE, SIZES, torch.float32, need / 9)
