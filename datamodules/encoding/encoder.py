"""From a loaded sample to what the policy reads: token ids, pixel patches, M-RoPE positions and image sizes.

Shapes: P prompt tokens, C completion tokens, n images, N patches of all images of one item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.checkpoints.pretrained import load_processor
from datamodules.encoding.messages import PromptStyle, build_messages, target_text
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS, decode_images, open_images
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import LoadedSample, Sample, SampleError

END_OF_TURN = "<|im_end|>"


@dataclass(eq=False)
class EncodedSample:
    """One encoded sample. Images are in the order of `sample.images`, which is also their order in the prompt."""

    sample: Sample
    input_ids: Tensor  # long [P]; an image's placeholder is repeated once per merged patch
    positions: Tensor  # long [3, P]: time, row, column (M-RoPE)
    next_position: int  # position of the first completion token, on all three axes
    pixel_values: Tensor  # float [N, patch_dim], image after image
    grid_thw: Tensor  # long [n, 3]: frames, rows and columns of patches
    image_sizes: tuple[ImageSizes, ...]
    completion_ids: Tensor | None  # long [C], ends with <|im_end|>; None without a target
    image_keys: tuple[str, ...]  # sha256 of each image's encoded bytes

    def to(self, device: torch.device | str) -> EncodedSample:
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __getstate__(self) -> dict[str, Any]:
        # Each tensor that a worker sends holds a file descriptor open; only the pixels are worth one.
        small = {name: value.cpu().numpy() for name, value in self._tensors().items() if name != "pixel_values"}
        return self.__dict__ | small

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        self.__dict__.update(state | arrays)


@dataclass(eq=False)
class Batch:
    """Items of one step, and the state of the training stream after them (None outside a stream)."""

    items: list[EncodedSample]
    position: dict[str, Any] | None = None

    @property
    def sample_ids(self) -> list[str]:
        return [item.sample.id for item in self.items]

    def to(self, device: torch.device | str) -> Batch:
        return Batch([item.to(device) for item in self.items], self.position)

    def __len__(self) -> int:
        return len(self.items)


def mrope_positions(input_ids: Tensor, grid_thw: Tensor, image_token_id: int, merge_size: int) -> tuple[Tensor, int]:
    """M-RoPE positions long [3, P] (time, row, column) of one unpadded prompt long [P], and the position after it.

    Text advances all three axes by one a token. An image of T×H×W merged patches starts where the text before it ended:
    its tokens get (start + t, start + row, start + column), and the text goes on at start + max(H, W)
    (Qwen2-VL, arXiv:2409.12191, §2.1; equal to transformers' `get_rope_index` for images). Raises ValueError when the
    placeholders in `input_ids` are not the runs that `grid_thw` long [n, 3] (patches before merging) asks for.
    """
    is_image = input_ids == image_token_id
    placeholders = is_image.nonzero().flatten()
    sizes = [(frames, rows // merge_size, columns // merge_size) for frames, rows, columns in grid_thw.tolist()]
    expected = sum(frames * rows * columns for frames, rows, columns in sizes)
    if len(placeholders) != expected:
        raise ValueError(f"prompt has {len(placeholders)} image placeholders, its grids {grid_thw.tolist()} {expected}")
    pieces, done, position, used = [], 0, 0, 0
    for frames, rows, columns in sizes:
        start, length = int(placeholders[used]), frames * rows * columns
        if not is_image[start : start + length].all():
            raise ValueError(f"placeholders of an image of {length} tokens are interrupted after token {start}")
        pieces.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        pieces.append(torch.stack(axes).flatten(1) + position)
        position += max(rows, columns)
        done, used = start + length, used + length
    rest = len(input_ids) - done
    pieces.append(torch.arange(position, position + rest).expand(3, -1))
    return torch.cat(pieces, dim=1), position + rest


@dataclass(frozen=True, eq=False)
class _Layout:
    """A sample's tokens and grids, which depend on the sizes of its images and not on their pixels."""

    image_sizes: tuple[ImageSizes, ...]
    grid_thw: Tensor  # long [n, 3]
    input_ids: Tensor  # long [P]
    completion_ids: Tensor | None  # long [C]

    def fits(self, sizes: Sequence[tuple[int, int]], grid_thw: Tensor) -> bool:
        """Whether images of these sizes (width, height) and grids long [n, 3] would give the same."""
        same = [sizes.original for sizes in self.image_sizes] == list(sizes)
        return same and torch.equal(self.grid_thw, grid_thw)


class Encoder:
    """Encodes samples with the processor in `processor_path`, which is loaded at first use (workers load their own).

    `max_image_pixels` bounds a stored image and `max_sample_pixels` all stored images of a sample together
    (decompression bombs). `max_resized_pixels` bounds an image after resizing where that should be smaller than the
    processor's own setting. `label_images` writes "Picture k: " before image k, as Qwen's chat template does when asked
    to.
    """

    def __init__(
        self,
        processor_path: str,
        box_format: BoxFormat,
        style: PromptStyle,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        with_target: bool,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_sample_pixels: int = MAX_SAMPLE_PIXELS,
        max_resized_pixels: int | None = None,
        label_images: bool = False,
    ) -> None:
        if with_target and PromptStyle(style) not in (PromptStyle.THINK, PromptStyle.ANSWER):
            raise ValueError(f"with_target=True needs style think or answer, got style={str(style)!r}")
        self.processor_path = processor_path
        self.box_format = BoxFormat(box_format)
        self.style = PromptStyle(style)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_completion_tokens = max_completion_tokens
        self.with_target = with_target
        self.max_image_pixels = max_image_pixels
        self.max_sample_pixels = max_sample_pixels
        self.max_resized_pixels = max_resized_pixels
        self.label_images = label_images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "processor"}

    def form(self) -> dict[str, Any]:
        """All that decides how a sample is put to a model, for the keys of what is computed from its answers; not the
        processor, which belongs to the model's folder."""
        return {name: value for name, value in vars(self).items() if name not in ("processor", "processor_path")}

    @cached_property
    def processor(self) -> Any:
        processor = load_processor(self.processor_path)
        if self.max_resized_pixels is not None:
            shortest = processor.image_processor.size["shortest_edge"]
            processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": self.max_resized_pixels}
        return processor

    def encode(self, loaded: LoadedSample) -> EncodedSample:
        """Raises SampleError: the rules of `open_images`, "placeholder_mismatch", "prompt_too_long",
        "completion_too_long" and those of `target_text`, all before a pixel is decoded; then those of
        `decode_images`."""
        sample = loaded.sample
        stored = open_images(loaded, self.max_image_pixels, self.max_sample_pixels)
        sizes = [image.size for image in stored]
        layout = self._layout(sample, sizes, torch.cat([self._grid(size) for size in sizes]))
        # `map` keeps no image while the next one is decoded.
        sizes, pixels, grids = zip(*map(self._patches, decode_images(sample.id, stored)), strict=True)
        if not layout.fits(sizes, torch.cat(grids)):  # EXIF behind the pixels of a PNG has turned it
            layout = self._layout(sample, sizes, torch.cat(grids))
        merge_size = self.processor.image_processor.merge_size
        positions, next_position = mrope_positions(
            layout.input_ids, layout.grid_thw, self.processor.image_token_id, merge_size
        )
        return EncodedSample(
            sample=sample,
            input_ids=layout.input_ids,
            positions=positions,
            next_position=next_position,
            pixel_values=torch.cat(pixels),
            grid_thw=layout.grid_thw,
            image_sizes=layout.image_sizes,
            completion_ids=layout.completion_ids,
            image_keys=tuple(hashlib.sha256(data).hexdigest() for data in loaded.images),
        )

    def _layout(self, sample: Sample, sizes: Sequence[tuple[int, int]], grid_thw: Tensor) -> _Layout:
        """The texts of a sample over images of `sizes` (width, height) and grids long [n, 3], as tokens."""
        patch_size = self.processor.image_processor.patch_size
        image_sizes = tuple(
            ImageSizes.from_grid(size, (rows, columns), patch_size)
            for size, (_, rows, columns) in zip(sizes, grid_thw.tolist(), strict=True)
        )
        input_ids = self._prompt_ids(sample, image_sizes, grid_thw)
        completion_ids = self._completion_ids(sample, image_sizes) if self.with_target else None
        return _Layout(image_sizes, grid_thw, input_ids, completion_ids)

    def _grid(self, size: tuple[int, int]) -> Tensor:
        """The grid long [1, 3] that `_patches` gives an image of `size` (width, height), which need not be there."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # slow, as the processor's

        images, (width, height) = self.processor.image_processor, size
        patch, limits = images.patch_size, images.size
        rows, columns = smart_resize(
            height, width, patch * images.merge_size, limits["shortest_edge"], limits["longest_edge"]
        )
        return torch.tensor([[1, rows // patch, columns // patch]])

    def _patches(self, image: Image.Image) -> tuple[tuple[int, int], Tensor, Tensor]:
        """Size (width, height), patches float [rows·columns, patch_dim] and grid long [1, 3] of one image.

        One call per image: the size of one never bears on another, and patches stay paired with their grid. The
        processor resizes with torchvision, where qwen-vl-utils takes Pillow: sizes are equal, pixels nearly.
        """
        features = self.processor.image_processor(images=[image], return_tensors="pt")
        return image.size, features["pixel_values"], features["image_grid_thw"]

    def _prompt_ids(self, sample: Sample, image_sizes: Sequence[ImageSizes], grid_thw: Tensor) -> Tensor:
        messages = build_messages(sample, image_sizes, self.box_format, self.style)
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, add_vision_id=self.label_images
        )
        ids = torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        is_image = ids == self.processor.image_token_id
        if int(is_image.sum()) != len(grid_thw):
            detail = f"{int(is_image.sum())} placeholders for {len(grid_thw)} images"
            raise SampleError(sample.id, "placeholder_mismatch", detail)
        repeats = torch.ones_like(ids)
        repeats[is_image] = grid_thw.prod(dim=1) // self.processor.image_processor.merge_size**2
        ids = ids.repeat_interleave(repeats)
        if len(ids) > self.max_prompt_tokens:
            detail = f"{len(ids)} tokens, max_prompt_tokens={self.max_prompt_tokens}"
            raise SampleError(sample.id, "prompt_too_long", detail)
        return ids

    def _completion_ids(self, sample: Sample, image_sizes: Sequence[ImageSizes]) -> Tensor:
        text = target_text(sample, image_sizes, self.box_format, self.style) + END_OF_TURN
        ids = torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if bool((ids == self.processor.image_token_id).any()):
            raise SampleError(sample.id, "placeholder_mismatch", "the target holds an image placeholder")
        if len(ids) > self.max_completion_tokens:
            detail = f"{len(ids)} tokens, max_completion_tokens={self.max_completion_tokens}"
            raise SampleError(sample.id, "completion_too_long", detail)
        return ids
