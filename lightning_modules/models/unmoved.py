"""Whether training has changed the policy at all: compares the merged model with the loaded one, in the precision in
which it is saved.

An adapter whose update rounds away in a bfloat16 weight has changed nothing that the next phase would read.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lightning_modules.models.fsdp import full_tensor
from lightning_modules.models.layers.lora import merged_weight
from lightning_modules.models.qwen_vl import QwenVL

CHUNK = 1 << 24  # numbers that are summed at a time: the sum makes a copy in int64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type by bytes of a number


def weight_marks(policy: QwenVL) -> dict[str, int]:
    """{name: checksum} of each trained tensor outside the adapter; ranks of a sharded policy call it together."""
    return {name: _mark(tensor) for name, tensor in policy.trained_tensors() if "lora_" not in name}


def is_unmoved(policy: QwenVL, start: dict[str, int]) -> bool:
    """True if every weight of the merged model equals the loaded weight.

    If the policy is sharded, all ranks call together. The first layer that the adapter has changed ends the search.

    Args:
        policy: after training.
        start: `weight_marks` after loading.
    """
    if any(not _leaves_weight_unchanged(layer) for layer in policy.model.modules() if isinstance(layer, LoraLinear)):
        return False
    return weight_marks(policy) == start


def _mark(tensor: Tensor) -> int:
    """The sum of a tensor's numbers, each read as the integer with the same bits: exact, unlike a sum of floats."""
    bits = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(CHUNK))


def _leaves_weight_unchanged(layer: LoraLinear) -> bool:
    """Whether the LoRA update is zero, or rounds away, in every number of the weight."""
    parameters = {id(p): nn.Parameter(full_tensor(p.detach()), requires_grad=False) for p in layer.parameters()}
    full = copy.deepcopy(layer, parameters)  # copies no tensor of a layer that is not sharded
    return torch.equal(merged_weight(full), full.get_base_layer().weight)
