"""What GRPO keeps of a prompt's completions until its accumulation window is trained on, and of which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.rollouts.base import Rollout

if TYPE_CHECKING:
    from lightning_modules.rl.loss_settings import Reduction


@dataclass
class PromptGroup:
    """The completions of one prompt that are trained on: C of its G. Tensors are on the item's device.

    T is the number of tokens of a completion.
    """

    item: EncodedSample
    features: Tensor | None  # [image tokens, D] of a frozen tower; None when images are encoded at each forward pass
    completions: list[Tensor]  # C of token ids [T]
    advantages: Tensor  # [C]
    sampler_log_probs: list[Tensor]  # C of [T], by the engine that sampled
    old_log_probs: list[Tensor] | None = None  # C of [T], by the trainer before the window's first update, if kept
    absent_completions: int = 0  # that are not trained on, where the loss's mean is over all
    absent_tokens: int = 0  # of them, without those of masked completions

    @property
    def is_informative(self) -> bool:
        """Whether the group teaches a preference: a completion in it has an advantage other than 0."""
        return bool(self.advantages.any())


def trainable_groups(
    items: Sequence[EncodedSample],
    rollouts: Sequence[Sequence[Rollout]],
    advantages: Tensor,
    features: Sequence[Tensor] | None,
    skip: Sequence[bool],
    mask_truncated: bool,
    with_absent: bool = False,
) -> list[PromptGroup]:
    """A group for each prompt of which anything is trained on.

    Args:
        items: the P prompts.
        rollouts: P lists of G.
        advantages: [P, G].
        features: image features of a frozen tower, P of [image tokens, D]; None where the tower is trained.
        skip: P; True leaves the prompt out.
        mask_truncated: leave completions out that have no end token.
        with_absent: count completions that are left out, in groups of which nothing may be trained on (`absent_count`).
    """
    groups = []
    for index, item in enumerate(items):
        unmasked = [k for k, rollout in enumerate(rollouts[index]) if rollout.finished or not mask_truncated]
        kept = [] if skip[index] else unmasked
        if kept or with_absent:
            device = item.input_ids.device
            absent_tokens = sum(len(rollouts[index][k].token_ids) for k in unmasked) if skip[index] else 0
            groups.append(
                PromptGroup(
                    item=item,
                    features=None if features is None else features[index],
                    completions=[rollouts[index][k].token_ids.to(device) for k in kept],
                    advantages=advantages[index, kept].to(device),
                    sampler_log_probs=[rollouts[index][k].log_probs.to(device) for k in kept],
                    absent_completions=len(rollouts[index]) - len(kept) if with_absent else 0,
                    absent_tokens=absent_tokens if with_absent else 0,
                )
            )
    return groups


def absent_count(groups: Sequence[PromptGroup], reduction: Reduction) -> int:
    """What completions that are not trained on add to the number by which the loss is divided."""
    return sum(group.absent_tokens if reduction == "token" else group.absent_completions for group in groups)


def by_completion(groups: Sequence[PromptGroup], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each group C of [T]: its part of `values`, which laid end to end are of all tokens, in the groups' order."""
    lengths = [len(completion) for group in groups for completion in group.completions]
    split = iter(torch.cat(list(values)).split(lengths)) if lengths else iter(())
    return [[next(split) for _ in group.completions] for group in groups]
