"""Images back from patches: the server must see the very pixels that the policy is given."""

import pytest
import torch

from datamodules.encoding.images_from_patches import images_from_patches


def test_images_come_back_exactly(tiny_model_dir, make_items) -> None:
    """Read again by the processor they keep their size and give the same patches, bit for bit."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_model_dir)
    (item,) = make_items([6])
    assert len({tuple(grid) for grid in item.grid_thw.tolist()}) > 1
    images = images_from_patches(item.pixel_values, item.grid_thw, processor)
    assert [image.size for image in images] == [sizes.resized for sizes in item.image_sizes]
    again = processor(images=images, return_tensors="pt")
    assert torch.equal(again["image_grid_thw"], item.grid_thw)
    assert torch.equal(again["pixel_values"], item.pixel_values)


def test_other_values_are_refused(tiny_model_dir, make_items) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_model_dir)
    (item,) = make_items([1])
    with pytest.raises(ValueError, match="not 8-bit pixels"):
        images_from_patches(item.pixel_values * 1.01, item.grid_thw, processor)
    with pytest.raises(ValueError, match="2 frames"):
        images_from_patches(item.pixel_values.repeat(2, 1), item.grid_thw * torch.tensor([2, 1, 1]), processor)
