"""Features of a frozen vision tower on disk, so that an image of several epochs or runs is encoded once.

One safetensors file for each image and size, in a folder for each combination of vision weights and processor settings.
Several processes may share the folder: a file appears whole or not at all, whoever writes it writes the same, and one
that another process has evicted is simply encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.persistence.files import atomic_path, file_sha256, fingerprint

GIB = 1 << 30
MAX_PATCHES = 1 << 15  # of one pass through the vision tower; bounds its activations
SUFFIX = ".safetensors"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
STALE = 3600.0  # seconds after which a draft's writer must have been killed
CHECK_SHARE = 0.02  # of the limit: so much is written between two looks at what the folder holds


def tower_fingerprint(tower: nn.Module, processor_path: str) -> str:
    """Of all that features depend on beside the image and its size: weights, their precision, and the processor.

    A processor that is not a folder (a Hub name) counts by its name.
    """
    digest = hashlib.sha256()
    for name, parameter in tower.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    files = [file for name in PROCESSOR_FILES if (file := Path(processor_path, name)).is_file()]
    return fingerprint(digest.hexdigest(), [file_sha256(file) for file in files] or processor_path)


class FeatureCache:
    """`max_gib` bounds all of `folder`, other towers' features too: what was used least lately goes first."""

    def __init__(self, folder: str | Path, tower: str, max_gib: float) -> None:
        if max_gib <= 0:
            raise ValueError(f"feature cache: max_gib={max_gib} must be greater than 0")
        self.root, self.folder, self.limit = Path(folder), Path(folder, tower), int(max_gib * GIB)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unchecked = self.limit  # bytes that may have come since the last look, by this process

    def get(self, image_key: str, grid: Sequence[int], device: torch.device) -> Tensor | None:
        """Features [tokens, D] of the image with this hash at `grid` (frames, rows, columns of patches), if there."""
        path = self._path(image_key, grid)
        try:
            features = load_file(path, device=str(device))["features"]
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except SafetensorError:  # damaged, by a full disk for one: as if it were not there
            path.unlink(missing_ok=True)
            return None
        return features

    def put(self, image_key: str, grid: Sequence[int], features: Tensor) -> None:
        path = self._path(image_key, grid)
        with atomic_path(path, shared=True) as draft:
            save_file({"features": features.detach().contiguous()}, draft)
            self._unchecked += draft.stat().st_size
        if self._unchecked >= CHECK_SHARE * self.limit:
            self._evict()

    def _path(self, image_key: str, grid: Sequence[int]) -> Path:
        return self.folder / f"{image_key}-{'x'.join(map(str, grid))}{SUFFIX}"

    def _evict(self) -> None:
        """Bring the folder under its limit. Files that another process removes meanwhile count as gone."""
        found: list[tuple[float, int, Path]] = []
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == SUFFIX or time.time() - status.st_mtime > STALE:
                    found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        self._unchecked = 0


def chunk_images(images: dict[str, tuple[Tensor, Tensor]]) -> Iterator[list[str]]:
    """Keys of consecutive images that together have at most MAX_PATCHES patches (one image at least)."""
    keys: list[str] = []
    total = 0
    for key, (patches, _) in images.items():
        if keys and total + len(patches) > MAX_PATCHES:
            yield keys
            keys, total = [], 0
        keys.append(key)
        total += len(patches)
    if keys:
        yield keys
