"""Completions for tests of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Answer, ImagePart, Sample, TextPart
from lightning_modules.rl.rewards.completion import Completion


def make_completion(
    text: str,
    answer: Answer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat = BoxFormat.ABSOLUTE_PIXELS,
    **more: Any,
) -> Completion:
    """A completion of the sample pool/17, which has as many images as there are sizes."""
    images = range(len(image_sizes))
    parts = (*(ImagePart(k) for k in images), TextPart("Where is the cup?"))
    sample = Sample("pool/17", "test", "diff", tuple(f"{k}.png" for k in images), parts, answer)
    return Completion(sample, image_sizes, box_format, text, **more)
