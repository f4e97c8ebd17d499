"""Check settings before weights are loaded, and report all problems together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from datamodules.persistence.user_error import SettingsError
from datamodules.streaming.shard_sources import read_shards, repeated_shard, source_list
from datamodules.streaming.url_openers import FetchError
from experiments.runs.usage_errors import suggest

SHARDED = "sharded (FSDP2)"
REFUSED_STRATEGIES = {
    "deepspeed": "its engine divides gradients by its own counts of batches and owns the step, where a window here is "
    "divided by the tokens or completions of all ranks",
    "fsdp": "FSDP1 flattens frozen and trained weights into one tensor, which LoRA beside frozen weights needs apart",
    "modelparallel": "Lightning's own leaves the division of the layers to the module",
}

# Settings of the Trainer that the modules replace by their own settings, and their neutral values. For example, another
# `precision` would round adapters to 16 bits, or scale losses whose gradients are clipped here.
MODULES_OWN = {
    "accumulate_grad_batches": ("accumulate", (None, 1)),
    "gradient_clip_val": ("max_grad_norm", (None,)),
    "precision": ("dtype", (None, 32, "32", "32-true")),
}


def raise_all(problems: Sequence[str]) -> None:
    """Raise SettingsError with all problems, if there are any."""
    if problems:
        raise SettingsError("these settings cannot be run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def shard_list(settings: Mapping) -> list[str]:
    """The sources of data.shards as a list."""
    return source_list(settings["data"]["shards"])


def seed_problems(seed: object) -> list[str]:
    """Problems of a seed; NumPy needs 32 bits."""
    return [] if not isinstance(seed, int) or 0 <= seed < 2**32 else [f"seed={seed} must be in 0 to {2**32 - 1}"]


def is_within(path: object, folders: Collection[str]) -> bool:
    """Whether a path is one of the folders or lies in one of them."""
    absolute = Path(str(path)).absolute()
    return any(absolute.is_relative_to(Path(folder).absolute()) for folder in folders)


def training_problems(settings: Mapping, absent: Collection[str] = ()) -> list[str]:
    """Problems of a training run's resolved configuration. Each names the field and its value.

    Folders in `absent` are still to be made, so nothing is read from them.
    """
    model = settings["model"]["init_args"]
    problems = [] if is_within(model["model"], absent) else model_problems(model["model"])
    for source in shard_list(settings):
        problems += shard_problems(source, absent=absent)
    problems += device_problems(settings["trainer"]) + size_problems(settings)
    problems += length_problems(settings["trainer"])
    problems += strategy_problems(settings["trainer"], model)
    windows = (model.get("update") or {}).get("refill_windows")
    if windows and settings["trainer"].get("max_steps", -1) == -1:
        problems.append(
            f"model.update.refill_windows={windows} with trainer.max_steps=-1: an update then has a number of batches "
            "that is not known before, so the epochs do not tell the learning-rate schedule its length. Set "
            "trainer.max_steps"
        )
    for name in ("experiment", "phase"):
        if not settings[name] or Path(settings[name]).name != settings[name]:
            problems.append(f"{name}={settings[name]!r} must be a plain folder name")
        elif "$" in settings[name]:
            problems.append(f"{name}={settings[name]!r} names an environment variable that is not set")
    for callback in settings["trainer"].get("callbacks") or []:
        if callback["class_path"].endswith(".RejectionSampling") and isinstance(settings["data"]["shards"], Mapping):
            reason = "the prompts that it keeps are one source; give the sources as a list"
            problems.append(f"RejectionSampling: data.shards has weights, but {reason}")
        elsewhere = callback.get("init_args", {}).get("dirpath")
        if elsewhere is not None and callback["class_path"].endswith(".WindowCheckpoint"):
            reason = "a run goes on from checkpoints/ in its phase's folder, and looks nowhere else"
            problems.append(f"WindowCheckpoint: dirpath={elsewhere!r} must be null: {reason}")
        if callback["class_path"].endswith(".HeldOutLoss"):
            problems += held_out_problems(callback["init_args"]["shards"], shard_list(settings), absent)
    for name, (instead, harmless) in MODULES_OWN.items():
        value = settings["trainer"].get(name)
        if value not in harmless:
            problems.append(f"trainer.{name}={value}: the modules do this themselves, use model.{instead}")
    return problems


def length_problems(trainer: Mapping) -> list[str]:
    """Problems of the settings that end a run: without an end the learning rate has no schedule."""
    from lightning_modules.training.optim import no_end  # imports torch

    steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    problems = [
        f"trainer.{name}={value} must be greater than 0, or -1 for no limit"
        for name, value in (("max_steps", steps), ("max_epochs", epochs))
        if value is not None and value != -1 and value < 1
    ]
    # Without both, Lightning makes 1000 epochs, or any number where a timer ends the run.
    timed = trainer.get("max_time") is not None
    timed |= any(callback["class_path"].endswith(".Timer") for callback in trainer.get("callbacks") or [])
    if steps == -1 and (epochs == -1 or (epochs is None and timed)):
        problems.append(no_end(steps, epochs))
    return problems


def strategy_problems(trainer: Mapping, model: Mapping) -> list[str]:
    """Problems of the strategy: refused, unknown, or not for these settings of the model."""
    from lightning.pytorch.strategies import StrategyRegistry

    import lightning_modules.training.fsdp_strategy  # noqa: F401 - registers "sharded"
    from lightning_modules.rl.loss_settings import FIXED_REFERENCE

    given = trainer.get("strategy")
    strategy = given["class_path"] if isinstance(given, Mapping) else given
    name = str(strategy).rpartition(".")[2].lower()  # without the module: ShardedStrategy is in fsdp_strategy
    problems = [
        f"trainer.strategy={strategy!r}: {reason}; use ddp or {SHARDED}"
        for refused, reason in REFUSED_STRATEGIES.items()
        if refused in name
    ]
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not problems and isinstance(given, str) and given not in known:
        cure = suggest(given, known) or f"; use ddp or {SHARDED}"
        problems.append(f"trainer.strategy={given!r} does not exist{cure}")
    every = (model.get("loss") or {}).get("reference_every")
    if every is not None and "sharded" in name:
        problems.append(f"model.loss.reference_every={every} with trainer.strategy={strategy!r}: {FIXED_REFERENCE}")
    return problems


def device_problems(trainer: Mapping) -> list[str]:
    """Problems of the devices: no valid number, or GPUs that do not exist."""
    import torch  # a slow import, which an import of data does not need
    from lightning.pytorch.accelerators import AcceleratorRegistry

    accelerator, devices, nodes = (trainer.get(name) for name in ("accelerator", "devices", "num_nodes"))
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if isinstance(accelerator, str) and accelerator not in known:
        return [f"trainer.accelerator={accelerator!r} must be one of {', '.join(known)}{suggest(accelerator, known)}"]
    problems = [] if nodes is None or nodes > 0 else [f"trainer.num_nodes={nodes} must be greater than 0"]
    on_cpu = accelerator == "cpu" or (accelerator in (None, "auto") and not torch.cuda.is_available())
    if not is_number_of_devices(devices, on_cpu):
        cure = "processes, such as 1" if on_cpu else "GPUs, such as 1, a list of GPUs, or -1 for all"
        problems.append(f"trainer.devices={devices!r} must be a number of {cure}; or auto")
    if problems or accelerator not in ("gpu", "cuda"):
        return problems
    if not torch.cuda.is_available():
        return [f"trainer.accelerator={accelerator!r}: PyTorch finds no GPU here. Use --trainer.accelerator=cpu"]
    wanted, found = num_ranks({"devices": trainer.get("devices")}), torch.cuda.device_count()
    if wanted <= found:
        return []
    cure = f"Use --trainer.devices={found}, or --gpus={found}, which keeps the total batch"
    return [f"trainer.devices={wanted}: PyTorch finds {found} GPU{'s' * (found > 1)} here. {cure}"]


def is_number_of_devices(devices: object, on_cpu: bool) -> bool:
    """Whether Lightning takes this value of trainer.devices."""
    if devices in (None, "auto"):
        return True
    if isinstance(devices, list) or "," in str(devices):
        return bool(devices) and not on_cpu
    number = int(devices) if str(devices).removeprefix("-").isdigit() else 0
    return number > 0 or (number == -1 and not on_cpu)


def size_problems(settings: Mapping) -> list[str]:
    """The problem that the data have fewer samples than one batch of all ranks, or hold a shard twice. The counts are
    in the manifests."""
    from datamodules.streaming.stream import smaller_batch  # imports torch

    try:
        shards = [shard for source in shard_list(settings) for shard in read_shards(source)]
    except (ValueError, OSError, FetchError):
        return []  # `shard_problems` reports the source
    if fault := repeated_shard(shards):
        return [f"data.shards={settings['data']['shards']!r}: {fault}"]
    count = sum(shard.count for shard in shards)
    batch, ranks = settings["data"]["batch_size"], num_ranks(settings["trainer"])
    if not count or batch < 1 or count >= batch * ranks:
        return []
    return [
        f"data.batch_size={batch} on {ranks} rank{'s' * (ranks > 1)} needs {batch * ranks} samples, but data.shards="
        f"{settings['data']['shards']!r} holds {count}. Use {smaller_batch(count, ranks)}"
    ]


def num_ranks(trainer: Mapping) -> int:
    """Number of processes of a run from the settings; 1 if Lightning chooses ("auto")."""
    devices = trainer.get("devices")
    devices = int(devices) if isinstance(devices, str) and devices.isdigit() else devices
    number = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    return number * (trainer.get("num_nodes") or 1)


def model_problems(path: str) -> list[str]:
    """Problems of a model folder or Hub name, including its tensors, before any weight is read."""
    # Both import torch, which an import of data does not need.
    from datamodules.checkpoints.pretrained import check_policy
    from lightning_modules.models.architectures.registry import known_types

    try:
        check_policy(path, known_types())
    except (ValueError, OSError) as error:
        folder, message = Path(path), str(error)
        if folder.name == "merged" and not folder.is_dir():  # the model of an earlier stage of this experiment
            stage = f"{folder.parent.parent.name}/{folder.parent.name}"
            message += f". Train {stage} first, or name another model with --model.model=FOLDER"
        return [message]
    return []


def held_out_problems(held_out: str | Sequence[str], trained: Sequence[str], absent: Collection[str] = ()) -> list[str]:
    """Problems of HeldOutLoss's shards: invalid shards, and shards that training also reads."""
    problems = []
    of_training = set().union(*map(_shard_files, trained))
    for source in source_list(held_out):
        problems += shard_problems(source, "HeldOutLoss: shards", absent)
        is_same = any(Path(source).absolute() == Path(other).absolute() for other in trained)
        # A folder above others has their shards: training on data/kites is training on data/kites/val.
        if is_same or not of_training.isdisjoint(_shard_files(source)):
            problems.append(
                f"HeldOutLoss: shards={source!r} are in data.shards: held-out samples must not be trained on"
            )
    return problems


def _shard_files(source: str) -> set[str]:
    """The places of a source's shards; none if it cannot be read, which `shard_problems` reports."""
    try:
        shards = read_shards(source)
    except (ValueError, OSError, FetchError):
        return set()
    return {shard.location if shard.is_remote else str(Path(shard.location).absolute()) for shard in shards}


def shard_problems(source: str, setting: str = "data.shards", absent: Collection[str] = ()) -> list[str]:
    """Problems of one source of shards: it is missing, has no manifest, is unreachable, or is empty.

    A source in `absent` is still to be made, and has no problem. `setting` is used in the message.
    """
    if is_within(source, absent):
        return []
    try:
        shards = read_shards(source)
    except (ValueError, OSError, FetchError) as error:
        return [f"{setting}={source!r}: {error}"]
    return [] if any(shard.count for shard in shards) else [f"{setting}={source!r}: the manifest counts no sample"]
