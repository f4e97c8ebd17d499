"""Rebuild images from pixel patches: exactly the pixels that the policy sees, for a server that reads image files.

The processor resizes an image to 8-bit pixels before it scales them, so nothing is lost: the rebuilt image gives the
same patches again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def images_from_patches(pixel_values: Tensor, grid_thw: Tensor, processor: Any) -> list[Image.Image]:
    """The resized RGB images of a sample.

    Args:
        pixel_values: float [N, patch_dim], the patches of all images.
        grid_thw: long [n, 3], frames, rows and columns of patches of each image.
        processor: the Qwen2-VL image processor that made the patches.

    Raises:
        ValueError: the values are not 8-bit pixels, scaled with the mean and standard deviation of the processor.
    """
    patches = pixel_values.float().cpu().split(grid_thw.prod(-1).tolist())
    grids = grid_thw.tolist()
    return [_image(values, grid, processor) for values, grid in zip(patches, grids, strict=True)]


def _image(patches: Tensor, grid: Sequence[int], processor: Any) -> Image.Image:
    frames, rows, _ = grid
    if frames != 1:
        raise ValueError(f"grid {grid} has {frames} frames: that is a video, not an image")
    merge, size = processor.merge_size, processor.patch_size
    # A patch spans several frames (t); the processor repeats an image to fill it, so the first frame is enough. The
    # patches that are merged into one token (m x n) stand next to each other.
    scaled = rearrange(
        patches,
        "(y x m n) (c t p q) -> t c (y m p) (x n q)",
        y=rows // merge,
        m=merge,
        n=merge,
        t=processor.temporal_patch_size,
        p=size,
        q=size,
    )[0]
    # Undo the scaling, and check that it really gives whole numbers.
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (scaled * std + mean) / processor.rescale_factor
    whole = pixels.round()
    if (pixels - whole).abs().max() > 0.01 or whole.min() < 0 or whole.max() > 255:
        raise ValueError(f"patches of grid {grid} are not 8-bit pixels with mean {processor.image_mean}")
    return Image.fromarray(rearrange(whole.to(torch.uint8), "c h w -> h w c").numpy())
