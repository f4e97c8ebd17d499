"""Encode a loaded sample as the input of the policy: token ids, pixel patches, M-RoPE positions and image sizes.

Shapes: P prompt tokens, C completion tokens, n images of one sample, N patches of these images together.
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
from datamodules.encoding.mrope import mrope_positions
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS, decode_images, open_images
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import LoadedSample, Sample, SampleError

END_OF_TURN = "<|im_end|>"


@dataclass(eq=False)
class EncodedSample:
    """One encoded sample. Images are in the order of `sample.images`, which is also their order in the prompt."""

    sample: Sample
    input_ids: Tensor  # long [P], the prompt; the placeholder of an image is repeated once for each merged patch
    positions: Tensor  # long [3, P]: time, row, column (M-RoPE)
    next_position: int  # position of the first completion token, on all three axes
    pixel_values: Tensor  # float [N, patch_dim]: the patches of the first image, then those of the second, …
    grid_thw: Tensor  # long [n, 3]: frames, rows and columns of patches
    image_sizes: tuple[ImageSizes, ...]
    completion_ids: Tensor | None  # long [C], ends with <|im_end|>; None without a target
    image_keys: tuple[str, ...]  # sha256 of each image's encoded bytes
    answer_form: AnswerForm = AnswerForm.ONE_BOX  # that the prompt asks for

    def to(self, device: torch.device | str) -> EncodedSample:
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __getstate__(self) -> dict[str, Any]:
        # A worker sends each tensor through shared memory, which keeps a file descriptor open. Only the pixels are
        # large enough for that. Small tensors are pickled as NumPy arrays.
        small = {name: value.cpu().numpy() for name, value in self._tensors().items() if name != "pixel_values"}
        return self.__dict__ | small

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        self.__dict__.update(state | arrays)


@dataclass(eq=False)
class Batch:
    """The samples of one step."""

    items: list[EncodedSample]
    position: dict[str, Any] | None = None  # state of the data stream after these samples; None outside a stream
    num_read: int = 0  # samples of this rank's epoch up to the last one of these, rejected ones too
    num_rejected: int = 0  # of these

    @property
    def sample_ids(self) -> list[str]:
        return [item.sample.id for item in self.items]

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, items=[item.to(device) for item in self.items])

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class _Layout:
    """The tokens and grids of a sample. They depend on the sizes of its images, but not on the pixels."""

    image_sizes: tuple[ImageSizes, ...]
    grid_thw: Tensor  # long [n, 3]
    input_ids: Tensor  # long [P]
    completion_ids: Tensor | None  # long [C]

    def fits(self, sizes: Sequence[tuple[int, int]], grid_thw: Tensor) -> bool:
        """Whether images of these sizes (width, height) and grids long [n, 3] have the same tokens and grids."""
        same = [sizes.original for sizes in self.image_sizes] == list(sizes)
        return same and torch.equal(self.grid_thw, grid_thw)


@dataclass(eq=False)
class Encoder:
    """Encodes samples with the processor of the model. The processor is loaded at first use.

    Args:
        processor_path: folder or Hub name of the processor.
        box_format: the meaning of the numbers that the model reads and writes.
        style: the text after the question.
        max_prompt_tokens: a sample with a longer prompt, images included, is rejected.
        max_completion_tokens: a sample with a longer target is rejected.
        with_target: encode the target of supervised training too.
        max_image_pixels: a stored image with more pixels is refused (decompression bomb).
        max_sample_pixels: a sample whose stored images together have more pixels is refused.
        max_resized_pixels: largest area of an image after resizing; None takes the processor's own limit.
        label_images: write "Picture k: " before image k, an option of Qwen's chat template.
        answer_form: what an answer consists of.

    Raises:
        ValueError: `with_target` is set, but the style has no target.
    """

    processor_path: str
    box_format: BoxFormat
    style: PromptStyle
    max_prompt_tokens: int
    max_completion_tokens: int
    with_target: bool
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_sample_pixels: int = MAX_SAMPLE_PIXELS
    max_resized_pixels: int | None = None
    label_images: bool = False
    answer_form: AnswerForm = AnswerForm.ONE_BOX

    def __post_init__(self) -> None:
        self.box_format, self.style = BoxFormat(self.box_format), PromptStyle(self.style)
        self.answer_form = AnswerForm(self.answer_form)
        if self.with_target and self.style not in (PromptStyle.THINK, PromptStyle.ANSWER):
            raise ValueError(f"with_target=True needs style think or answer, got style={str(self.style)!r}")

    def __getstate__(self) -> dict[str, Any]:
        # The processor is not sent to other processes: each loads its own.
        return {name: value for name, value in self.__dict__.items() if name != "processor"}

    def form(self) -> dict[str, Any]:
        """All settings that change the prompt or the images. They are part of the keys of cached answers.

        The processor is left out: it belongs to the model's folder, which those keys contain already.
        """
        left_out = {"processor", "processor_path"}
        if self.answer_form == AnswerForm.ONE_BOX:  # keys of earlier versions, which had no other form, stay valid
            left_out.add("answer_form")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @cached_property
    def processor(self) -> Any:
        """The processor, with `max_resized_pixels` as its limit."""
        processor = load_processor(self.processor_path)
        if self.max_resized_pixels is not None:
            shortest = processor.image_processor.size["shortest_edge"]
            processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": self.max_resized_pixels}
        return processor

    def encode(self, loaded: LoadedSample) -> EncodedSample:
        """Encode one sample.

        Raises:
            SampleError: before any pixel is decoded, with a rule of `open_images` or `target_text`, or
                "placeholder_mismatch", "prompt_too_long" or "completion_too_long"; then with a rule of `decode_images`.
        """
        sample = loaded.sample
        # 1. Headers: the sizes of the images, without decoding.
        stored = open_images(loaded, self.max_image_pixels, self.max_sample_pixels)
        sizes = [image.size for image in stored]
        # 2. Text as tokens. Their number depends only on the sizes, so a sample that is too long costs no decoding.
        layout = self._layout(sample, sizes, torch.cat([self._grid(size) for size in sizes]))
        # 3. Pixels as patches. `map` drops each image before the next one is decoded.
        sizes, pixels, grids = zip(*map(self._patches, decode_images(sample.id, stored)), strict=True)
        if not layout.fits(sizes, torch.cat(grids)):  # a PNG with EXIF behind its pixels, which has turned the image
            layout = self._layout(sample, sizes, torch.cat(grids))
        # 4. Positions of the prompt's tokens, for the rotary embedding.
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
            answer_form=self.answer_form,
        )

    def _layout(self, sample: Sample, sizes: Sequence[tuple[int, int]], grid_thw: Tensor) -> _Layout:
        """The prompt and the target as tokens, for images of `sizes` (width, height) and grids long [n, 3]."""
        patch_size = self.processor.image_processor.patch_size
        image_sizes = tuple(
            ImageSizes.from_grid(size, (rows, columns), patch_size)
            for size, (_, rows, columns) in zip(sizes, grid_thw.tolist(), strict=True)
        )
        input_ids = self._prompt_ids(sample, image_sizes, grid_thw)
        completion_ids = self._completion_ids(sample, image_sizes) if self.with_target else None
        return _Layout(image_sizes, grid_thw, input_ids, completion_ids)

    def _grid(self, size: tuple[int, int]) -> Tensor:
        """The grid, long [1, 3], that `_patches` would return for an image of `size` (width, height)."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # late: a slow import

        images, (width, height) = self.processor.image_processor, size
        patch, limits = images.patch_size, images.size
        rows, columns = smart_resize(
            height, width, patch * images.merge_size, limits["shortest_edge"], limits["longest_edge"]
        )
        return torch.tensor([[1, rows // patch, columns // patch]])

    def _patches(self, image: Image.Image) -> tuple[tuple[int, int], Tensor, Tensor]:
        """The size (width, height), the patches, float [rows·columns, patch_dim], and the grid, long [1, 3], of one
        image.

        The processor resizes with torchvision; qwen-vl-utils uses Pillow. The sizes are equal, the pixels nearly equal.
        """
        # One call for each image: images cannot influence each other, and patches stay together with their grid.
        features = self.processor.image_processor(images=[image], return_tensors="pt")
        return image.size, features["pixel_values"], features["image_grid_thw"]

    def _prompt_ids(self, sample: Sample, image_sizes: Sequence[ImageSizes], grid_thw: Tensor) -> Tensor:
        """The token ids of the prompt, long [P]."""
        # The chat template writes one placeholder for each image.
        messages = build_messages(sample, image_sizes, self.box_format, self.style, answer_form=self.answer_form)
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, add_vision_id=self.label_images
        )
        ids = torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        is_image = ids == self.processor.image_token_id
        if int(is_image.sum()) != len(grid_thw):
            detail = f"{int(is_image.sum())} placeholders for {len(grid_thw)} images"
            raise SampleError(sample.id, "placeholder_mismatch", detail)
        # The model expects one placeholder for each merged patch, so each is repeated.
        repeats = torch.ones_like(ids)
        repeats[is_image] = grid_thw.prod(dim=1) // self.processor.image_processor.merge_size**2
        ids = ids.repeat_interleave(repeats)
        if len(ids) > self.max_prompt_tokens:
            detail = f"{len(ids)} tokens, max_prompt_tokens={self.max_prompt_tokens}"
            raise SampleError(sample.id, "prompt_too_long", detail)
        return ids

    def _completion_ids(self, sample: Sample, image_sizes: Sequence[ImageSizes]) -> Tensor:
        """The token ids of the target, long [C], with the end of the turn."""
        text = target_text(sample, image_sizes, self.box_format, self.style, self.answer_form) + END_OF_TURN
        ids = torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if bool((ids == self.processor.image_token_id).any()):
            raise SampleError(sample.id, "placeholder_mismatch", "the target holds an image placeholder")
        if len(ids) > self.max_completion_tokens:
            detail = f"{len(ids)} tokens, max_completion_tokens={self.max_completion_tokens}"
            raise SampleError(sample.id, "completion_too_long", detail)
        return ids
