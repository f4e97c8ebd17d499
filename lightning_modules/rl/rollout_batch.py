"""What GRPO keeps of a prompt's completions until its window is trained on, and of which prompts it keeps any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.rollouts.base import Rollout


@dataclass
class Group:
    """The completions of one prompt that are learnt from; C of its G. Tensors are on the item's device."""

    item: EncodedSample
    features: Tensor | None  # [image tokens, D] of a frozen tower; None when images are encoded at each forward pass
    completions: list[Tensor]  # C of token ids [T]
    advantages: Tensor  # [C]
    engine: list[Tensor]  # C of log-probabilities [T] that the engine sampled with
    old: list[Tensor] | None = None  # C of the same by the trainer, before the window's first update, where it is kept


def learnt_groups(
    items: Sequence[EncodedSample],
    rollouts: Sequence[Sequence[Rollout]],
    advantages: Tensor,
    features: Sequence[Tensor] | None,
    skip: Sequence[bool],
    mask_truncated: bool,
) -> list[Group]:
    """A group for each item of which something is learnt: not those of `skip`, and with `mask_truncated` only from
    completions that have an end. advantages [P, G]; `features` are those of a frozen tower."""
    groups = []
    for index, item in enumerate(items):
        kept = [k for k, rollout in enumerate(rollouts[index]) if rollout.finished or not mask_truncated]
        if kept and not skip[index]:
            device = item.input_ids.device
            groups.append(
                Group(
                    item=item,
                    features=None if features is None else features[index],
                    completions=[rollouts[index][k].token_ids.to(device) for k in kept],
                    advantages=advantages[index, kept].to(device),
                    engine=[rollouts[index][k].log_probs.to(device) for k in kept],
                )
            )
    return groups


def keep_old(groups: Sequence[Group], log_probs: Sequence[Tensor]) -> None:
    """Give each group its part of `log_probs`, which laid end to end are those of all tokens in the groups' order."""
    lengths = [len(completion) for group in groups for completion in group.completions]
    split = iter(torch.cat(list(log_probs)).split(lengths)) if lengths else iter(())
    for group in groups:
        group.old = [next(split) for _ in group.completions]
