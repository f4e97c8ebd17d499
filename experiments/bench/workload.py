"""The workload of both contenders: the same prompts, images and lengths, made from a seed."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from datamodules.persistence.problems import Problems
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart

if TYPE_CHECKING:
    from lightning_modules.rl.rewards.completion import Completion

POOL = 16  # number of steps after which the prompts repeat
QUESTION = "Which object is in all of these images? Locate it in the last one."
WORDS = ("the", "red", "ring", "is", "left", "of", "a", "blue", "square", "in", "image", "and", "small", "green")


@dataclass(frozen=True)
class Workload:
    """One optimizer step."""

    task: Literal["grpo", "rollout", "sft"] = "grpo"  # rollout: GRPO whose rewards are all equal, so it only samples
    prompts: int = 2  # prompts of a step
    group_size: int = 8  # completions of a prompt (1 for SFT)
    # GRPO: length of every completion. SFT: mean number of words of the written answers, which differ in length.
    completion_tokens: int = 64
    # GRPO: completions end at random after this number of tokens on average, and `completion_tokens` is the longest
    # length; None: no completion ends before.
    mean_tokens: int | None = None
    accumulate: int = 1  # GRPO: number of batches that the prompts of a step come in
    prompts_per_batch: int = 32  # GRPO: number of prompts that are decoded at the same time
    images: int = 3  # images of a prompt
    image_size: tuple[int, int] = (112, 84)  # (width, height) in pixels
    lora_rank: int = 32
    beta: float = 0.001  # weight of the KL term; 0 would skip the reference
    temperature: float = 1.0
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens_per_row: int = 4096
    rows_by_batch: bool = False  # GRPO: a packed row holds no groups of several batches
    activation_gib: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("prompts", "group_size", "completion_tokens", "accumulate", "images", "lora_rank", "temperature"):
            problems.positive(**{name: getattr(self, name)})
        problems.positive_or_null(mean_tokens=self.mean_tokens)
        problems.one_of(("grpo", "rollout", "sft"), task=self.task)
        is_whole = self.accumulate <= 0 or self.prompts % self.accumulate == 0
        problems.require(is_whole, f"must divide prompts={self.prompts}", accumulate=self.accumulate)
        problems.raise_all("workload")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Workload:
        """The workload with these fields, as JSON has them."""
        return cls(**values | {"image_size": tuple(values["image_size"])})  # JSON has no tuples

    @property
    def alpha(self) -> int:
        """LoRA's alpha."""
        return 2 * self.lora_rank


def no_reward(completion: Completion) -> float:
    """The reward of a rollout workload: no completion is better than another, so nothing is trained on."""
    return 0.0


def make_samples(workload: Workload) -> list[LoadedSample]:
    """The samples of POOL steps, in order, with written answers for CoT-SFT."""
    return [_make_sample(workload, index) for index in range(POOL * workload.prompts)]


def _make_sample(workload: Workload, index: int) -> LoadedSample:
    """Sample `index`, a pure function of the workload."""
    rng = random.Random(f"{workload.seed}:{index}")
    files = tuple(f"{index}_{image}.jpg" for image in range(workload.images))
    # 0.5 to 1.5 times the stated length.
    num_words = max(1, round(workload.completion_tokens * rng.uniform(0.5, 1.5)))
    sample = Sample(
        id=f"bench/{index}",
        source="bench",
        task="common_object",
        images=files,
        messages=(*(ImagePart(image) for image in range(workload.images)), TextPart(f"{QUESTION} ({index})")),
        answer=BoxAnswer(workload.images - 1, (0.2, 0.2, 0.8, 0.8), "ring"),
        thinking=" ".join(rng.choice(WORDS) for _ in range(num_words)),
    )
    return LoadedSample(sample, tuple(_random_jpeg(rng, workload.image_size) for _ in files))


def _random_jpeg(rng: random.Random, size: Sequence[int]) -> bytes:
    """A smooth random picture of `size` (width, height). File size and decoding time are similar to a photograph's."""
    coarse = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
    file = io.BytesIO()
    coarse.resize(tuple(size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
