"""Detect a collapse of training: if reward, entropy, length or KL leave their bounds, warn, stop, or roll back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.checkpoints import RunStopped, log_batch, newest, num_updates
from callbacks.sound_checkpoints import newest_whole
from datamodules.persistence.files import StorageError, read_json, write_json
from datamodules.persistence.problems import Problems
from lightning_modules.training.seeds import derive_seed

log = logging.getLogger(__name__)

FILE_NAME = "collapse.json"


class RolledBack(RuntimeError):
    """The run was rolled back. It must be started again, and then resumes from an earlier checkpoint."""


@dataclass(frozen=True)
class Bound:
    """Limits for the moving average m of one metric: low <= m <= high, and m >= best - max_drop * |best|.

    `best` is the highest moving average so far. null switches a limit off.
    """

    low: float | None = None
    high: float | None = None
    max_drop: float | None = None

    def fault(self, mean: float, best: float) -> str | None:
        """In words, how `mean` breaks a limit; None if it breaks none."""
        if self.low is not None and not mean >= self.low:  # written so that NaN breaks every limit
            return f"is below low={self.low:g}"
        if self.high is not None and not mean <= self.high:
            return f"is above high={self.high:g}"
        if self.max_drop is not None and not mean >= best - self.max_drop * abs(best):
            return f"is more than max_drop={self.max_drop:g} below its best, {best:.4g}"
        return None


class CollapseGuard(Callback):
    """Watches moving averages of metrics. They are checked at the end of each accumulation window.

    - warn: logs a warning each time that a metric leaves its bounds.
    - stop: ends the run. The message has the metric, its value, the bound and the last good checkpoint.
    - roll_back: resumes from the newest checkpoint from before the averaged batches. If there is none, it takes the
      oldest checkpoint; `keep_last` of WindowCheckpoint decides how old that is. The run then continues with other
      samples and other rollouts.

    Events are written to <default_root_dir>/collapse.json, and `collapse/rollbacks` is logged. A W&B logger sends an
    alert. A rollback is decided by one write of this file and carried out when the run starts again, so a kill at any
    moment does no harm.

    It must come before SaveOnInterrupt, as `experiments.train` arranges.

    Args:
        bounds: metric -> its limits. An average that is NaN breaks every limit. A metric that is never logged leads to
            one warning.
        action: the reaction, see above.
        average_over: number of batches in the moving average.
        max_rollbacks: after this number of rollbacks, the run stops instead.
        learning_rate_factor: the learning rate is multiplied by this at each rollback.
    """

    def __init__(
        self,
        bounds: dict[str, Bound],
        action: Literal["warn", "stop", "roll_back"] = "stop",
        average_over: int = 20,
        max_rollbacks: int = 2,
        learning_rate_factor: float = 1.0,
    ) -> None:
        problems = Problems()
        problems.require(bool(bounds), "watches nothing", bounds=bounds)
        problems.one_of(("warn", "stop", "roll_back"), action=action)
        problems.positive(average_over=average_over, max_rollbacks=max_rollbacks)
        problems.positive(learning_rate_factor=learning_rate_factor)
        for name, bound in bounds.items():
            if bound == Bound():
                problems.append(f"bounds[{name!r}] has neither low nor high nor max_drop")
            problems.positive_or_null(**{f"bounds[{name!r}].max_drop": bound.max_drop})
        problems.raise_all("CollapseGuard")
        self.bounds, self.action, self.average_over = bounds, action, average_over
        self.max_rollbacks, self.learning_rate_factor = max_rollbacks, learning_rate_factor
        self._values: list[dict[str, float]] = []  # metrics and step of the last batches, up to the last update
        self._open: list[dict[str, float]] = []  # the same for the batches since then, in a window that is still open
        self._best: dict[str, float] = {}  # highest moving average of each metric
        self._rollbacks = 0  # number of rollbacks for which the learning rate has been reduced
        self._outside: set[str] = set()  # metrics that are out of bounds now
        self._missed: set[str] = set()  # metrics that are not logged and for which a warning was given

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values, "best": self._best, "rollbacks": self._rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values, self._best = list(state_dict["values"]), dict(state_dict["best"])
        self._rollbacks = state_dict["rollbacks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a rollback: another seed, another order of the samples, and a smaller learning rate."""
        events = read_json(Path(trainer.default_root_dir) / FILE_NAME).get("events", ())
        done = trainer.strategy.broadcast(sum(event["action"] == "roll_back" for event in events))
        if done:
            pl_module.seed = derive_seed(pl_module.seed, done)
            trainer.datamodule.reorder(done)
            # The checkpoint's own learning rate includes its `_rollbacks` reductions already.
            _scale_learning_rate(trainer, self.learning_rate_factor ** (done - self._rollbacks))
        self._rollbacks = done

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Collect the metrics of the batch; at the end of a window, check all bounds and act."""
        if self.action == "roll_back":
            pl_module.log("collapse/rollbacks", float(self._rollbacks))
        is_open = getattr(pl_module, "window_is_open", False)
        if is_open and not getattr(pl_module, "logs_every_batch", True):
            return  # the metrics are those of the window before
        # 1. Collect. Batches of an open window are kept apart, because a run that resumes repeats them.
        known = trainer.callback_metrics
        values = {name: float(known[name]) for name in self.bounds if name in known}
        self._open.append({"step": trainer.global_step, **values})
        if is_open:
            return
        # 2. Check. Rank 0 decides for all, so that all ranks stop at the same batch.
        self._values, self._open = [*self._values, *self._open][-self.average_over :], []
        if trainer.is_global_zero:
            self._warn_of_missing(known)
        faults = trainer.strategy.broadcast(self._find_faults())
        # 3. Act. A warning is given only when a metric leaves its bounds, not while it stays outside.
        for fault in faults:
            if not (fault["metric"] in self._outside and self.action == "warn"):
                self._act(trainer, fault)
        self._outside = {fault["metric"] for fault in faults}

    def _warn_of_missing(self, known: Mapping[str, Any]) -> None:
        """Warn, once, of each metric that was not logged in `average_over` batches: its name may be misspelt."""
        names = self.bounds.keys() - self._missed if len(self._values) == self.average_over else ()
        for name in sorted(names):
            if not any(name in value for value in self._values):
                self._missed.add(name)
                log.warning("bounds[%r] watches nothing: it is not logged; %s are", name, ", ".join(sorted(known)))

    def _find_faults(self) -> list[dict[str, Any]]:
        """All metrics that are out of bounds; none before there are `average_over` batches."""
        faults = []
        for name, bound in self.bounds.items() if len(self._values) == self.average_over else ():
            values = [value[name] for value in self._values if name in value]
            if not values:
                continue
            mean = sum(values) / len(values)
            if mean > self._best.get(name, -math.inf):  # False for NaN
                self._best[name] = mean
            if fault := bound.fault(mean, self._best.get(name, -math.inf)):
                words = f"{name}: the mean {mean:.4g} over the last {len(values)} batches {fault}"
                faults.append({"step": self._values[-1]["step"], "metric": name, "mean": mean, "fault": words})
        return faults

    def _act(self, trainer: Trainer, fault: dict[str, Any]) -> None:
        """React to a metric that is out of bounds. Raises RolledBack or RunStopped unless the action is to warn."""
        log_batch(trainer)  # the row that shows the collapse
        # 1. Choose the checkpoint to go back to. Without one, or after too many rollbacks, the run stops.
        folder = Path(trainer.checkpoint_callback.dirpath) if trainer.checkpoint_callback else None
        bound = asdict(self.bounds[fault["metric"]])
        event: dict[str, Any] = {"action": self.action, **fault, "bound": bound, "rollbacks_before": self._rollbacks}
        good, spoilt = _split_checkpoints(folder, self._values[0]["step"]) if folder else (None, [])
        if self.action == "roll_back" and (good is None or self._rollbacks >= self.max_rollbacks):
            event["action"] = "stop"
        event["checkpoint"] = good.name if good else None
        # 2. Record it, in one write.
        words = f"collapse at step {fault['step']}: {fault['fault']}"
        if trainer.is_global_zero:
            log.warning(words)
            _alert(trainer, words, event["action"])
            try:
                _record(trainer.default_root_dir, event, spoilt if event["action"] == "roll_back" else [])
            except StorageError as error:
                if event["action"] != "warn":
                    raise
                log.warning(error)
        trainer.strategy.barrier("collapse")  # no rank ends before the event is recorded
        # 3. End this process. `finish_rollback` does the rest when the run starts again.
        if event["action"] == "roll_back":
            raise RolledBack(f"{words}. Rolled back to {good}; rollback {self._rollbacks + 1} of {self.max_rollbacks}")
        if event["action"] == "stop":
            after = f" after {self._rollbacks} rollbacks" if self._rollbacks else ""
            raise RunStopped(f"stopped{after}: {words}. The last good checkpoint is {good}")


def _alert(trainer: Trainer, words: str, action: str) -> None:
    """Send an alert to W&B, which mails it to the owner of the run or posts it, as they have chosen there."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            title = f"{logger.experiment.name}: collapse, {action.replace('_', ' ')}"
            logger.experiment.alert(title=title, text=words, level="WARN" if action == "warn" else "ERROR")


def finish_rollback(folder: str | Path) -> None:
    """Finish a rollback in this phase folder, if there is one: remove the checkpoints that it has discarded."""
    file = Path(folder) / FILE_NAME
    record = read_json(file)
    if record.get("spoilt"):
        for name in record["spoilt"]:
            (Path(folder) / "checkpoints" / name).unlink(missing_ok=True)
        write_json(file, record | {"spoilt": []})


def last_good(folder: str | Path) -> Path | None:
    """The newest checkpoint that no rollback has discarded, or None."""
    return newest(Path(folder) / "checkpoints", without=read_json(Path(folder) / FILE_NAME).get("spoilt", ()))


def last_whole(folder: str | Path, is_leader: bool = True) -> Path | None:
    """The checkpoint to resume from: the newest intact checkpoint that no rollback has discarded.

    None if there is no checkpoint.

    The leader renames damaged checkpoints. Raises RunStopped if there are checkpoints, but none is intact.
    """
    spoilt = read_json(Path(folder) / FILE_NAME).get("spoilt", ())
    return newest_whole(Path(folder) / "checkpoints", spoilt, keep_aside=is_leader)


def _split_checkpoints(folder: Path, before: int) -> tuple[Path | None, list[str]]:
    """Returns (good, spoilt): the newest checkpoint with fewer than `before` updates, and the names of all later ones.

    Without such a checkpoint, `good` is the oldest one.
    """
    files = sorted(folder.glob("step-*.ckpt"))
    early = [file for file in files if num_updates(file) < before]
    good = early[-1] if early else next(iter(files), None)
    # A checkpoint of an interruption is discarded too. Either it is later, or the run has resumed from it already.
    kept = files[: files.index(good) + 1] if good else []
    return good, sorted(file.name for file in folder.glob("*.ckpt") if file not in kept)


def _record(folder: str | Path, event: dict[str, Any], spoilt: list[str]) -> None:
    """Write an event, and the checkpoints that a rollback discards, in one step."""
    file = Path(folder) / FILE_NAME
    events = [old for old in read_json(file).get("events", ()) if old != event]  # a resumed run reports the same again
    write_json(file, {"events": [*events, event], "spoilt": spoilt})


def _scale_learning_rate(trainer: Trainer, factor: float) -> None:
    """Multiply the learning rate by `factor`: its schedule, and the value in use now."""
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
        config.scheduler._last_lr = [rate * factor for rate in config.scheduler.get_last_lr()]  # what is logged
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
