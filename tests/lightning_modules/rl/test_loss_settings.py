"""Settings of the loss that cannot work together are refused in words."""

from __future__ import annotations

import pytest

from datamodules.persistence.problems import collect_problems
from lightning_modules.rl.grpo_settings import UpdateSettings
from lightning_modules.rl.loss_settings import AdvantageSettings, EntropySettings, LossSettings, ScheduleSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "loss.objective='ppo' must be one of 'clip', 'cispo', 'sapo'"),
        ({"ratio": "completion"}, "loss.ratio='completion' must be one of 'token', 'sequence'"),
        ({"kl_estimator": "k4"}, "loss.kl_estimator='k4' must be one of 'k1', 'k2', 'k3'"),
        ({"kl_in": "advantage"}, "loss.kl_in='advantage' must be one of 'loss', 'reward'"),
        ({"normalise_over": "some"}, "loss.normalise_over='some' must be one of 'kept', 'all'"),
        (
            {"objective": "sapo"},
            "loss.objective='sapo', loss.clip_low=0.2, loss.clip_high=0.2: SAPO has a gate in place of the clip; set "
            "both to null",
        ),
        (
            {"objective": "cispo", "clip_high": None},
            "loss.objective='cispo', loss.clip_high=None: CISPO needs the upper bound of its weights",
        ),
        (
            {"objective": "cispo", "ratio": "sequence"},
            "loss.objective='cispo', loss.ratio='sequence': only objective='clip' has a ratio by sequence",
        ),
        ({"dual_clip": 1.1}, "loss.dual_clip=1.1, loss.objective='clip' must be greater than 1 + clip_high"),
        (
            {"kl_in": "reward", "kl_unbiased": True},
            "loss.kl_unbiased=True, loss.kl_in='reward': a reward is not differentiated, so there is nothing to "
            "correct",
        ),
        (
            {"kl_beta": 0.0, "reference_every": 10},
            "loss.reference_every=10, loss.kl_beta=0.0: without a KL term there is no reference",
        ),
        ({"sapo_temperature_neg": 0}, "loss.sapo_temperature_neg=0 must be greater than 0"),
        ({"kl_schedule": ScheduleSettings("step")}, "loss.kl_schedule.kind='step' must be one of"),
        ({"kl_schedule": ScheduleSettings("linear", -1)}, "loss.kl_schedule.final=-1 must not be negative"),
        ({"entropy": EntropySettings(-0.1)}, "loss.entropy.coefficient=-0.1 must not be negative"),
        (
            {"entropy": EntropySettings(0.5, target=1.0, highest=0.1)},
            "loss.entropy.lowest=0.0, loss.entropy.coefficient=0.5, loss.entropy.highest=0.1 must be 0 <= lowest <= "
            "coefficient <= highest",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(settings: dict, message: str) -> None:
    with collect_problems() as problems:
        LossSettings(**settings)
    assert len(problems) == 1 and problems[0].startswith(message)


def test_bounds_of_the_sampler_correction_and_the_scale_of_advantages() -> None:
    with collect_problems() as problems:
        UpdateSettings(importance_floor=0.5)
        UpdateSettings(importance_cap=2.0, importance_mode="sequence_clip")
        AdvantageSettings("batch")
    assert [problem.split(" must ")[0] for problem in problems] == [
        "update.importance_floor=0.5, update.importance_cap=None",
        "update.importance_mode='sequence_clip'",
        "advantage.scale='batch'",
    ]


def test_a_term_whose_weight_rises_from_0_needs_the_reference() -> None:
    assert not LossSettings(kl_beta=0.0).has_kl
    assert LossSettings(kl_beta=0.0, kl_schedule=ScheduleSettings("linear", 0.01), reference_every=5).has_kl
    assert not LossSettings(kl_beta=0.0, kl_schedule=ScheduleSettings("constant", 0.01)).has_kl
