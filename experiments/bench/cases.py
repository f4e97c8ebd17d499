"""The cases for each shape: GRPO and SFT steps compared with TRL, sampling in two ways, and growth of our GRPO step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.bench.workload import Workload

# Growth: one number of the workload takes these values; the others are constant.
GROWTH = {
    "group_size": (4, 8, 16, 32),
    "images": (1, 2, 4, 8),
    "completion_tokens": (64, 128, 256, 512, 1024),
}
TINY_GROWTH = {"group_size": (2, 4), "images": (1, 2), "completion_tokens": (4, 8)}


@dataclass(frozen=True)
class Case:
    """One measurement. The contenders take turns; a turn has untimed steps and then timed ones."""

    name: str
    workload: Workload
    contenders: tuple[str, ...] = ("ours", "trl")
    # A further contender of this project -> the fields of the workload that it changes.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    turns: int = 4  # of each contender
    warmup: int = 0  # untimed steps of a turn; the first turn has at least one
    steps: int = 2  # timed steps of a turn
    expected_seconds: int = 60  # the case is not started if less time than this is left

    def workload_of(self, contender: str) -> Workload:
        """The workload of a contender."""
        return replace(self.workload, **self.variants.get(contender, {}))


def workloads(shape: str) -> dict[str, Workload]:
    """The GRPO and the SFT workload of a shape."""
    if shape == "tiny":
        grpo = Workload(group_size=2, completion_tokens=8, images=2, image_size=(56, 56), lora_rank=4)
        return {"grpo": grpo, "sft": replace(grpo, task="sft", group_size=1)}
    if shape == "nano":
        grpo = Workload()
        return {"grpo": grpo, "sft": replace(grpo, task="sft", prompts=16, group_size=1)}
    # The GPU workload: 2 prompts x 8 completions of 256 tokens, 3 images of 640x480.
    grpo = Workload(
        completion_tokens=256,
        image_size=(640, 480),
        lora_rank=64,
        gradient_checkpointing=True,
        dtype="bfloat16",
        max_tokens_per_row=16_384,
        activation_gib=6,  # with this, our step needs no more memory than TRL's
    )
    return {"grpo": grpo, "sft": replace(grpo, task="sft", prompts=8, group_size=1)}


def cases(shape: str, growth_contenders: tuple[str, ...] = ("ours",)) -> Iterator[Case]:
    """All cases of a shape; `growth_contenders` are measured in the cases of growth."""
    base = workloads(shape)
    on_gpu = shape not in ("tiny", "nano")
    # On a GPU, a turn must first allocate the memory that the other contender has freed. That step is not timed.
    pace = {"turns": 2, "warmup": 1, "steps": 1} if on_gpu else {"turns": 1 if shape == "tiny" else 4}
    yield Case("grpo", base["grpo"], expected_seconds=380 if on_gpu else 60, **pace)
    yield Case("sft", base["sft"], expected_seconds=120 if on_gpu else 60, **pace)
    if not on_gpu:
        yield from sampling_cases(base["grpo"], 1 if shape == "tiny" else 4)
    once = {"turns": 1, "steps": 2, "contenders": growth_contenders, "expected_seconds": 100 if on_gpu else 60}
    if on_gpu:
        large = replace(base["grpo"], images=8, completion_tokens=1024)
        yield Case("grpo large", large, **once)
    for name, values in (TINY_GROWTH if shape == "tiny" else GROWTH).items():
        for value in values:
            yield Case(f"grpo {name}={value}", replace(base["grpo"], **{name: value}), **once)


def sampling_cases(grpo: Workload, turns: int) -> Iterator[Case]:
    """What sampling gains from other prompts at the same time, and what it loses by ragged lengths.

    - window: an update of 8 prompts in 4 batches: sampled together and trained on in long rows, or batch by batch, each
      with a rollout and rows of its own.
    - ragged: the rate of completions of 60 tokens on average, 400 at most, and of completions of 60 tokens.
    """
    by_batch = {"by batch": {"prompts_per_batch": 2, "rows_by_batch": True}}
    yield Case("window", replace(grpo, prompts=8, accumulate=4), ("ours", "by batch"), by_batch, turns)
    # At a high temperature all tokens are equally likely, so the lengths do not depend on the weights.
    mean = min(60, grpo.completion_tokens)
    equal = replace(grpo, task="rollout", prompts=64, temperature=1e6, completion_tokens=mean)
    ragged = {"completion_tokens": 400 * mean // 60, "mean_tokens": mean}
    yield Case("ragged", equal, ("ragged", "equal"), {"ragged": ragged}, turns, expected_seconds=120)
