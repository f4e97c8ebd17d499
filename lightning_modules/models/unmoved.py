"""Check whether training has changed the policy: compare the merged model with the loaded model, in the saved
precision.

If the update of an adapter is lost by rounding to bfloat16, the next phase would read unchanged weights.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lightning_modules.models.fsdp import full_tensor
from lightning_modules.models.layers.lora import merged_weight
from lightning_modules.models.qwen_vl import QwenVL

CHUNK = 1 << 24  # number of elements that are summed at a time, because the sum makes a copy in int64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes per number -> integer type


def weight_marks(policy: QwenVL) -> dict[str, int]:
    """{name: checksum} of each trained tensor outside the adapter; ranks of a sharded policy call it together."""
    return {name: _mark(tensor) for name, tensor in policy.trained_tensors() if "lora_" not in name}


def is_unmoved(policy: QwenVL, start: dict[str, int]) -> bool:
    """True if every weight of the merged model equals the loaded weight.

    If the policy is sharded, all ranks call together. The search stops at the first changed layer.

    Args:
        policy: the policy after training.
        start: `weight_marks` after loading.
    """
    if any(not _leaves_weight_unchanged(layer) for layer in policy.model.modules() if isinstance(layer, LoraLinear)):
        return False
    return weight_marks(policy) == start


def _mark(tensor: Tensor) -> int:
    """The sum of a tensor's numbers, where each number is read as the integer with the same bits.

    It is exact, unlike a sum of floats.
    """
    bits = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(CHUNK))


def _leaves_weight_unchanged(layer: LoraLinear) -> bool:
    """Whether the LoRA update is zero, or lost by rounding, in every element of the weight."""
    parameters = {id(p): nn.Parameter(full_tensor(p.detach()), requires_grad=False) for p in layer.parameters()}
    full = copy.deepcopy(layer, parameters)  # this copies no tensors if the layer is not sharded
    return torch.equal(merged_weight(full), full.get_base_layer().weight)
