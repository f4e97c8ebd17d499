"""Save the trained policy as a plain model folder, for the next phase and for any server. Save its adapter too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from callbacks.checkpoints import RunStopped
from datamodules.checkpoints.model_folder import PROMPT_FORM
from datamodules.encoding.prompt_form import prompt_form_text
from datamodules.persistence.files import storage_error


class MergeAdapter(Callback):
    """At the end of training, merges the LoRA adapter into a copy of the model, and saves it completely or not at all.

    The folder also gets `prompt_form.json`: the form of the prompts in this phase
    (datamodules/encoding/prompt_form.py). The adapter alone, as PEFT saves it, is written to `adapter/`, beside
    `merged/`.

    If the folder cannot be written, every rank ends with RunStopped. The same command then resumes from the last
    checkpoint, which is usually the one at the end of training, and merges again. If training has not changed the
    weights, nothing is written and every rank ends with NothingLearnt.

    Args:
        folder: by default <default_root_dir>/merged.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge and save. Gathering sharded weights needs all ranks; rank 0 writes."""
        pl_module.require_learnt()
        policy, write = pl_module.policy, trainer.is_global_zero
        folder = Path(self.folder or Path(trainer.default_root_dir) / "merged")
        texts = {PROMPT_FORM: prompt_form_text(trainer.datamodule.encoder)}
        # 1. Save. If rank 0 cannot write the one, it still takes part in the other, in which all ranks gather weights.
        errors = []
        for save in (
            partial(policy.save_adapter, folder.parent / "adapter", write),
            partial(policy.save_merged, folder, write, texts),
        ):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                save()
            except (OSError, SafetensorError) as failure:
                errors.append(str(storage_error(failure, folder)))
        # 2. All ranks end alike. The others wait in this call until rank 0 has written.
        error = trainer.strategy.broadcast(errors[0] if errors else None)
        if error is not None:
            raise RunStopped(f"the merged model: {error}. Make room; the same command goes on from the last checkpoint")
