"""Back from pixel patches to images: the very pixels that the policy is given, for a server that reads image files.

An image is resized to 8-bit pixels and then scaled, so nothing is lost: read again, it gives the same patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def images_from_patches(pixel_values: Tensor, grid_thw: Tensor, processor: Any) -> list[Image.Image]:
    """RGB images, as resized by `processor` (a Qwen2-VL image processor), from patches float [N, patch_dim] of all of
    them and their grids long [n, 3].

    Raises ValueError for values that are no 8-bit pixels under the processor's mean and standard deviation.
    """
    patches = pixel_values.float().cpu().split(grid_thw.prod(-1).tolist())
    grids = grid_thw.tolist()
    return [_image(values, grid, processor) for values, grid in zip(patches, grids, strict=True)]


def _image(patches: Tensor, grid: Sequence[int], processor: Any) -> Image.Image:
    frames, rows, _ = grid
    if frames != 1:
        raise ValueError(f"grid {grid} has {frames} frames: that is a video, not an image")
    merge, size = processor.merge_size, processor.patch_size
    # One frame is repeated to fill a patch in time; patches stand in the order in which they are merged.
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
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (scaled * std + mean) / processor.rescale_factor
    whole = pixels.round()
    if (pixels - whole).abs().max() > 0.01 or whole.min() < 0 or whole.max() > 255:
        raise ValueError(f"patches of grid {grid} are no 8-bit pixels with mean {processor.image_mean}")
    return Image.fromarray(rearrange(whole.to(torch.uint8), "c h w -> h w c").numpy())
