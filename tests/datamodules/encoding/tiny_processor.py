"""Test data: a tiny Qwen2.5-VL processor folder, images, and samples."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path

from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.manifest import read_manifest
from experiments.nano.build_model import CHAT_TEMPLATE, build_tokenizer

TEXTS = ("Picture 1: find the red circle in the second image.", '<think>It moved.</think><answer>{"label": "dog"}')
MIN_PIXELS, MAX_PIXELS = 28 * 28, 112 * 112


def save_tiny_processor(folder: str | Path, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Path:
    """Saves what `AutoProcessor.from_pretrained(folder)` loads; vocabulary of 512 entries, patches of 14 pixels."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(TEXTS, vocab_size=512),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return Path(folder)


def image_bytes(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """An encoded image of random blocks."""
    rng = random.Random(seed)
    image = Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_sample(
    sample_id: str, sizes: tuple[tuple[int, int], ...] = ((56, 56), (84, 56)), thinking: str | None = "It moved."
) -> LoadedSample:
    """A sample over images of `sizes` (width, height), whose answer is in the last one."""
    last = len(sizes) - 1
    sample = Sample(
        id=sample_id,
        source="test",
        task="common_object",
        images=tuple(f"{sample_id}-{index}.png" for index in range(len(sizes))),
        messages=(*(ImagePart(index) for index in range(len(sizes))), TextPart("Find the dog.")),
        answer=BoxAnswer(image=last, box=(0.25, 0.25, 0.75, 1.0), label="dog"),
        thinking=thinking,
    )
    seed = sum(map(ord, sample_id))
    return LoadedSample(sample, tuple(image_bytes(*size, seed + index) for index, size in enumerate(sizes)))


def declare(folder: Path) -> None:
    """Have the manifest say what the shards hold now, as if they had been written so."""
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
