"""The served engine in one run of a Trainer: connected at its start, closed however it ends."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from lightning_modules.qwen_vl import QwenVL
from lightning_modules.vllm_protocol import VLLMSettings
from lightning_modules.vllm_rollouts import VLLMEngine

log = logging.getLogger(__name__)


def connect(policy: QwenVL, settings: VLLMSettings, trainer: Trainer, max_new_tokens: int) -> VLLMEngine:
    """The engine of this rank, its servers checked for the longest prompt that the trainer's data may have."""
    folder = Path(trainer.default_root_dir) / "adapters"
    engine = VLLMEngine(policy, settings, folder, trainer.global_rank, trainer.strategy.broadcast)
    encoder = getattr(trainer.datamodule, "encoder", None)
    engine.check(max_new_tokens + getattr(encoder, "max_prompt_tokens", 1))
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
