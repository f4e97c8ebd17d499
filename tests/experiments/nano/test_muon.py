"""Muon in float32 against torch's own (whose rounding is bfloat16's) and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.nano.muon import Muon, orthogonalise

SHAPES = ((8, 8), (6, 17), (17, 6), (32, 128), (1, 5))


def random_matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonalised_by_svd(matrix: Tensor) -> Tensor:
    """The five quintic steps on the singular values alone, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_only_singular_values_change_and_become_about_one(shape: tuple[int, int]) -> None:
    matrix = random_matrix(shape)
    result = orthogonalise(matrix)
    torch.testing.assert_close(result.double(), orthogonalised_by_svd(matrix), atol=1e-4, rtol=0)
    values = torch.linalg.svdvals(result)
    if shape != (8, 8):  # a square random matrix has a singular value near zero, which five steps do not lift to one
        assert values.min() > 0.65 and values.max() < 1.25


def test_the_scale_of_a_matrix_does_not_count_and_zero_stays_zero() -> None:
    matrix = random_matrix((6, 17))
    torch.testing.assert_close(orthogonalise(matrix * 1e4), orthogonalise(matrix), atol=1e-4, rtol=0)
    assert orthogonalise(torch.zeros(3, 4)).abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """A step moves each entry by about 0.2 of the learning rate; bfloat16 has three digits."""
    rate = 0.1
    ours, theirs = (torch.nn.Parameter(random_matrix(shape, 1)) for _ in range(2))
    options = {"lr": rate, "momentum": 0.95, "weight_decay": 0.01}
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        before = ours.detach().clone()
        ours.grad, theirs.grad = (random_matrix(shape, 10 + step) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
        moved = (ours - before).norm()
        assert moved > 0
        assert (ours - theirs).norm() < 0.03 * moved * (step + 1)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = torch.nn.Parameter(random_matrix((3, 4)))
    Muon([parameter]).step()
    assert torch.equal(parameter, random_matrix((3, 4)))


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        Muon([torch.nn.Parameter(random_matrix((3, 4)))]).step(lambda: 0.0)


def test_state_survives_saving() -> None:
    def steps(parameter: Tensor, optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            parameter.grad = random_matrix((5, 9), number)
            optimizer.step()

    straight, halted = (torch.nn.Parameter(random_matrix((5, 9), 99)) for _ in range(2))
    steps(straight, Muon([straight], lr=0.01), range(4))
    first = Muon([halted], lr=0.01)
    steps(halted, first, range(2))
    second = Muon([halted], lr=0.5)
    second.load_state_dict(first.state_dict())
    steps(halted, second, range(2, 4))
    assert torch.equal(straight, halted)
