"""Positions of a prompt's tokens for multimodal rotary embeddings (M-RoPE): time, row and column."""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_positions(input_ids: Tensor, grid_thw: Tensor, image_token_id: int, merge_size: int) -> tuple[Tensor, int]:
    """M-RoPE positions, long [3, P] (time, row, column), of one unpadded prompt, and the position after the prompt.

    A text token advances all three axes by one. The tokens of an image of T×H×W merged patches get the positions
    (start + t, start + row, start + column), where `start` is the position after the text before the image. The next
    text begins at start + max(H, W). Source: Qwen2-VL, arXiv:2409.12191, §2.1. The result equals that of transformers'
    `get_rope_index` for images.

    Args:
        input_ids: long [P], with one placeholder for each merged patch.
        grid_thw: long [n, 3]: frames, rows and columns of patches of each image, before merging.
        image_token_id: id of the placeholder.
        merge_size: patches that are merged into one token, along each side.

    Raises:
        ValueError: the placeholders in `input_ids` do not fit `grid_thw`.
    """
    # The placeholders must be one uninterrupted run for each image, in the sizes of the grids.
    is_image = input_ids == image_token_id
    placeholders = is_image.nonzero().flatten()
    sizes = [(frames, rows // merge_size, columns // merge_size) for frames, rows, columns in grid_thw.tolist()]
    expected = sum(frames * rows * columns for frames, rows, columns in sizes)
    if len(placeholders) != expected:
        raise ValueError(f"prompt has {len(placeholders)} image placeholders, its grids {grid_thw.tolist()} {expected}")
    # `done`: number of tokens that have positions; `position`: that of the next token; `used`: placeholders that have
    # positions.
    pieces, done, position, used = [], 0, 0, 0
    for frames, rows, columns in sizes:
        start, length = int(placeholders[used]), frames * rows * columns
        if not is_image[start : start + length].all():
            raise ValueError(f"placeholders of an image of {length} tokens are interrupted after token {start}")
        # The text before the image.
        pieces.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        # The image.
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        pieces.append(torch.stack(axes).flatten(1) + position)
        position += max(rows, columns)
        done, used = start + length, used + length
    # The text after the last image.
    rest = len(input_ids) - done
    pieces.append(torch.arange(position, position + rest).expand(3, -1))
    return torch.cat(pieces, dim=1), position + rest
