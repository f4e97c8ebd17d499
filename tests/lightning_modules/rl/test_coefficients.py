"""Schedules and the entropy controller against values that are written out."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.rl.coefficients import EntropyController, scheduled
from lightning_modules.rl.loss_settings import EntropySettings, ScheduleSettings
from lightning_modules.rl.losses import LossTerms


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.04] * 6),
        ("linear", [0.04, 0.03, 0.02, 0.01, 0.0, 0.0]),
        ("cosine", [0.02 + 0.02 * math.cos(math.pi * u / 4) for u in range(5)] + [0.0]),
    ],
)
def test_a_schedule_goes_from_its_start_to_its_end_and_stays(kind: str, expected: list[float]) -> None:
    for schedule, planned in ((ScheduleSettings(kind), 4), (ScheduleSettings(kind, updates=4), 1000)):
        assert [scheduled(0.04, schedule, u, planned) for u in range(6)] == pytest.approx(expected)


def test_a_schedule_can_rise() -> None:
    assert scheduled(0.0, ScheduleSettings("linear", final=0.1), 5, 10) == pytest.approx(0.05)


def row(entropy_sum: float, tokens: int) -> LossTerms:
    return LossTerms(torch.tensor(0.0), 1.0, tokens, 0.0, 0.0, entropy_sum)


def test_the_controller_pays_below_its_target_only_and_moves_by_steps() -> None:
    settings = EntropySettings(coefficient=0.01, target=0.5, step=0.004, lowest=0.0, highest=0.016)
    controller, value, paid = EntropyController(settings), 0.01, 0.0
    for entropy in (0.4, 0.3, 0.45, 0.5, 0.9, 0.8, 0.7, 0.6, 0.55, 0.2):
        assert controller.coefficient == pytest.approx(paid)
        controller.add(row(entropy * 6, 6))
        controller.add(row(entropy * 2, 2))
        controller.end_update(*controller.take_sums())
        value = min(value + 0.004, 0.016) if entropy <= 0.5 else max(value - 0.004, 0.0)
        paid = value if entropy <= 0.5 else 0.0
    assert controller.coefficient == pytest.approx(0.004)


def test_without_a_target_the_coefficient_stays_and_an_update_of_nothing_moves_none() -> None:
    fixed = EntropyController(EntropySettings(coefficient=0.02))
    fixed.add(row(3.0, 2))
    fixed.end_update(*fixed.take_sums())
    assert fixed.coefficient == 0.02
    controller = EntropyController(EntropySettings(coefficient=0.02, target=1.0))
    before = controller.state_dict()
    controller.end_update(*controller.take_sums())
    assert controller.state_dict() == before


def test_a_resumed_controller_goes_on_and_drops_the_open_window() -> None:
    settings = EntropySettings(coefficient=0.0, target=0.5)
    whole, killed, resumed = (EntropyController(settings) for _ in range(3))
    for controller in (whole, killed):
        controller.add(row(0.8, 2))
        controller.end_update(*controller.take_sums())
    killed.add(row(100.0, 2))  # of a window that is trained on again
    resumed.load_state_dict(killed.state_dict())
    for controller in (whole, resumed):
        controller.add(row(0.2, 2))
        controller.end_update(*controller.take_sums())
    assert whole.state_dict() == resumed.state_dict() and whole.coefficient == pytest.approx(0.01)
