"""Settings are checked before weights are loaded, and every fault is told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datamodules.streaming.shard_sources import read_shards, source_list
from datamodules.streaming.url_openers import FetchError

SHARDED = "sharded (FSDP2)"
REFUSED_STRATEGIES = {
    "deepspeed": "its engine divides gradients by its own counts of batches and owns the step, where a window here is "
    "divided by the tokens or completions of all ranks",
    "fsdp": "FSDP1 flattens frozen and trained weights into one tensor, which LoRA beside frozen weights needs apart",
    "modelparallel": "Lightning's own leaves the division of the layers to the module",
}

# Settings of the Trainer that the modules have their own for, and the values that change nothing. A precision would
# round adapters to 16 bits, scale losses whose gradients are clipped here, or be switched off again by the policy.
MODULES_OWN = {
    "accumulate_grad_batches": ("accumulate", (None, 1)),
    "gradient_clip_val": ("max_grad_norm", (None,)),
    "precision": ("dtype", (None, 32, "32", "32-true")),
}


class SettingsError(ValueError):
    """Settings that cannot be run; the message lists every fault."""


def raise_all(faults: Sequence[str]) -> None:
    """Raise SettingsError with all faults, if there are any."""
    if faults:
        raise SettingsError("these settings cannot be run:\n" + "\n".join(f"  - {fault}" for fault in faults))


def shard_list(settings: Mapping) -> list[str]:
    """The sources of data.shards as a list."""
    return source_list(settings["data"]["shards"])


def seed_faults(seed: object) -> list[str]:
    """Faults of a seed, which NumPy takes in 32 bits."""
    return [] if not isinstance(seed, int) or 0 <= seed < 2**32 else [f"seed={seed} must be in 0 to {2**32 - 1}"]


def training_faults(settings: Mapping) -> list[str]:
    """What is wrong with a training run's resolved configuration, each fault naming the field and its value."""
    model = settings["model"]["init_args"]
    faults = model_faults(model["model"])
    for source in shard_list(settings):
        faults += shard_faults(source)
    for name in ("experiment", "phase"):
        if not settings[name] or Path(settings[name]).name != settings[name]:
            faults.append(f"{name}={settings[name]!r} must be a plain folder name")
        elif "$" in settings[name]:
            faults.append(f"{name}={settings[name]!r} names an environment variable that is not set")
    strategy = settings["trainer"].get("strategy")
    strategy = strategy["class_path"] if isinstance(strategy, Mapping) else strategy
    for name, reason in REFUSED_STRATEGIES.items():
        if name in str(strategy).lower():
            faults.append(f"trainer.strategy={strategy!r}: {reason}; use ddp or {SHARDED}")
    for callback in settings["trainer"].get("callbacks") or []:
        if callback["class_path"].endswith(".RejectionSampling") and isinstance(settings["data"]["shards"], Mapping):
            reason = "the prompts that it keeps are one source; give the sources as a list"
            faults.append(f"RejectionSampling: data.shards has weights, but {reason}")
        elsewhere = callback.get("init_args", {}).get("dirpath")
        if elsewhere is not None and callback["class_path"].endswith(".WindowCheckpoint"):
            reason = "a run goes on from checkpoints/ in its phase's folder, and looks nowhere else"
            faults.append(f"WindowCheckpoint: dirpath={elsewhere!r} must be null: {reason}")
    for name, (instead, harmless) in MODULES_OWN.items():
        value = settings["trainer"].get(name)
        if value not in harmless:
            faults.append(f"trainer.{name}={value}: the modules do this themselves, use model.{instead}")
    return faults


def model_faults(path: str) -> list[str]:
    """Faults of a model folder or Hub name, its tensors among them, before any value is read."""
    # Both load torch, which an import of data does without.
    from datamodules.checkpoints.pretrained import check_policy
    from lightning_modules.models.architectures.registry import known_types

    try:
        check_policy(path, known_types())
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def shard_faults(source: str) -> list[str]:
    """Faults of one source of shards: absent, without a manifest, not to be reached, or empty."""
    try:
        shards = read_shards(source)
    except (ValueError, OSError, FetchError) as error:
        return [f"data.shards={source!r}: {error}"]
    return [] if any(shard.count for shard in shards) else [f"data.shards={source!r}: the manifest counts no sample"]
