"""Seeds that say what they are of, and nothing of where or in which order it is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def derive_seed(*parts: int | str) -> int:
    """A seed in 0 ... 2^63 - 1 that depends on every part; equal on every machine and Python version."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seeds(seed: int, window: int, earlier: Sequence[str], sample_ids: Sequence[str]) -> list[int]:
    """A seed for each sample of a batch: of the run's seed, the window's number, the sample's id, and how often that
    was in the window before (`earlier` are the ids of its batches so far). Neither rank nor place in the batch: how a
    window is divided among ranks and batches changes no rollout, unless a sample is in it twice: each rank counts its
    own."""
    seen = list(earlier)
    seeds = []
    for sample_id in sample_ids:
        seeds.append(derive_seed(seed, window, seen.count(sample_id), sample_id))
        seen.append(sample_id)
    return seeds
