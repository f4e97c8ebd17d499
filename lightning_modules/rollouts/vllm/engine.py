"""Rollouts from running vLLM servers: completions with token ids and log-probabilities over the OpenAI API.

The servers have the frozen model. After each optimizer step, they load the adapter from a PEFT folder. Each version of
the adapter gets a new name, because under the old name a server would reuse prefix-cache blocks of the old weights.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.files import storage_error
from datamodules.persistence.user_error import UserError
from lightning_modules.models.layers.lora import ADAPTER_FILE, adapter_tensors, write_adapter
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest
from lightning_modules.rollouts.vllm.completions import Completions
from lightning_modules.rollouts.vllm.server_checks import (
    VLLMSettings,
    find_model,
    raise_if_down,
    read_models,
    require_lora,
    require_processed_log_probs,
)
from lightning_modules.rollouts.vllm.server_pool import ServerPool
from lightning_modules.serving.background_loop import BackgroundLoop
from lightning_modules.serving.openai_client import (
    ChatEndpoint,
    EndpointMisused,
    EndpointUnavailable,
    RequestRefused,
)

T = TypeVar("T")
UNLOAD_TIMEOUT = 30.0  # seconds; unloading is fast, and a hanging server must not delay an error


class AdapterNotGiven(UserError, RuntimeError):
    """Another rank could not give the servers the adapter; its own error has the details."""


class VLLMEngine:
    """A `RolloutEngine` on vLLM servers.

    Until the first `sync`, the servers use the model without an adapter, because a new adapter has no effect. `sync` is
    called on every rank, after the same update. Rank 0 writes the adapter, loads it on all servers, and sends its name
    to the other ranks. `generate` is called by each rank independently. If a server does not know the current adapter,
    because it was dead or was restarted, it loads the adapter before it gets a prompt.

    Servers are asked in a thread. With `staleness`, prompts are submitted ahead, and `sync` does not wait for them:
    they are answered with the adapter from the time when they were submitted, one submission after the other. So
    `staleness` older adapters are kept.

    Args:
        policy: the trained model, whose adapter is sent.
        settings: the servers.
        folder: folder for the adapters, unless the settings name another one.
        rank: rank of this process.
        broadcast: returns the value of rank 0 on every rank.
        staleness: largest number of accumulation windows that are submitted ahead; 0 submits none.
    """

    def __init__(
        self,
        policy: QwenVL,
        settings: VLLMSettings,
        folder: Path,
        rank: int = 0,
        broadcast: Callable[[Any], Any] = lambda value: value,
        staleness: int = 0,
    ) -> None:
        self.policy, self.settings, self.staleness = policy, settings, staleness
        self.folder = Path(settings.adapters or folder).absolute()
        self.rank, self.broadcast = rank, broadcast
        self._completions = Completions(policy)
        self.adapter: Path | None = None  # the folder of its current state; servers know it by the folder's name
        self._older: list[Path] = []  # adapters before it that may still be needed
        self._known: list[Path] = []  # both, when the running call was submitted; it uses the last one
        self._prefix = f"policy-{uuid.uuid4().hex[:8]}-"  # of adapter names; unique to this run, from rank 0
        self._count = 0
        self._needs: Mapping[str, int] = {}
        self._loop: BackgroundLoop | None = None
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
        """Make sure that a server passes the checks, has the adapter of the running call, and none that is outdated."""
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
        if not self._known:
            return
        if self._known[-1].name not in known:
            await self._load(endpoint, self._known[-1])
        self._given.add(url)
        if self.rank == 0:
            for name in known:
                # Another rank may be at a later call, and have loaded a newer one.
                if _number(name) < _number(self._known[0].name):
                    await self._unload(endpoint, name)

    # The adapter

    def sync(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Load an adapter on the servers. All ranks call this, and it ends in the same way on every rank.

        Without staleness it is loaded now; with staleness, when its first prompts come, because a server still answers
        prompts of an older one.

        Args:
            tensors: the adapter, from `tensors`; None takes the policy's present one.
        """
        tensors = adapter_tensors(self.policy.model) if tensors is None else tensors
        self._count += 1
        adapter = self.folder / f"{self._prefix}{self._count}"
        fault = None
        if self.rank == 0:
            try:
                self._publish(adapter, tensors)
            except Exception as error:  # sent to the other ranks, which would otherwise wait forever, and raised again
                fault = error
        told = self.broadcast((self._prefix, adapter, fault and f"{type(fault).__name__}: {fault}"))
        if fault is not None:
            raise fault
        self._prefix, adapter, message = told
        if message is not None:
            raise AdapterNotGiven(f"rank 0 could not give the servers the adapter: {message}")
        if self.rank != 0:
            self._use(adapter)

    def _publish(self, adapter: Path, tensors: dict[str, Tensor]) -> None:
        # left over from an earlier process of this phase that was killed
        if self.adapter is None and self.settings.adapters is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        outdated = self._use(adapter)
        try:
            write_adapter(tensors, self.policy.model, adapter)
        except (OSError, SafetensorError) as error:
            raise storage_error(error, adapter) from error
        if self.staleness == 0:
            self._call(lambda pool: pool.prepare_all())
        for folder in outdated:
            shutil.rmtree(folder)

    def _use(self, adapter: Path) -> list[Path]:
        """Take this adapter from now on. Returns those that are no longer needed."""
        known = [*self._older, *([] if self.adapter is None else [self.adapter]), adapter]
        self.adapter, self._older = adapter, known[-1 - self.staleness : -1]
        return known[: -1 - self.staleness]

    def tensors(self, adapter: Path) -> dict[str, Tensor]:
        """An adapter that is still needed, read from its folder. On rank 0 alone, whose disk has it."""
        return load_file(adapter / ADAPTER_FILE) if self.rank == 0 else {}

    def close(self) -> None:
        """Unload the run's adapters from all reachable servers, and remove their files.

        If a server fails to unload one, its error is raised after all other servers were asked.
        """
        self._disconnect()  # nobody waits for requests that were submitted and not fetched
        if self.adapter is not None and self.rank == 0:
            self.adapter, self._older = None, []
            self._given.clear()
            try:
                self._call(lambda pool: pool.visit_all(self._unload_all, UNLOAD_TIMEOUT))
            finally:
                for folder in self.folder.glob(f"{self._prefix}*"):  # two folders if an update has failed
                    shutil.rmtree(folder)
        self._disconnect()

    def _disconnect(self) -> None:
        """Cancel all submitted requests, and close the connections."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(self._close_pool)

    async def _close_pool(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        self._pool = None

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
        """G rollouts of each item. `request.features` is ignored, because the servers encode the images themselves."""
        return self.fetch(self.submit(request))

    def submit(self, request: RolloutRequest) -> Future[list[list[Rollout]]]:
        """Begin to sample with the present adapter; `fetch` gives the rollouts.

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
        name = self.adapter.name if self.adapter is not None else None

        async def ask(endpoint: ChatEndpoint, job: tuple[EncodedSample, int]) -> list[Rollout]:
            model = name or self._models[endpoint.settings.base_url]
            return await self._completions.ask(endpoint, model, *job, request)

        return self._begin(lambda pool: pool.run(jobs, ask))

    def _call(self, what: Callable[[ServerPool], Awaitable[T]]) -> T:
        """Run `what` on the pool, behind everything that was submitted before."""
        return self.fetch(self._begin(what))

    def _begin(self, what: Callable[[ServerPool], Awaitable[T]]) -> Future[T]:
        self._loop = self._loop or BackgroundLoop()
        adapters = [] if self.adapter is None else [*self._older, self.adapter]

        async def run() -> T:
            if self._pool is None:
                waits = self.settings.patience, self.settings.pause, self.settings.look
                self._pool = ServerPool(self.settings.endpoints(), self._prepare, *waits)
            self._known = adapters
            return await what(self._pool)

        return self._loop.submit(run)

    def fetch(self, submitted: Future[T]) -> T:
        """Wait for something that was submitted. An error ends everything that was, and closes the connections."""
        try:
            return submitted.result()
        except BaseException:
            self._disconnect()
            raise


def _number(name: str) -> int:
    """The number of an adapter from its name."""
    return int(name.rpartition("-")[2])
