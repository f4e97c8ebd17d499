"""Seeds that depend only on the computed item, not on the process or the order of computation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def derive_seed(*parts: int | str) -> int:
    """A seed from 0 to 2^63 - 1 that depends on every part. It is the same on every machine and Python version."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # without the top bit, so that it fits a signed 64-bit integer


def sample_seeds(seed: int, window: int, earlier: Sequence[str], sample_ids: Sequence[str]) -> list[int]:
    """One seed for each sample of a batch.

    The seed does not depend on the rank or on the position in the batch, so rollouts are the same for any number of
    GPUs. Exception: if one id occurs on two ranks in the same window, both ranks count from zero and draw the same
    seed.

    Args:
        seed: the run's seed.
        window: number of the accumulation window.
        earlier: ids of the samples in the earlier batches of this window on this rank.
        sample_ids: ids of the samples of this batch.
    """
    seen = list(earlier)
    seeds = []
    for sample_id in sample_ids:
        # The count of earlier occurrences gives a repeated sample another seed each time.
        seeds.append(derive_seed(seed, window, seen.count(sample_id), sample_id))
        seen.append(sample_id)
    return seeds
