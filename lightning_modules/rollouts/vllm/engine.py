"""Rollouts from running vLLM servers: completions with token ids and log-probabilities over the OpenAI API.

The servers have the frozen model. After each optimizer step, they load the adapter from a PEFT folder. Each version of
the adapter gets a new name, because under the old name a server would reuse prefix-cache blocks of the old weights.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.layers.lora import adapter_tensors, write_adapter
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest
from lightning_modules.rollouts.vllm.prompts import PromptWriter
from lightning_modules.rollouts.vllm.server_checks import (
    VLLMSettings,
    find_model,
    raise_if_down,
    read_choices,
    read_models,
    require_lora,
    require_processed_log_probs,
)
from lightning_modules.rollouts.vllm.server_pool import ServerPool
from lightning_modules.serving.generation_rules import SERVER_FIELDS
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointUnavailable,
    RequestRefused,
)

T = TypeVar("T")
UNLOAD_TIMEOUT = 30.0  # seconds; unloading is fast, and a hanging server must not delay an error
BAN = -100.0  # OpenAI's lowest bias; it is added to a logit before the division by the temperature


class VLLMEngine:
    """A `RolloutEngine` on vLLM servers.

    Until the first `sync`, the servers use the model without an adapter, because a new adapter has no effect. `sync` is
    called on every rank, after the same update. Rank 0 writes the adapter, loads it on all servers, and sends its name
    to the other ranks. `generate` is called by each rank independently. If a server does not know the current adapter,
    because it was dead or was restarted, it loads the adapter before it gets a prompt.

    Args:
        policy: the trained model, whose adapter is sent.
        settings: the servers.
        folder: folder for the adapters, unless the settings name another one.
        rank: rank of this process.
        broadcast: returns the value of rank 0 on every rank.
    """

    def __init__(
        self,
        policy: QwenVL,
        settings: VLLMSettings,
        folder: Path,
        rank: int = 0,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.policy, self.settings = policy, settings
        self.folder = Path(settings.adapters or folder).absolute()
        self.rank, self.broadcast = rank, broadcast
        self.adapter: Path | None = None  # the folder of its current state; servers know it by the folder's name
        self._prefix = f"policy-{uuid.uuid4().hex[:8]}-"  # prefix of adapter names; it is unique to this process
        self._count = 0
        self._needs: Mapping[str, int] = {}
        self._runner: asyncio.Runner | None = None
        self._pool: ServerPool | None = None
        self._models: dict[str, str] = {}  # server -> name of the model
        self._fit: set[str] = set()  # servers that have passed all checks
        self._given: set[str] = set()  # servers that have loaded an adapter of this run

    # Checks of a server

    def check(self, needs: Mapping[str, int]) -> None:
        """Wait until at least one server answers, and check the servers.

        Raises EndpointMisused for a server that cannot serve this run: another model, sequences shorter than one of
        `needs` (see `find_model`), no LoRA, or raw log-probabilities. A server that starts later is checked then.
        """
        self._needs = needs
        self._call(lambda pool: pool.prepare_all())

    async def _prepare(self, endpoint: ChatEndpoint) -> None:
        """Make sure that a server passes the checks, has the current adapter, and has no older adapter of this run."""
        url = endpoint.settings.base_url
        served = await endpoint.get("/models", read_models)
        known = self._own(served)
        if url not in self._fit or (url in self._given and not known):  # new, or started again
            self._fit.discard(url)
            model = find_model(url, served, self.settings.model, self._needs)
            if model != self._models.setdefault(url, model):
                raise EndpointMisused(
                    f"{url} serves {model!r} now, and {self._models[url]!r} before it was started again: start it with "
                    "the model that is trained"
                )
            await require_lora(endpoint)
            await require_processed_log_probs(endpoint, model, self.policy.eos_ids[0])
            self._fit.add(url)
        if self.adapter is not None and self.adapter.name not in known:
            await self._load(endpoint, self.adapter)
        if self.adapter is not None:
            self._given.add(url)
        if self.rank == 0:
            for name in known:
                if self.adapter is None or name != self.adapter.name:
                    await self._unload(endpoint, name)

    # The adapter

    def sync(self) -> None:
        """Load the present adapter on the servers. All ranks call this, and it ends in the same way on every rank."""
        tensors = adapter_tensors(self.policy.model)
        self._count += 1
        adapter = self.folder / f"{self._prefix}{self._count}"
        fault = None
        if self.rank == 0:
            try:
                self._publish(adapter, tensors)
            except Exception as error:  # sent to the other ranks, which would otherwise wait forever, and raised again
                fault = error
        adapter, message = self.broadcast((adapter, fault and f"{type(fault).__name__}: {fault}"))
        if fault is not None:
            raise fault
        if message is not None:
            raise RuntimeError(f"rank 0 could not give the servers the adapter: {message}")
        self.adapter = adapter

    def _publish(self, adapter: Path, tensors: dict[str, Tensor]) -> None:
        # left over from an earlier process of this phase that was killed
        if self.adapter is None and self.settings.adapters is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        old, self.adapter = self.adapter, adapter
        write_adapter(tensors, self.policy.model, adapter)
        self._call(lambda pool: pool.prepare_all())
        if old is not None:
            shutil.rmtree(old)

    def close(self) -> None:
        """Unload the run's adapters from all reachable servers, and remove their files.

        If a server fails to unload one, its error is raised after all other servers were asked.
        """
        if self.adapter is not None and self.rank == 0:
            self.adapter = None
            self._given.clear()
            try:
                self._call(lambda pool: pool.visit_all(self._unload_all, UNLOAD_TIMEOUT))
            finally:
                for folder in self.folder.glob(f"{self._prefix}*"):  # two folders if an update has failed
                    shutil.rmtree(folder)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._runner is not None:
            if self._pool is not None:
                self._runner.run(self._pool.close())
            self._runner.close()
            self._runner = self._pool = None

    async def _load(self, endpoint: ChatEndpoint, adapter: Path) -> None:
        try:
            await endpoint.post("/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter)})
        except (RequestRefused, EndpointMisused, EndpointUnavailable) as error:
            if isinstance(error, EndpointUnavailable):
                await raise_if_down(endpoint, error)
            if adapter.name in await endpoint.get("/models", read_models):  # another rank was faster
                return
            raise EndpointMisused(
                f"{endpoint.settings.base_url} does not load the adapter {adapter}: {error}. Does it see that "
                "folder, and is its --max-lora-rank large enough?"
            ) from error

    def _own(self, served: Iterable[str]) -> list[str]:
        """The names of this run's adapters among the names that a server knows."""
        return [name for name in served if name.startswith(self._prefix)]

    async def _unload_all(self, endpoint: ChatEndpoint) -> None:
        for name in self._own(await endpoint.get("/models", read_models)):
            await self._unload(endpoint, name)

    async def _unload(self, endpoint: ChatEndpoint, name: str) -> None:
        try:
            await endpoint.post("/unload_lora_adapter", {"lora_name": name})
        except (RequestRefused, EndpointMisused):
            if name in await endpoint.get("/models", read_models):
                raise
            # The adapter is already unloaded: the answer to an earlier attempt was lost, or the server was restarted.

    # Completions

    def generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        """G rollouts of each item. `request.features` is ignored, because the servers encode the images themselves.

        Greedy completions have log-probabilities at temperature 1.

        Raises:
            PromptMismatch: a server has read other prompt tokens than the trainer; the message names the sample.
            Exception: the errors of `ServerPool.run`.
        """
        seeds = request.seeds
        if seeds is None:
            device = None if request.generator is None else request.generator.device
            seeds = torch.randint(2**31, (len(request.items),), generator=request.generator, device=device).tolist()
        jobs = [(item.to("cpu"), seed % 2**31) for item, seed in zip(request.items, seeds, strict=True)]
        ask = partial(self._ask, writer=self._writer, request=request)
        return self._call(lambda pool: pool.run(jobs, ask))

    @cached_property
    def _writer(self) -> PromptWriter:
        return PromptWriter(self.policy.processor_path)

    async def _ask(
        self, endpoint: ChatEndpoint, job: tuple[EncodedSample, int], writer: PromptWriter, request: RolloutRequest
    ) -> list[Rollout]:
        item, seed = job
        sampling, banned = request.sampling, self.policy.banned_ids(request.ban)
        messages = await asyncio.to_thread(writer.messages, item)
        body = {
            "model": self.adapter.name if self.adapter else self._models[endpoint.settings.base_url],
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
        return [self._rollout(item, token_ids, log_probs, banned) for token_ids, log_probs in choices]

    def _rollout(
        self, item: EncodedSample, token_ids: list[int], log_probs: list[float], banned: Collection[int]
    ) -> Rollout:
        if wrong := sorted(set(token_ids) & set(banned)):
            raise ValueError(f"sample {item.sample.id!r}: the server sampled banned tokens {wrong}")
        text = self.policy.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Rollout(torch.tensor(token_ids), torch.tensor(log_probs), token_ids[-1] in self.policy.eos_ids, text)

    def _call(self, what: Callable[[ServerPool], Awaitable[T]]) -> T:
        """Run `what` on the pool, in the event loop of its connections. An error closes both."""
        if self._runner is None:
            self._runner = asyncio.Runner()

        async def run() -> T:
            if self._pool is None:
                waits = self.settings.patience, self.settings.pause, self.settings.look
                self._pool = ServerPool(self.settings.endpoints(), self._prepare, *waits)
            return await what(self._pool)

        try:
            return self._runner.run(run())
        except BaseException:
            self._disconnect()
            raise
