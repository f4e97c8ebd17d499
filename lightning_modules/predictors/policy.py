"""The policy in this process as a `Predictor`, in training and afterwards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.metrics.predictions import Reply
from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.path_fingerprint import path_fingerprint
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.base import Decoding, Load, Show, split_chunks
from lightning_modules.predictors.encode_ahead import encode_ahead
from lightning_modules.predictors.own_generation import answer_by_own_settings
from lightning_modules.predictors.token_stream import Watch, show_tokens
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest
from lightning_modules.serving.generation_rules import rules

log = logging.getLogger(__name__)
# Number of batches of prompts that the engine gets at once. The engine prepares its weights once for all of them, and
# when an answer ends early, the next question takes its place in the batch. All these prompts are in memory together.
BATCHES_PER_CHUNK = 4


class PolicyPredictor:
    """Asks a Qwen2.5-VL with a rollout engine, or with its own generation settings (`decoding.generation` "model").

    Args:
        policy: the model. The first call of `identity` hashes its weights in memory; all ranks of a sharded policy must
            make this call together.
        engine: decodes the greedy answers.
        encoder: makes the prompts, and refuses samples beyond its limits.
        decoding: length of answers, and number of questions at a time.
        batches_per_chunk: a chunk has this many batches of `decoding.prompts_per_batch` questions.
    """

    def __init__(
        self,
        policy: QwenVL,
        engine: RolloutEngine,
        encoder: Encoder,
        decoding: Decoding,
        batches_per_chunk: int = BATCHES_PER_CHUNK,
    ) -> None:
        self.policy, self.engine, self.encoder, self.decoding = policy, engine, encoder, decoding
        self.box_format, self.answer_form = encoder.box_format, encoder.answer_form
        # With the model's own settings, one question is answered at a time, so no answer depends on another question.
        self.chunk_size = 1 if decoding.generation == "model" else batches_per_chunk * decoding.prompts_per_batch

    def identity(self) -> dict[str, Any]:
        """Everything that answers depend on except the question, as JSON-like data."""
        decoding = asdict(self.decoding) | rules(self.decoding.generation) | {"chunk_size": self.chunk_size}
        return {"policy": self._policy_key, "form": self.encoder.form(), "decoding": decoding}

    @cached_property
    def _policy_key(self) -> str:
        return policy_fingerprint(self.policy)  # reads all weights, so it is cached for all benchmarks

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """Yields one reply for each sample, chunk by chunk. If a question cannot be asked, the reply has the rule."""
        for chunk in encode_ahead(self.encoder, split_chunks(samples, self.chunk_size), load):
            items = []
            for sample, item in chunk:
                if isinstance(item, SampleError):
                    log.warning("counted as wrong: %s", item)
                    yield sample, Reply("", (), refused=item.rule)
                else:
                    items.append(item.to(self.policy.device))
            for item, rollout in zip(items, self._generate(items), strict=True):
                yield item.sample, _reply(item, rollout)

    def stream(self, loaded: LoadedSample, show: Show) -> Reply:
        """The reply to one question; `show` gets the text so far, again and again."""
        try:
            item = self.encoder.encode(loaded).to(self.policy.device)
        except SampleError as error:
            return Reply("", (), refused=error.rule)
        (rollout,) = self._generate([item], show_tokens(self.policy.tokenizer, show))
        return _reply(item, rollout)

    def _generate(self, items: Sequence[EncodedSample], watch: Watch | None = None) -> list[Rollout]:
        """One completion for each prompt."""
        length, batch = self.decoding.max_new_tokens, self.decoding.prompts_per_batch
        if self.decoding.generation == "model":
            return [answer_by_own_settings(self.policy, item, length, watch) for item in items]
        request = RolloutRequest.for_evaluation(items, length, batch, watch)
        return [rollout for (rollout,) in self.engine.generate(request)]


def _reply(item: EncodedSample, rollout: Rollout) -> Reply:
    return Reply(rollout.text, item.image_sizes, len(rollout.token_ids), rollout.finished)


def policy_fingerprint(policy: QwenVL) -> str:
    """Hash of the policy's initial weights and of all trained tensors."""
    digest = hashlib.sha256(path_fingerprint(policy.processor_path).encode())
    for name, tensor in policy.trained_tensors():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
