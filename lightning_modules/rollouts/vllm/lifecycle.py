"""The served engine in one run of a Trainer: connected at its start, closed however it ends."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import AsksEngine
from lightning_modules.rollouts.vllm.engine import VLLMEngine
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings

log = logging.getLogger(__name__)


def connect(policy: QwenVL, settings: VLLMSettings, trainer: Trainer, max_new_tokens: int) -> VLLMEngine:
    """The engine of this rank.

    Its servers are checked for the longest sequences of training and of every callback: a sequence that does not fit
    should end the run now, and not at an evaluation hours later.

    Args:
        policy: the trained model.
        settings: the servers.
        trainer: its callbacks are asked for their longest sequences.
        max_new_tokens: length limit of a completion in training.
    """
    folder = Path(trainer.default_root_dir) / "adapters"
    engine = VLLMEngine(policy, settings, folder, trainer.global_rank, trainer.strategy.broadcast)
    encoder = getattr(trainer.datamodule, "encoder", None)
    limits = getattr(encoder, "max_prompt_tokens", 1), max_new_tokens
    needs = {"training": sum(limits)}
    for callback in trainer.callbacks:
        if isinstance(callback, AsksEngine):
            name = type(callback).__name__  # there may be two of a kind
            needs[name] = max(needs.get(name, 0), callback.longest_sequence(*limits))
    engine.check(needs)
    return engine


class CloseOnError(Callback):
    """Closes the module's engine when a run ends with an error or is stopped: servers outlive runs, and each adapter
    that stays takes one of their places. A callback, since Lightning tells modules nothing of errors."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if pl_module.engine is not None:
                pl_module.engine.close()
        except Exception as error:  # the one that ended the run is the one to be raised
            log.warning("the servers may still have this run's adapter: %s", error)
