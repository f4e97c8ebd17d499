"""The vLLM engine in a run of the Trainer: connect at the start, and close at the end, also after an error."""

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


def connect(
    policy: QwenVL, settings: VLLMSettings, trainer: Trainer, max_new_tokens: int, staleness: int = 0
) -> VLLMEngine:
    """The engine of this rank.

    The servers are checked for the longest sequences of training and of all callbacks, so that a sequence that does not
    fit ends the run now, not at an evaluation hours later.

    Args:
        policy: the trained model.
        settings: the servers.
        trainer: its callbacks report their longest sequences.
        max_new_tokens: length limit of a completion in training.
        staleness: number of accumulation windows that are sampled ahead.
    """
    folder = Path(trainer.default_root_dir) / "adapters"
    engine = VLLMEngine(policy, settings, folder, trainer.global_rank, trainer.strategy.broadcast, staleness)
    encoder = getattr(trainer.datamodule, "encoder", None)
    limits = getattr(encoder, "max_prompt_tokens", 1), max_new_tokens
    needs = {"training": sum(limits)}
    for callback in trainer.callbacks:
        if isinstance(callback, AsksEngine):
            name = type(callback).__name__  # there may be two callbacks of a class
            needs[name] = max(needs.get(name, 0), callback.longest_sequence(*limits))
    engine.check(needs)
    return engine


class CloseOnError(Callback):
    """Closes the module's engine if a run ends with an error or is stopped.

    Servers continue after a run, and each loaded adapter takes one of their adapter slots. This is a callback, because
    Lightning does not report errors to modules.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            pl_module.close_on_error()
        except Exception as error:  # the error that has ended the run is raised, not this one
            log.warning("the servers may still have this run's adapter: %s", error)
