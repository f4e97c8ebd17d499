"""One prompt at a vLLM server: the request, and its answer as rollouts."""

from __future__ import annotations

import asyncio
from functools import cached_property, partial

import torch

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest
from lightning_modules.rollouts.vllm.prompts import PromptWriter
from lightning_modules.rollouts.vllm.server_checks import read_choices
from lightning_modules.serving.generation_rules import SERVER_FIELDS
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointUnavailable, RequestRefused

BAN = -100.0  # OpenAI's lowest bias; it is added to a logit before the division by the temperature


class Completions:
    """Asks for the completions of single prompts.

    Args:
        policy: its tokens; the weights are the server's.
    """

    def __init__(self, policy: QwenVL) -> None:
        self.policy = policy

    @cached_property
    def _writer(self) -> PromptWriter:
        return PromptWriter(self.policy.processor_path)

    async def ask(
        self, endpoint: ChatEndpoint, model: str, item: EncodedSample, seed: int, request: RolloutRequest
    ) -> list[Rollout]:
        """G rollouts of `item`.

        Args:
            endpoint: the server.
            model: name of the adapter, or of the model without one.
            item: the prompt, on the CPU.
            seed: of its completions.
            request: everything else; its items are not read.
        """
        sampling, banned = request.sampling, self.policy.banned_ids(request.ban)
        messages = await asyncio.to_thread(self._writer.messages, item)
        body = {
            "model": model,
            "messages": messages,
            "n": sampling.group_size,
            "temperature": 0.0 if request.greedy else sampling.temperature,
            "max_completion_tokens": sampling.max_new_tokens,
            "seed": seed,
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(self.policy.eos_ids),
            "logit_bias": {str(token): BAN for token in banned},
        }
        try:
            vocabulary = range(self.policy.base.config.text_config.vocab_size)
            read = partial(read_choices, item=item, sampling=sampling, ends=self.policy.eos_ids, vocabulary=vocabulary)
            choices = await endpoint.post("/chat/completions", body | SERVER_FIELDS, read)
        except RequestRefused as error:
            raise RequestRefused(f"sample {item.sample.id!r}: {endpoint.settings.base_url}: {error}") from error
        except EndpointUnavailable as error:
            raise EndpointUnavailable(f"sample {item.sample.id!r}: {error}", error.status) from error
        return [self._rollout(item, token_ids, log_probs, set(banned)) for token_ids, log_probs in choices]

    def _rollout(self, item: EncodedSample, token_ids: list[int], log_probs: list[float], banned: set[int]) -> Rollout:
        if wrong := sorted(set(token_ids) & banned):
            raise ValueError(f"sample {item.sample.id!r}: the server sampled banned tokens {wrong}")
        text = self.policy.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Rollout(torch.tensor(token_ids), torch.tensor(log_probs), token_ids[-1] in self.policy.eos_ids, text)
