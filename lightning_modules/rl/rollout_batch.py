"""The data of sampled completions that GRPO keeps until it trains on the accumulation window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.encoding.encoder import Batch, EncodedSample
from lightning_modules.rollouts.base import Rollout

if TYPE_CHECKING:
    from lightning_modules.rl.loss_settings import Reduction


@dataclass
class PromptGroup:
    """The trained completions of one prompt: C of its G completions. Tensors are on the item's device.

    T is the number of tokens of a completion, F the width of an image feature.
    """

    item: EncodedSample
    features: Tensor | None  # [image tokens, F] from a frozen tower; None if images are encoded in each forward pass
    completions: list[Tensor]  # C tensors of token ids [T]
    advantages: Tensor  # [C]
    sampler_log_probs: list[Tensor]  # C tensors [T], from the engine that sampled
    # C tensors [T], from the trainer before the first update of the window, if needed
    old_log_probs: list[Tensor] | None = None
    absent_completions: int = 0  # number of sampled completions that give no gradient but count in the mean of the loss
    absent_tokens: int = 0  # their number of tokens, without those of masked completions

    @property
    def is_informative(self) -> bool:
        """Whether the group is informative: one of its completions has an advantage other than 0."""
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
    """A group for each prompt with at least one trained completion.

    Args:
        items: the P prompts.
        rollouts: P lists of G rollouts.
        advantages: [P, G].
        features: image features of a frozen tower, P tensors [image tokens, F]; None if the tower is trained.
        skip: bool for each prompt; True skips it.
        mask_truncated: skip completions without an end token.
        with_absent: count the skipped completions (`absent_count`); then groups without trained completions are
            returned too.
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


def trainable_by_batch(
    batches: Sequence[Batch],
    rollouts: Sequence[Sequence[Rollout]],
    advantages: Tensor,
    features: Sequence[Tensor] | None,
    skip: Sequence[bool],
    *settings: bool,
) -> list[list[PromptGroup]]:
    """`trainable_groups` of each batch; the other arguments are those of all batches together, in order."""
    by_batch, start = [], 0
    for batch in batches:
        own = slice(start, start := start + len(batch.items))
        known = None if features is None else features[own]
        by_batch.append(trainable_groups(batch.items, rollouts[own], advantages[own], known, skip[own], *settings))
    return by_batch


def absent_count(groups: Sequence[PromptGroup], reduction: Reduction) -> int:
    """The number that skipped completions add to the divisor of the loss."""
    return sum(group.absent_tokens if reduction == "token" else group.absent_completions for group in groups)


def by_completion(groups: Sequence[PromptGroup], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split `values` [tokens of all groups, concatenated in order] into C tensors [T] for each group."""
    lengths = [len(completion) for group in groups for completion in group.completions]
    split = iter(torch.cat(list(values)).split(lengths)) if lengths else iter(())
    return [[next(split) for _ in group.completions] for group in groups]
