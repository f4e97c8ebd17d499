"""The least time that a step can take: operations and bytes of each phase over the machine's peaks.

Counted is what the step needs and nothing more: each image encoded once, each prompt prefilled once for its group, one
forward pass of the policy and one of the reference over [prompt, G completions], a backward pass without the gradients
of frozen weights and without recomputation. Bytes are those of weights, of keys and values while decoding, and of the
optimizer's state; activations are left out. A phase takes at least the longer of its two times.

Symbols: P prompts, B = P·G completions, L prompt tokens of all prompts, T tokens of a completion, S patches of all
images, D width, b bytes of a number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.bench.workload import Workload
from lightning_modules.models.layers.onednn_linear import multiply

BYTES = {"float32": 4, "bfloat16": 2}
# Dense bfloat16 operations a second that long products reach, and bytes a second.
KNOWN_DEVICES = {"H100": (600e12, 3.35e12), "H200": (600e12, 4.8e12)}


@dataclass(frozen=True)
class Peaks:
    operations: float  # a second
    bandwidth: float  # bytes a second
    source: str  # "stated" or "measured"


@dataclass(frozen=True)
class Work:
    operations: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        return max(self.operations / peaks.operations, self.bytes / peaks.bandwidth)


def machine_peaks() -> Peaks:
    """Stated for the GPUs listed here; of any other device a matrix product's and a copy's best rate."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, (operations, bandwidth) in KNOWN_DEVICES.items():
            if known in name:
                return Peaks(operations, bandwidth, "stated")
        device, dtype, side = "cuda", torch.bfloat16, 8192
    else:
        device, dtype, side = "cpu", torch.float32, 1024
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.rand(1 << 25, device=device)  # 128 MiB, more than caches hold
    target = torch.empty_like(source)
    product = min(_best_seconds(lambda: a @ b), _best_seconds(lambda: multiply(a, b)))  # MKL's, and oneDNN's
    operations = 2 * side**3 / product
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    return Peaks(operations, bandwidth, "measured")


def _best_seconds(work: Callable[[], Any], tries: int = 10) -> float:
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(frozen=True)
class Sizes:
    """What a config.json says about work: weights of the linear layers, and widths of the attention."""

    layers: int
    width: int
    query_width: int  # of all query heads
    kv_width: int  # of all key-value heads
    inner: int
    vocab: int
    vision: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Sizes:
        config = json.loads((Path(folder) / "config.json").read_text())
        text = config["text_config"]
        head = text["hidden_size"] // text["num_attention_heads"]
        return cls(
            layers=text["num_hidden_layers"],
            width=text["hidden_size"],
            query_width=text["hidden_size"],
            kv_width=head * text["num_key_value_heads"],
            inner=text["intermediate_size"],
            vocab=text["vocab_size"],
            vision=config["vision_config"],
        )

    @property
    def layer_weights(self) -> int:
        """Of all layers, without embeddings and head."""
        attention = 2 * self.width * self.query_width + 2 * self.width * self.kv_width
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.width

    def lora_weights(self, rank: int) -> int:
        width, inner, query, kv = self.width, self.inner, self.query_width, self.kv_width
        sums = 2 * (width + query) + 2 * (width + kv) + 3 * (width + inner)
        return self.layers * rank * sums


def step_work(
    sizes: Sizes, workload: Workload, prompt_tokens: int, completion_tokens: int, patches: int
) -> dict[str, Work]:
    """Work by phase; the three counts are those of the whole step."""
    number = BYTES[workload.dtype]
    prompts = workload.prompts
    branches = prompts * workload.group_size
    prefix, length = prompt_tokens / prompts, completion_tokens / branches
    weights, head = sizes.layer_weights, sizes.head_weights
    # Of one token that sees one other, in all layers: two products.
    pair = 4 * sizes.query_width * sizes.layers
    prefix_pairs = prompts * prefix**2 / 2
    branch_pairs = branches * (length * prefix + length**2 / 2)

    lora = sizes.lora_weights(workload.lora_rank)
    row = prompt_tokens + completion_tokens
    linear = 2 * weights * row + 2 * head * completion_tokens
    attention = pair * (prefix_pairs + branch_pairs)
    read = number * (weights + head)
    work = {"encode": _encode_work(sizes, number, patches, prompts * workload.images)}
    if workload.task == "grpo":
        work["prefill"] = Work(2 * weights * prompt_tokens + pair * prefix_pairs + 2 * head * prompts, read)
        work["decode"] = _decode_work(sizes, number, prompt_tokens, branches, length, pair * branch_pairs)
        if workload.beta > 0:
            work["reference"] = Work(linear + attention, read)
    work["forward"] = Work(linear + attention + 2 * lora * row, read)
    work["backward"] = Work(linear + 2 * attention + 4 * lora * row, read)
    # AdamW in float32: reads weight, gradient and two moments, writes all but the gradient.
    work["optimizer"] = Work(12 * lora, 7 * 4 * lora)
    return work


def _decode_work(sizes: Sizes, number: int, prompt_tokens: int, branches: int, length: float, attention: float) -> Work:
    """The first token comes from the prefill. Every step reads all weights, each prompt's keys and values once, and
    each branch's own."""
    steps = length - 1
    cache = 2 * sizes.kv_width * sizes.layers * number  # of one token
    weights = sizes.layer_weights + sizes.head_weights
    read = steps * (number * weights + cache * (prompt_tokens + branches * length / 2))
    return Work(2 * weights * branches * steps + attention, read)


def _encode_work(sizes: Sizes, number: int, patches: int, images: int) -> Work:
    vision = sizes.vision
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    layer = 4 * width**2 + 3 * width * inner
    stem = 3 * vision["temporal_patch_size"] * patch**2 * width
    merge = vision["spatial_merge_size"] ** 2
    merger = (merge * width) ** 2 + merge * width * vision["out_hidden_size"]
    window = (vision["window_size"] // patch) ** 2
    full = len(vision["fullatt_block_indexes"])
    seen = full * patches / images + (vision["depth"] - full) * window  # other patches, summed over layers
    operations = 2 * patches * (vision["depth"] * layer + stem + merger / merge) + 4 * width * patches * seen
    return Work(operations, number * (vision["depth"] * layer + stem + merger))
