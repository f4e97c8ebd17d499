"""A lower bound of the time of a step, by the roofline model: operations and bytes of each phase over peak rates.

It counts only the work that a step cannot avoid. Each image is encoded once, and each prompt is prefilled once for its
group. There is one forward pass of the policy and one of the reference over [prompt, G completions], and a backward
pass without gradients of frozen weights and without recomputation. Bytes are counted for the weights, for keys and
values while decoding, and for the optimizer's state; activations are ignored. The lower bound of a phase is the larger
of operations / peak rate and bytes / bandwidth.

Symbols: P prompts, B = P·G completions, L prompt tokens of all prompts, T tokens of a completion, S patches of all
images, D width, b bytes per number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.checkpoints.pretrained import skeleton
from experiments.bench.workload import Workload
from lightning_modules.models.architectures.base import VisionSizes
from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.layers import onednn_linear

BYTES = {"float32": 4, "bfloat16": 2}
# Dense bfloat16 operations per second that large matrix products reach, and bytes per second.
KNOWN_DEVICES = {"H100": (600e12, 3.35e12), "H200": (600e12, 4.8e12)}


@dataclass(frozen=True)
class Peaks:
    """The peak rates of a machine."""

    operations: float  # per second
    bandwidth: float  # bytes per second
    source: str  # "stated" by the maker, or "measured" here


@dataclass(frozen=True)
class Work:
    """The work of one phase."""

    operations: float  # a multiplication with its addition counts as two
    bytes: float  # read from and written to memory

    def seconds(self, peaks: Peaks) -> float:
        """Lower bound of the time for this work."""
        return max(self.operations / peaks.operations, self.bytes / peaks.bandwidth)


def machine_peaks() -> Peaks:
    """The stated rates of the GPUs in KNOWN_DEVICES; for other devices the best rate of a matrix product and a copy."""
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
    product = min(
        _best_seconds(lambda: a @ b), _best_seconds(lambda: onednn_linear.linear(a, b))
    )  # MKL's and oneDNN's product
    operations = 2 * side**3 / product
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    return Peaks(operations, bandwidth, "measured")


def _best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of ten measurements: other work on the machine only makes them longer."""
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide its work."""

    layers: int
    query_width: int  # of all query heads together
    kv_width: int  # of all key-value heads together
    linear_shapes: tuple[tuple[int, int], ...]  # outputs and inputs of each linear layer in all decoder layers
    head_weights: int
    vision: VisionSizes

    @classmethod
    def read(cls, folder: str | Path) -> Sizes:
        """The sizes of the model that this folder's config.json describes. No weight is read or allocated."""
        with torch.device("meta"):
            model = skeleton(folder, torch.bfloat16)
        architecture = architecture_of(model)
        modules = [module for layer in architecture.decoder_layers(model) for module in layer.modules()]
        cache = architecture.cache_sizes(model)
        return cls(
            layers=cache.layers,
            query_width=model.config.text_config.num_attention_heads * cache.width,
            kv_width=cache.heads * cache.width,
            linear_shapes=tuple(tuple(m.weight.shape) for m in modules if isinstance(m, torch.nn.Linear)),
            head_weights=model.get_output_embeddings().weight.numel(),
            vision=architecture.vision_sizes(model),
        )

    @property
    def layer_weights(self) -> int:
        """Number of weights in all decoder layers, without embeddings, head and biases."""
        return sum(outputs * inputs for outputs, inputs in self.linear_shapes)

    def lora_weights(self, rank: int) -> int:
        """Number of weights of a LoRA adapter on all linear layers."""
        return rank * sum(outputs + inputs for outputs, inputs in self.linear_shapes)


def step_work(
    sizes: Sizes, workload: Workload, prompt_tokens: int, completion_tokens: int, patches: int
) -> dict[str, Work]:
    """The work of one step by phase.

    Args:
        sizes: of the model.
        workload: the step.
        prompt_tokens: tokens of all prompts, each prompt once.
        completion_tokens: tokens of all completions.
        patches: patches of all images.
    """
    number = BYTES[workload.dtype]
    prompts = workload.prompts
    num_completions = prompts * workload.group_size
    prefix, length = prompt_tokens / prompts, completion_tokens / num_completions
    weights, head = sizes.layer_weights, sizes.head_weights
    # Attention: operations of one pair of tokens in all layers, for the scores and for the weighted sum; and the number
    # of pairs inside the prompts (causal, so half) and of the completions.
    pair = 4 * sizes.query_width * sizes.layers
    prefix_pairs = prompts * prefix**2 / 2
    completion_pairs = num_completions * (length * prefix + length**2 / 2)

    lora = sizes.lora_weights(workload.lora_rank)
    row = prompt_tokens + completion_tokens
    linear = 2 * weights * row + 2 * head * completion_tokens  # the head works on completion tokens only
    attention = pair * (prefix_pairs + completion_pairs)
    read = number * (weights + head)  # every pass reads all weights once
    work = {"encode": _encode_work(sizes, number, patches, prompts * workload.images)}
    if workload.task == "grpo":
        work["prefill"] = Work(2 * weights * prompt_tokens + pair * prefix_pairs + 2 * head * prompts, read)
        work["decode"] = _decode_work(sizes, number, prompt_tokens, num_completions, length, pair * completion_pairs)
        if workload.beta > 0:
            work["reference"] = Work(linear + attention, read)
    work["forward"] = Work(linear + attention + 2 * lora * row, read)
    # Backward: for frozen layers only the gradient of their inputs; for LoRA also the gradient of its weights.
    work["backward"] = Work(linear + 2 * attention + 4 * lora * row, read)
    # AdamW in float32 reads the weight, the gradient and two moments, and writes all of them except the gradient.
    work["optimizer"] = Work(12 * lora, 7 * 4 * lora)
    return work


def _decode_work(
    sizes: Sizes, number: int, prompt_tokens: int, num_completions: int, length: float, attention: float
) -> Work:
    """The work of decoding.

    The first token of a completion comes from the prefill. Every step reads all weights, the keys and values of each
    prompt once for its whole group, and those of each completion.

    Args:
        sizes: of the model.
        number: bytes per number.
        prompt_tokens: tokens of all prompts.
        num_completions: number of completions.
        length: tokens of one completion.
        attention: operations of the completions' attention.
    """
    steps = length - 1
    cache = 2 * sizes.kv_width * sizes.layers * number  # bytes of the keys and values of one token
    weights = sizes.layer_weights + sizes.head_weights
    read = steps * (number * weights + cache * (prompt_tokens + num_completions * length / 2))
    return Work(2 * weights * num_completions * steps + attention, read)


def _encode_work(sizes: Sizes, number: int, patches: int, images: int) -> Work:
    """The work of the vision tower; arguments as in `_decode_work`, with the numbers of all patches and images."""
    vision = sizes.vision
    # A patch attends to its image in the layers with full attention, and to its window in the others.
    seen = sum(patches / images if window is None else window for window in vision.windows)  # summed over layers
    linear = 2 * patches * (vision.patch_weights + vision.token_weights / vision.merged_patches)
    attention = 4 * vision.width * patches * seen
    return Work(linear + attention, number * (vision.patch_weights + vision.token_weights))
