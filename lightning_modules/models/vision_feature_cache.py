"""A disk cache for the features of a frozen vision tower. An image is encoded once for several epochs and runs.

There is one safetensors file for each image and size, in one folder for each combination of vision weights and
processor settings. Several processes may share the folder: a file appears complete or not at all, and every process
would write the same content. If another process has evicted the file of an image, the image is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.files import atomic_path, file_sha256, fingerprint, storage_error

log = logging.getLogger(__name__)
GIB = 1 << 30
# largest number of patches in one pass through the vision tower; it limits the memory of activations
MAX_PATCHES = 1 << 15
SUFFIX = ".safetensors"
# A file of the cache, or the draft of one (`atomic_path`): only such files are removed, because the folder may be one
# that the user keeps other files in.
OWN_FILE = re.compile(r"\.?[0-9A-Za-z]+(-\d+x\d+x\d+)" + re.escape(SUFFIX) + r"(?P<draft>\.\d+-\d+\.tmp)?")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
ABANDONED_AFTER = 3600.0  # seconds; if an unfinished file is older than this, its process must have been killed
SCAN_EVERY = 0.02  # rescan the folder's size after writing this fraction of the limit (a scan of many files is slow)


def tower_fingerprint(tower: nn.Module, processor_path: str) -> str:
    """A hash of everything that features depend on besides the image and its size.

    Args:
        tower: the vision tower; its weights, their precision and its configuration are hashed, such as the size of a
            window, and the version of transformers.
        processor_path: folder of the processor, whose files are hashed; for a Hub name, the name is hashed.
    """
    digest = hashlib.sha256()
    for name, parameter in tower.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    files = [file for name in PROCESSOR_FILES if (file := Path(processor_path, name)).is_file()]
    own = digest.hexdigest(), tower.config.to_diff_dict()
    return fingerprint(*own, [file_sha256(file) for file in files] or processor_path)


class FeatureCache:
    """Features by image and grid.

    Args:
        folder: may be shared by several towers and processes.
        tower: `tower_fingerprint`.
        max_gib: limit for all features in `folder`, in GiB, greater than 0. The least recently used are evicted first.
            Other files in `folder` are neither counted nor removed.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, tower: str, max_gib: float) -> None:
        if max_gib <= 0:
            raise ValueError(f"feature cache: max_gib={max_gib} must be greater than 0")
        self.root, self.folder, self.limit = Path(folder), Path(folder, tower), int(max_gib * GIB)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        # Number of bytes that this process has written since its last scan. It starts at the limit, so that the first
        # `put` scans.
        self._unchecked = self.limit
        self._is_failing = False  # whether the last image could not be written

    def get(self, image_key: str, grid: Sequence[int], device: torch.device) -> Tensor | None:
        """Features [tokens, F] of an image, or None if they are not in the cache.

        Args:
            image_key: hash of the image's bytes.
            grid: frames, rows and columns of its patches.
            device: device of the returned features.
        """
        path = self._path(image_key, grid)
        try:
            features = load_file(path, device=str(device))["features"]
        except SafetensorError:  # damaged, for example by a full disk: encode the image again
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        except OSError:  # not in the cache, or it cannot be read now
            return None
        with contextlib.suppress(OSError):  # another user's file, or a folder that is read-only here
            os.utime(path)  # the time of last use, by which files are evicted
        return features

    def put(self, image_key: str, grid: Sequence[int], features: Tensor) -> None:
        """Keep the features [tokens, F] of an image. If they cannot be written, training goes on without them."""
        path = self._path(image_key, grid)
        try:
            with atomic_path(path, shared=True) as draft:
                save_file({"features": features.detach().contiguous()}, draft)
                self._unchecked += draft.stat().st_size
        except (OSError, SafetensorError) as error:
            if not self._is_failing:  # one warning, not one for each image
                log.warning("the feature cache keeps no further images: %s", storage_error(error, path))
            self._is_failing = True
            return
        self._is_failing = False
        if self._unchecked >= SCAN_EVERY * self.limit:
            self._evict()

    def _path(self, image_key: str, grid: Sequence[int]) -> Path:
        return self.folder / f"{image_key}-{'x'.join(map(str, grid))}{SUFFIX}"

    def _evict(self) -> None:
        """Remove features until they are below the limit. Files that cannot be removed are ignored, such as those that
        another process removes."""
        found: list[tuple[float, int, Path]] = []
        for path in self.root.glob("*/*"):
            own = OWN_FILE.fullmatch(path.name)
            with contextlib.suppress(OSError):
                status = path.stat()
                if own and (own["draft"] is None or time.time() - status.st_mtime > ABANDONED_AFTER):
                    found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                excess -= size
        self._unchecked = 0


def encode_each_once(
    items: Sequence[EncodedSample], encode: Callable[[Tensor, Tensor], Sequence[Tensor]], cache: FeatureCache | None
) -> list[Tensor]:
    """Features of each item's images, in order: [tokens, F] for each item.

    Args:
        items: an image that is in several items is encoded once.
        encode: computes the features of images from their patches and grids (`Architecture.image_features`).
        cache: features are looked up here first, and new features are stored here.
    """
    # 1. Collect each image once: {hash of its bytes: (patches, grid)}.
    images: dict[str, tuple[Tensor, Tensor]] = {}
    for item in items:
        patches = item.pixel_values.split(item.grid_thw.prod(-1).tolist())
        for key, *image in zip(item.image_keys, patches, item.grid_thw, strict=True):
            images.setdefault(key, tuple(image))
    # 2. Read the features that are in the cache.
    features: dict[str, Tensor] = {}
    for key, (patches, grid) in images.items() if cache is not None else ():
        if (known := cache.get(key, grid.tolist(), patches.device)) is not None:
            features[key] = known
    # 3. Encode the others, in chunks of limited memory.
    missing = {key: image for key, image in images.items() if key not in features}
    for keys in chunk_images(missing):
        patches, grids = zip(*(images[key] for key in keys), strict=True)
        features.update(zip(keys, encode(torch.cat(patches), torch.stack(grids)), strict=True))
    for key, (_, grid) in missing.items() if cache is not None else ():
        cache.put(key, grid.tolist(), features[key])
    return [torch.cat([features[key] for key in item.image_keys]) for item in items]


def chunk_images(images: dict[str, tuple[Tensor, Tensor]]) -> list[list[str]]:
    """Split images, {key: (patches, grid)}, into consecutive chunks of at most MAX_PATCHES patches or one image."""
    chunks: list[list[str]] = []
    room = 0
    for key, (patches, _) in images.items():
        if not chunks or len(patches) > room:
            chunks.append([])
            room = MAX_PATCHES
        chunks[-1].append(key)
        room -= len(patches)
    return chunks
