"""Muon (Jordan et al., 2024) in float32, for training the nano base model on a CPU.

`torch.optim.Muon` orthogonalises in bfloat16, which a CPU without bfloat16 units must emulate: on two AVX2 cores that
took 5.4 of the 5.6 seconds of a step. Here the update and the scale of the learning rate (`match_rms_adamw`) are the
same, but in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Coefficients of the quintic Newton-Schulz iteration, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix of a matrix [m, n]: all singular values become 0.7 to 1.2."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller side first: `gram` is then small
    x = x / x.norm().clamp(min=1e-7)  # singular values at most 1, which the iteration needs
    for _ in range(_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(Optimizer):
    """Muon: the Nesterov momentum of a matrix [m, n], orthogonalised and multiplied by 0.2·sqrt(max(m, n)).

    With this factor, updates have the size of AdamW's, so both can use the same learning rate.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all parameters that have a gradient. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))  # Nesterov: look ahead
                parameter.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled weight decay, as in AdamW
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
