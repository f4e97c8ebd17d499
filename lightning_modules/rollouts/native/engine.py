"""The rollout engine that samples in this process: prompts are read once, completions are decoded in place.

Shapes: P prompts, G completions of a prompt, A active completions, V vocabulary, T tokens, D hidden width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.kv_cache import CacheShape, PrefixRecorder
from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.inference.fastest import fastest_sampling_model
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest
from lightning_modules.rollouts.native.cuda_graphs import GraphedSteps
from lightning_modules.rollouts.native.decoder import CompletionDecoder, Decoded, Prefilled
from lightning_modules.rollouts.native.sampling import sample

PREFIX_STEP = 512  # number of tokens by which the GPU memory for prompts grows
log = logging.getLogger(__name__)


class NativeEngine:
    """Reads each prompt once and decodes its completions over the shared prefix (`decoder`, `kv_cache`).

    LoRA is merged into a copy of the linear weights. This needs fewer operations. In float32 it is exact; in bfloat16
    the sum is rounded, as in any server with merged weights.

    Args:
        policy: the model that samples.
        static: compute all rows in each step, with fixed shapes; on a GPU, as a CUDA graph. None means only on a GPU.
            With static steps, memory and weights are kept for the next call, because the captured graph refers to them.
    """

    def __init__(self, policy: QwenVL, static: bool | None = None) -> None:
        self.policy = policy
        self.static = static
        self._kept: tuple[tuple[object, ...], CompletionDecoder] | None = None

    def sync(self) -> None:
        """Does nothing: each call of `generate` reads the policy's weights."""

    def close(self) -> None:
        """Does nothing: the memory is freed with the engine."""

    @torch.no_grad()
    def generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        """G rollouts of each item, in the order of `request.items`."""
        # Inference mode does not track views and versions, which makes small operations 10 % faster. It is not used if
        # memory is kept for the next call, nor around the collective operations of a sharded policy.
        without_records = not self._is_static() and self.policy.sharded is None
        with self.policy.gathered(), torch.inference_mode(without_records):
            rollouts = self._generate(request) if request.items else []
        if self.policy.sharded is not None:
            self._kept = None  # a full copy of sharded weights would need too much memory in a training step
        return rollouts

    def _generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        items, sampling, seeds = request.items, request.sampling, request.seeds
        # Prompts of similar length are read together, so that there is little padding.
        order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))
        if seeds is None and not request.greedy:
            device = request.generator.device if request.generator is not None else "cpu"
            seeds = torch.randint(1 << 62, (len(items),), generator=request.generator, device=device).tolist()

        def draw(number: int) -> Tensor:
            """All random numbers of the prompt at this index of `order`, [G, max_new_tokens]."""
            own = torch.Generator().manual_seed(seeds[order[number]])
            return torch.rand(sampling.group_size, sampling.max_new_tokens, dtype=torch.float64, generator=own)

        def prefill(start: int, stop: int) -> Prefilled:
            """Read the prompts at these indices of `order`."""
            batch, known = [items[i] for i in order[start:stop]], request.features
            images = self.policy.encode_images(batch) if known is None else [known[i] for i in order[start:stop]]
            return self._prefill(decoder.model, batch, images)

        rollouts: list[list[Rollout]] = [[] for _ in items]
        decoder = self._decoder(request, max(len(item.input_ids) for item in items))
        random = None if request.greedy else draw
        for decoded in decoder.decode(len(items), prefill, sampling.max_new_tokens, random, request.watch):
            for group in decoded:
                rollouts[order[group.number]] = self._rollouts(group)
        return rollouts

    def _decoder(self, request: RolloutRequest, longest_prompt: int) -> CompletionDecoder:
        """A new decoder. On a GPU, the last decoder if it is large enough, with updated weights."""
        policy, static, sampling, greedy = self.policy, self._is_static(), request.sampling, request.greedy
        slots, longest = min(sampling.prompts_per_batch, len(request.items)), sampling.max_new_tokens
        # another address means that the policy was moved
        weights = policy.base.get_input_embeddings().weight.data_ptr()
        banned = policy.banned_tokens(request.ban)
        # the policy is not sharded yet in rejection sampling
        of_policy = (weights, banned.data_ptr(), policy.sharded is None)
        needs = (*of_policy, slots, sampling.group_size, sampling.temperature, greedy)
        if self._kept is not None and self._kept[0] == needs:
            decoder = self._kept[1]
            if decoder.room.prefix_tokens >= longest_prompt and decoder.room.completion_tokens >= longest:
                decoder.model.refresh(policy.base)
                return decoder
        self._kept = None  # its memory is freed before new memory is requested
        if static:  # so that slightly longer prompts need no new memory
            longest_prompt = -(-longest_prompt // PREFIX_STEP) * PREFIX_STEP

        def choose(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            return sample(logits, banned, sampling.temperature, None if greedy else draws)

        room = CacheShape(slots, sampling.group_size, longest_prompt, longest)
        decoder = CompletionDecoder(fastest_sampling_model(policy, static), choose, policy.eos_ids, room, static)
        if static:
            self._kept = needs, decoder
        if policy.device.type == "cuda" and static:
            decoder.run_static = GraphedSteps(decoder)
        elif static:
            log.info("no CUDA device: decoding at fixed shapes without CUDA graphs")
        return decoder

    def _is_static(self) -> bool:
        return self.policy.device.type == "cuda" if self.static is None else self.static

    def _prefill(self, model: SamplingModel, items: Sequence[EncodedSample], features: Sequence[Tensor]) -> Prefilled:
        """Run the prefill. Prompts are padded on the right, where causal attention ignores the padding."""
        ids = pad_sequence([item.input_ids for item in items], batch_first=True)
        positions = pad_sequence([item.positions.T for item in items], batch_first=True)
        positions = rearrange(positions, "prompts tokens axes -> axes prompts tokens")
        placeholders = (ids == self.policy.image_token_id).flatten().nonzero()[:, 0]
        recorder = PrefixRecorder()
        embeddings = self.policy.embed(model, ids, features, placeholders)
        hidden = model.hidden_states(recorder, positions, embeddings)
        lengths = torch.tensor([len(item.input_ids) for item in items], device=hidden.device)
        last = hidden[torch.arange(len(items), device=hidden.device), lengths - 1]
        next_positions = torch.tensor([item.next_position for item in items], device=hidden.device)
        return Prefilled(last, lengths, next_positions, recorder)

    def _rollouts(self, group: Decoded) -> list[Rollout]:
        texts = self.policy.tokenizer.batch_decode(
            group.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        with torch.inference_mode(False):  # copies outside inference mode, because training needs them
            tokens, log_probs = ([t.clone() for t in of_group] for of_group in (group.tokens, group.log_probs))
        return [Rollout(*fields) for fields in zip(tokens, log_probs, group.finished, texts, strict=True)]
