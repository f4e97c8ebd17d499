"""What GRPO keeps of a prompt's completions until its window is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from datamodules.batches import PromptItem
from lightning_modules.rollouts import Rollout


@dataclass
class Group:
    """The completions of one prompt that are learnt from; C of its G. Tensors are on the item's device."""

    item: PromptItem
    features: Tensor | None  # [image tokens, D] of a frozen tower; None when images are encoded at each forward pass
    completions: list[Tensor]  # C of token ids [T]
    advantages: Tensor  # [C]
    engine: list[Tensor]  # C of log-probabilities [T] that the engine sampled with
    old: list[Tensor] | None = None  # C of the same by the trainer, before the window's first update, where it is kept


def group_of(item: PromptItem, features: Tensor | None, rollouts: Sequence[Rollout], advantages: Tensor) -> Group:
    device = item.input_ids.device
    return Group(
        item=item,
        features=features,
        completions=[rollout.token_ids.to(device) for rollout in rollouts],
        advantages=advantages.to(device),
        engine=[rollout.log_probs.to(device) for rollout in rollouts],
    )
