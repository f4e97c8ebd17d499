"""Whether training has changed a policy at all: as its merged model would be written, in the precision of its weights.

An adapter whose product rounds away in a bfloat16 weight has changed nothing that the next phase would read.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lightning_modules.models.fsdp import whole
from lightning_modules.models.layers.lora import merged_weight
from lightning_modules.models.qwen_vl import QwenVL

CHUNK = 1 << 24  # numbers that are summed at a time
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def weight_marks(policy: QwenVL) -> dict[str, int]:
    """A checksum of each trained tensor that is no adapter's, by name; ranks of a divided policy call it together."""
    return {name: _mark(tensor) for name, tensor in policy.trained_tensors() if "lora_" not in name}


def is_unmoved(policy: QwenVL, start: dict[str, int]) -> bool:
    """True if every weight of the merged model equals the loaded weight. `start`: `weight_marks` after loading.

    Ranks of a divided policy call it together. The first layer whose adapter shows in its weight ends the search.
    """
    if any(not _leaves_weight_unchanged(layer) for layer in policy.model.modules() if isinstance(layer, LoraLinear)):
        return False
    return weight_marks(policy) == start


def _mark(tensor: Tensor) -> int:
    """The sum of a tensor's numbers, each read as the integer that its bits are: exact, unlike a sum of floats."""
    bits = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(CHUNK))


def _leaves_weight_unchanged(layer: LoraLinear) -> bool:
    gathered = {
        id(parameter): nn.Parameter(whole(parameter.detach()), requires_grad=False) for parameter in layer.parameters()
    }
    undivided = copy.deepcopy(layer, gathered)  # no tensor of an undivided layer is copied
    return torch.equal(merged_weight(undivided), undivided.get_base_layer().weight)
