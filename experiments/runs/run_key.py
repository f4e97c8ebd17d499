"""The key of a training run: a hash of the settings and inputs that its results depend on.

A setting is in the key unless it is listed here. So a new setting leads to a new run, and never to a wrong result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.persistence.files import fingerprint
from datamodules.persistence.source_code import class_modules, source_code, users_files
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_content import deviations
from datamodules.streaming.shard_sources import mixing_weights
from experiments.runs import preflight
from experiments.runs.changes import Inputs, MadeOf

# The folder and name of a run, its loggers, and its configuration files, whose values are in the key as settings.
RUN_NOT_IN_KEY = ("config", "outputs", "experiment", "phase", "log_to")
# Display, logs, saving, profiling, and validation loops (no module here has one).
TRAINER_NOT_IN_KEY = (
    *("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler"),
    *("enable_checkpointing", "detect_anomaly", "barebones", "enable_autolog_hparams", "model_registry"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"),
    *("val_check_interval", "check_val_every_n_epoch", "inference_mode", "use_distributed_sampler"),
)
# The device of sampling, its log, the limits at which a run gives up, and settings that trade memory for time. They do
# not change the results.
MODEL_NOT_IN_KEY = (
    *("rollout.vllm", "rollout.log", "rollout.log_every", "rollout.kv_cache_gib"),
    *("update.max_idle_windows",),
    *("feature_cache", "feature_cache_gib", "gradient_checkpointing", "activation_gib"),
)
# The order of samples does not depend on the workers (`stream`), nor on the cache folder.
DATA_NOT_IN_KEY = ("num_workers", "worker_timeout", "cache", "cache_gib")
CALLBACKS_NOT_IN_KEY = (
    "callbacks.run_progress.Progress",
    "callbacks.checkpoints.WindowCheckpoint",
    "callbacks.held_out_loss.HeldOutLoss",
    "callbacks.save_on_interrupt.SaveOnInterrupt",
    "callbacks.previews.Previews",
    "callbacks.rank_watch.RankWatch",
    "callbacks.rejected_samples.RejectedSamples",
    "callbacks.throughput.Throughput",
)
# Lightning's callbacks that only show or log something.
SHOWING = ("TQDMProgressBar", "RichProgressBar", "ModelSummary", "RichModelSummary", "LearningRateMonitor")
SHOWING += ("DeviceStatsMonitor", "ThroughputMonitor")
# The folder of a selection; the same settings would give the same selection.
CALLBACK_FIELDS_NOT_IN_KEY = {"callbacks.rejection_sampling.RejectionSampling": ("folder", "shared")}
COLLAPSE = "callbacks.collapse_guard.CollapseGuard"


def run_key(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that results depend on, and of the content of the model folder and the shards."""
    return made_of(settings, with_code=False).key


def made_of(settings: Mapping[str, Any], with_code: bool = True) -> MadeOf:
    """Settings, inputs and code of the run with this resolved configuration, read now."""
    # The key depends on settings and contents. The code is compared separately, because the user may keep results of
    # older code.
    known, inputs = key_settings(settings), _inputs(settings)
    known["data"] |= _trusting(settings)
    contents = [[content for _, content in inputs[name]] for name in sorted(inputs)]
    modules = ("experiments.train", *class_modules(settings))
    code = source_code(modules) if with_code else {}
    return MadeOf(fingerprint(known, contents), known, inputs, code, _saved)


def key_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that results depend on. The model and the shards are in the key by content, not by path."""
    trainer = _without(settings["trainer"], TRAINER_NOT_IN_KEY)
    trainer["callbacks"] = [_callback(entry) for entry in trainer.get("callbacks") or [] if _matters(entry)]
    arguments = _without(settings["model"]["init_args"], (*MODEL_NOT_IN_KEY, "model"))
    data = _without(settings["data"], (*DATA_NOT_IN_KEY, "shards", "processor", "verify_shards"))
    if data.get("order") == "buffer":  # the only order of earlier versions, so their runs keep their keys
        del data["order"]
    if (weights := mixing_weights(settings["data"]["shards"])) is not None:
        data["weights"] = weights
    model = {**settings["model"], "init_args": arguments}
    return _without(settings, RUN_NOT_IN_KEY) | {"trainer": trainer, "model": model, "data": data}


def _saved(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Inputs]:
    """Settings and inputs (by path) from the config.yaml of a run of an earlier version, which recorded neither."""
    shards = [(str(path), None) for path in preflight.shard_list(settings)]
    model = [(str(settings["model"]["init_args"]["model"]), None)]
    return key_settings(settings), {"model.init_args.model": model, "data.shards": shards}


def _inputs(settings: Mapping[str, Any]) -> Inputs:
    paths = {"model.init_args.model": [settings["model"]["init_args"]["model"]]}
    paths["data.shards"] = preflight.shard_list(settings)
    inputs: Inputs = {name: [(str(path), path_fingerprint(path)) for path in group] for name, group in paths.items()}
    # A user's reward changes the results as a setting does, so another reward is another run.
    rewards = settings["model"]["init_args"].get("rewards") or []
    if own := users_files(source_code(class_modules(rewards))):
        inputs["model.init_args.rewards"] = list(own.items())
    return inputs


def _trusting(settings: Mapping[str, Any]) -> dict[str, bool]:
    """`verify_shards` changes results only if some shards differ from their manifest; only then is it in the key."""
    if settings["data"].get("verify_shards", True):
        return {}
    return {"verify_shards": False} if any(deviations(folder) for folder in preflight.shard_list(settings)) else {}


def _matters(callback: Mapping[str, Any]) -> bool:
    if callback["class_path"] == COLLAPSE:  # a warning does not change results, and a stopped run is not finished
        return callback.get("init_args", {}).get("action") == "roll_back"
    package, _, name = callback["class_path"].rpartition(".")
    if package.startswith("lightning.pytorch.callbacks") and name in SHOWING:
        return False
    return callback["class_path"] not in CALLBACKS_NOT_IN_KEY


def _callback(callback: Mapping[str, Any]) -> dict[str, Any]:
    fields = CALLBACK_FIELDS_NOT_IN_KEY.get(callback["class_path"], ())
    return {**callback, "init_args": _without(callback.get("init_args") or {}, fields)}


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The settings without those of these names; "group.name" removes one setting of a group."""
    kept = {name: value for name, value in settings.items() if name not in names}
    for group, _, name in (full.partition(".") for full in names):
        if name and isinstance(kept.get(group), Mapping):
            kept[group] = _without(kept[group], (name,))
    return kept
