"""Sampling G completions for each prompt. One small interface, and the engine that runs in this process.

Shapes: P prompts of a batch, G branches (completions of a prompt), A branches that go on, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import PromptItem
from lightning_modules.branch_cache import BranchCache, PrefixRecorder
from lightning_modules.qwen_vl import QwenVL

NO_MASK = {"full_attention": None}  # tells transformers to build none: prefill is causal, decoding masks for itself


@dataclass(frozen=True)
class RolloutSettings:
    """`greedy` takes the likeliest token; log-probabilities are at `temperature` all the same."""

    group_size: int
    temperature: float
    max_new_tokens: int
    greedy: bool = False
    batch_prompts: int = 32

    def __post_init__(self) -> None:
        for name in ("group_size", "temperature", "max_new_tokens", "batch_prompts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rollouts: {name}={getattr(self, name)} must be greater than 0")
        if self.greedy and self.group_size > 1:
            raise ValueError(
                f"rollouts: greedy={self.greedy} gives {self.group_size} equal completions; set group_size=1"
            )


@dataclass(frozen=True)
class Rollout:
    """One completion. `finished` is False if it was cut at the length limit; only then does no end token close it."""

    token_ids: Tensor  # [T] on the CPU, with the end token
    log_probs: Tensor  # [T] on the CPU, float32, under the tempered distribution without the banned tokens
    finished: bool
    text: str  # without special tokens


class RolloutEngine(Protocol):
    def generate(
        self,
        items: Sequence[PromptItem],
        settings: RolloutSettings,
        features: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]: ...


class NativeEngine:
    """Prefills each prompt once and decodes its branches over a shared prefix (`branch_cache`).

    `fold_adapter` decodes with LoRA folded into a temporary copy of the linear weights: fewer operations, and exact in
    float32; in bfloat16 the sum is rounded, as it is in any server that is given merged weights.
    """

    def __init__(self, policy: QwenVL, fold_adapter: bool = True) -> None:
        self.policy = policy
        self.fold_adapter = fold_adapter

    @torch.no_grad()  # not inference mode: the caller trains on the log-probabilities and features
    def generate(
        self,
        items: Sequence[PromptItem],
        settings: RolloutSettings,
        features: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """G rollouts for each item, in the order of `items`. `features` are the items' own, if already encoded.

        `generator` must be on the policy's device. `on_progress` hears how many prompts are complete.
        """
        model = self.policy.decoder(self.fold_adapter)
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))
        rollouts: list[list[Rollout]] = [[] for _ in items]
        for start in range(0, len(order), settings.batch_prompts):
            chosen = order[start : start + settings.batch_prompts]
            batch = [items[i] for i in chosen]
            images = self.policy.encode_images(batch) if features is None else [features[i] for i in chosen]
            for index, group in zip(
                chosen, self._generate_batch(model, batch, images, settings, generator), strict=True
            ):
                rollouts[index] = group
            if on_progress is not None:
                on_progress(start + len(chosen))
        return rollouts

    def _generate_batch(
        self,
        model: nn.Module,
        items: Sequence[PromptItem],
        features: Sequence[Tensor],
        settings: RolloutSettings,
        generator: torch.Generator | None,
    ) -> list[list[Rollout]]:
        group, limit = settings.group_size, settings.max_new_tokens
        hidden, cache = self._prefill(model, items, features, group, limit)
        hidden = hidden.repeat_interleave(group, dim=0)  # [P * G, D]
        first = torch.tensor([item.next_position for item in items], device=hidden.device).repeat_interleave(group)
        ends = torch.tensor(self.policy.eos_ids, device=hidden.device)
        tokens = torch.zeros(len(hidden), limit, dtype=torch.long, device=hidden.device)
        log_probs = torch.zeros(len(hidden), limit, device=hidden.device)
        lengths = torch.full((len(hidden),), limit, device=hidden.device)
        rows = torch.arange(len(hidden), device=hidden.device)  # [A] branches that go on
        for step in range(limit):
            chosen, scores = sample(model.lm_head(hidden), self.policy.banned, settings, generator)
            tokens[rows, step], log_probs[rows, step] = chosen, scores
            ended = torch.isin(chosen, ends)
            if ended.any():
                lengths[rows[ended]] = step + 1
                alive = (~ended).nonzero()[:, 0]
                rows, chosen = rows[alive], chosen[alive]
                cache.keep_rows(alive)
            if step + 1 == limit or len(rows) == 0:
                break
            hidden = self._step(model, chosen, first[rows] + step, cache)
        finished = torch.ones_like(lengths, dtype=torch.bool)
        finished[rows] = False
        return self._collect(tokens.cpu(), log_probs.cpu(), lengths.tolist(), finished.tolist(), group)

    def _prefill(
        self, model: nn.Module, items: Sequence[PromptItem], features: Sequence[Tensor], group: int, limit: int
    ) -> tuple[Tensor, BranchCache]:
        """Hidden state [P, D] of each prompt's last token, and the cache to decode from.

        Prompts are padded on the right, where causal attention never looks.
        """
        ids = pad_sequence([item.input_ids for item in items], batch_first=True)
        positions = pad_sequence([item.positions.T for item in items], batch_first=True).permute(2, 0, 1)
        slots = (ids == self.policy.image_token_id).flatten().nonzero()[:, 0]
        recorder = PrefixRecorder()
        hidden = model.model.language_model(
            inputs_embeds=self.policy.embed(model, ids, features, slots),
            position_ids=positions,
            attention_mask=NO_MASK,
            past_key_values=recorder,
        ).last_hidden_state
        lengths = torch.tensor([len(item.input_ids) for item in items], device=hidden.device)
        last = hidden[torch.arange(len(items), device=hidden.device), lengths - 1]
        return last, BranchCache(recorder, lengths, group, limit)

    @staticmethod
    def _step(model: nn.Module, tokens: Tensor, positions: Tensor, cache: BranchCache) -> Tensor:
        """Run one token of each active branch, tokens [A] at positions [A]; hidden states [A, D]."""
        hidden = model.model.language_model(
            input_ids=tokens[:, None],
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask=NO_MASK,
            past_key_values=cache,
        ).last_hidden_state
        cache.advance()
        return hidden[:, 0]

    def _collect(
        self, tokens: Tensor, log_probs: Tensor, lengths: list[int], finished: list[bool], group: int
    ) -> list[list[Rollout]]:
        ids = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        texts = self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scores = [row[:length] for row, length in zip(log_probs, lengths, strict=True)]
        flat = [Rollout(*fields) for fields in zip(ids, scores, finished, texts, strict=True)]
        return [flat[start : start + group] for start in range(0, len(flat), group)]


def sample(
    logits: Tensor, banned: Tensor, settings: RolloutSettings, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens [A] drawn from softmax(logits [A, V] / temperature) without banned tokens, and their log-probabilities."""
    logits = logits.float() / settings.temperature
    log_probs = logits.index_fill_(-1, banned, float("-inf")).log_softmax(-1)
    if settings.greedy:
        tokens = log_probs.argmax(-1)
    else:
        # By inversion: one random number a row, where torch.multinomial draws one for every entry of the vocabulary.
        # In float64, so that no sum over a large vocabulary rounds a likely token away; a banned one has no width.
        sums = log_probs.double().exp().cumsum(-1)
        draw = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)
        tokens = torch.searchsorted(sums, draw * sums[:, -1:], right=True)[:, 0]
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]
