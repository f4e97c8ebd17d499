"""GRPO modules for tests: settings by their fields' names alone, and rewards that a random model earns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_modules.grpo import GRPO
from lightning_modules.rl.grpo_settings import RolloutSettings, UpdateSettings
from lightning_modules.rl.loss_settings import AdvantageSettings, LossSettings
from lightning_modules.rl.rewards.reward_list import Reward, RewardList

GROUPS = {"rollout": RolloutSettings, "advantage": AdvantageSettings, "loss": LossSettings, "update": UpdateSettings}


def grouped(**settings: Any) -> dict[str, Any]:
    """{"kl_beta": 0.1, "seed": 3} -> {"loss": {"kl_beta": 0.1}, "seed": 3}: each into the group with such a field."""
    given = dict(settings)
    for group, kind in GROUPS.items():
        names = [field.name for field in fields(kind) if field.name in settings]
        if names:
            given[group] = {name: given.pop(name) for name in names}
    return given


def build_grpo(model: str, **settings: Any) -> GRPO:
    """`build_grpo("folder", kl_beta=0.1, group_size=4)`."""
    given = grouped(**settings)
    return GRPO(model, **given | {name: kind(**given[name]) for name, kind in GROUPS.items() if name in given})


def flat_reward(accuracy: float, failure: str | None = None) -> Reward:
    """A reward that is its accuracy."""
    return Reward(accuracy, {"accuracy": accuracy, "format": 0.0}, failure, accuracy, is_right=accuracy > 0.5)


def use_reward(monkeypatch: Any, function: Callable[..., Reward]) -> None:
    """Every GRPO module then scores with `function(text, answer, image sizes)`."""
    monkeypatch.setattr(RewardList, "score", by_text(function))


def by_text(function: Callable[..., Reward]) -> Callable[..., list[list[Reward]]]:
    """A `RewardList.score` that reads the texts alone."""

    def score(self: RewardList, items: Any, rollouts: Any, *_: Any) -> list[list[Reward]]:
        pairs = zip(items, rollouts, strict=True)
        return [[function(each.text, item.sample.answer, item.image_sizes) for each in group] for item, group in pairs]

    return score


def letters(text: str, *_: object) -> Reward:
    """An easy reward that a random model meets by chance: the share of characters that are letters."""
    return flat_reward(sum(character.isalpha() for character in text) / max(len(text), 1))


class Recorder(Callback):
    """Keeps every gradient, and what each accumulation window sampled and logged."""

    def __init__(self):
        self.gradients, self.records, self.metrics = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.policy.trainable_parameters()])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.window_is_open:
            return  # all batches of a window are sampled, and logged, with its last
        self.records += module.last_rollouts
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class RecordingEngine:
    """Passes rollouts on, and keeps them with their prompts."""

    def __init__(self, engine):
        self.engine, self.seen = engine, []

    def generate(self, request):
        rollouts = self.engine.generate(request)
        self.seen += zip(request.items, rollouts, strict=True)
        return rollouts

    def sync(self):
        self.engine.sync()

    def close(self):
        self.engine.close()
