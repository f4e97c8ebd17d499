"""Shared fixtures: a tiny random Qwen2.5-VL folder in the real format, and encoded samples with random images."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from experiments.nano import build_model
from tests.browser import browser_page  # noqa: F401

SIZES = ((112, 84), (84, 112), (140, 120), (56, 56), (112, 56), (170, 90))  # width, height in pixels
QUESTIONS = (
    "Which object is in both images?",
    "Where is the red ring?",
    "What changed between the first and the last?",
)


# How long an example takes is a matter of who else uses the cores.
hypothesis.settings.register_profile("any_load", deadline=None)
hypothesis.settings.load_profile("any_load")


@dataclass(frozen=True)
class SmallDisk:
    """A filesystem of 2 MiB."""

    root: Path

    def fill(self, but: int = 0) -> None:
        """Leave no more than `but` bytes free."""
        usage = shutil.disk_usage(self.root)
        (self.root / "ballast").write_bytes(bytes(max(usage.free - but, 0)))

    def make_room(self) -> None:
        (self.root / "ballast").unlink()

    def lose(self) -> None:
        """Take the filesystem away from under its place, as when a server is gone."""
        subprocess.run(["umount", "--lazy", self.root], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", root]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small filesystem is not permitted here")
    yield SmallDisk(root)
    subprocess.run(["umount", "--lazy", root], capture_output=True, check=False)  # a test may have lost it


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model of 2 + 2 layers: 4 query and 2 key-value heads, tied embeddings, windowed and full vision."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = build_model.build_tokenizer(QUESTIONS, vocab_size=340)
    size = {"shortest_edge": 56 * 56, "longest_edge": 170 * 170}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=build_model.CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = build_model.build_config(tokenizer, text=(128, 2), vision=(64, 2))
    # Wide enough that the likeliest token leads by more than rounding.
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.15
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero biases would hide a mistake with biases
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return folder


def random_png(rng: random.Random, size: tuple[int, int]) -> bytes:
    """A PNG of large random blocks, (width, height) pixels."""
    blocks = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
    file = io.BytesIO()
    blocks.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make_items(tiny_model_dir: Path) -> Callable[..., list[EncodedSample]]:
    """make_items([1, 3]) gives two encoded samples, of one and of three images of mixed sizes, the same for a seed."""

    def make(num_images: Sequence[int], seed: int = 0, with_target: bool = False) -> list[EncodedSample]:
        encoder = Encoder(str(tiny_model_dir), "absolute_pixels", "think", 4096, 256, with_target)
        rng = random.Random(seed)
        items = []
        for index, count in enumerate(num_images):
            files = tuple(f"{index}_{image}.png" for image in range(count))
            sample = Sample(
                id=f"sample/{index}",
                source="test",
                task="referring",
                images=files,
                messages=(*(ImagePart(image) for image in range(count)), TextPart(rng.choice(QUESTIONS))),
                answer=BoxAnswer(rng.randrange(count), (0.1, 0.2, 0.6, 0.9), "ring"),
                thinking="It is there.",
            )
            images = tuple(random_png(rng, rng.choice(SIZES)) for _ in files)
            items.append(encoder.encode(LoadedSample(sample, images)))
        return items

    return make
