"""What GRPO keeps of a prompt's completions until its accumulation window is trained on, and of which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.rollouts.base import Rollout


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
) -> list[PromptGroup]:
    """A group for each prompt of which anything is trained on.

    Args:
        items: the P prompts.
        rollouts: P lists of G.
        advantages: [P, G].
        features: image features of a frozen tower, P of [image tokens, D]; None where the tower is trained.
        skip: P; True leaves the prompt out.
        mask_truncated: leave completions out that have no end token.
    """
    groups = []
    for index, item in enumerate(items):
        kept = [k for k, rollout in enumerate(rollouts[index]) if rollout.finished or not mask_truncated]
        if kept and not skip[index]:
            device = item.input_ids.device
            groups.append(
                PromptGroup(
                    item=item,
                    features=None if features is None else features[index],
                    completions=[rollouts[index][k].token_ids.to(device) for k in kept],
                    advantages=advantages[index, kept].to(device),
                    sampler_log_probs=[rollouts[index][k].log_probs.to(device) for k in kept],
                )
            )
    return groups


def attach_old_log_probs(groups: Sequence[PromptGroup], log_probs: Sequence[Tensor]) -> None:
    """Give each group its part of `log_probs`: laid end to end they are those of all tokens, in the groups' order."""
    lengths = [len(completion) for group in groups for completion in group.completions]
    split = iter(torch.cat(list(log_probs)).split(lengths)) if lengths else iter(())
    for group in groups:
        group.old_log_probs = [next(split) for _ in group.completions]
