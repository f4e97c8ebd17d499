"""A guard for collapse: reward, entropy, length or KL that leave their bounds warn, stop the run, or roll it back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoints import RunStopped, log_batch, newest, num_updates
from callbacks.sound_checkpoints import newest_whole
from datamodules.persistence.files import StorageError, read_json, write_json
from lightning_modules.training.seeds import derive_seed

log = logging.getLogger(__name__)

FILE_NAME = "collapse.json"


class RolledBack(RuntimeError):
    """The run must be started again, from the checkpoint that it was rolled back to."""


@dataclass(frozen=True)
class Bound:
    """A metric's mean over the window must be at least `low`, at most `high`, and not below its highest mean so far by
    more than `max_drop` times the size of that. null: no such bound."""

    low: float | None = None
    high: float | None = None
    max_drop: float | None = None

    def fault(self, mean: float, best: float) -> str | None:
        """How `mean` breaks the bound, in words."""
        if self.low is not None and not mean >= self.low:  # a NaN is out of every bound
            return f"is below low={self.low:g}"
        if self.high is not None and not mean <= self.high:
            return f"is above high={self.high:g}"
        if self.max_drop is not None and not mean >= best - self.max_drop * abs(best):
            return f"is more than max_drop={self.max_drop:g} below its best, {best:.4g}"
        return None


class CollapseGuard(Callback):
    """Watches the mean of each metric in `bounds` over the last `window` batches, at the end of each update's window.

    A mean that is no number is out of every bound. A metric that is not logged at all is warned of, once.

    warn: says so, once for each time that a metric leaves them. stop: ends the run; the message names metric, value,
    bound and the last good checkpoint. roll_back: goes back to the newest checkpoint from before the window (else the
    oldest there is; WindowCheckpoint's keep_last says how far back that can be), and goes on from there with other
    samples, other rollouts and the learning rate times `learning_rate_factor`; after `max_rollbacks`, it stops.
    What happened stands in <default_root_dir>/collapse.json, and `collapse/rollbacks` is logged. A rollback is first
    written there whole, and done when the run starts again: a kill at any moment changes nothing of it.
    List it before SaveOnInterrupt.
    """

    def __init__(
        self,
        bounds: dict[str, Bound],
        action: Literal["warn", "stop", "roll_back"] = "stop",
        window: int = 20,
        max_rollbacks: int = 2,
        learning_rate_factor: float = 1.0,
    ) -> None:
        self.bounds, self.action, self.window = bounds, action, window
        self.max_rollbacks, self.learning_rate_factor = max_rollbacks, learning_rate_factor
        if faults := self._faults():
            raise ValueError(f"CollapseGuard: {'; '.join(faults)}")
        self._values: list[dict[str, float]] = []  # of the last batches, with their step, up to the last update
        self._open: list[dict[str, float]] = []  # of the batches since
        self._best: dict[str, float] = {}
        self._rollbacks = 0  # that the learning rate has seen
        self._outside: set[str] = set()  # metrics
        self._missed: set[str] = set()  # metrics that were warned of

    def _faults(self) -> list[str]:
        faults = [] if self.bounds else ["bounds={} watches nothing"]
        if self.action not in ("warn", "stop", "roll_back"):
            faults.append(f"action={self.action!r} must be 'warn', 'stop' or 'roll_back'")
        for name in ("window", "max_rollbacks", "learning_rate_factor"):
            if not getattr(self, name) > 0:
                faults.append(f"{name}={getattr(self, name)} must be greater than 0")
        for name, bound in self.bounds.items():
            if bound == Bound():
                faults.append(f"bounds[{name!r}] has neither low nor high nor max_drop")
            if bound.max_drop is not None and not bound.max_drop > 0:
                faults.append(f"bounds[{name!r}].max_drop={bound.max_drop} must be greater than 0, or null")
        return faults

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values, "best": self._best, "rollbacks": self._rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values, self._best = list(state_dict["values"]), dict(state_dict["best"])
        self._rollbacks = state_dict["rollbacks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.strategy.broadcast(_num_rollbacks(trainer.default_root_dir))
        if done:
            pl_module.seed = derive_seed(pl_module.seed, done)
            trainer.datamodule.reorder(done)
            _scale_learning_rate(trainer, self.learning_rate_factor ** (done - self._rollbacks))
        self._rollbacks = done

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.action == "roll_back":
            pl_module.log("collapse/rollbacks", float(self._rollbacks))
        known = trainer.callback_metrics
        values = {name: float(known[name]) for name in self.bounds if name in known}
        self._open.append({"step": trainer.global_step, **values})
        if getattr(pl_module, "window_is_open", False):
            return
        self._values, self._open = [*self._values, *self._open][-self.window :], []
        if trainer.is_global_zero:
            self._warn_of_missing(known)
        faults = trainer.strategy.broadcast(self._find_faults())
        for fault in faults:
            if not (fault["metric"] in self._outside and self.action == "warn"):
                self._act(trainer, fault)
        self._outside = {fault["metric"] for fault in faults}

    def _warn_of_missing(self, known: Mapping[str, Any]) -> None:
        """Once the window is full; a misspelt name would else watch nothing in silence."""
        names = self.bounds.keys() - self._missed if len(self._values) == self.window else ()
        for name in sorted(names):
            if not any(name in value for value in self._values):
                self._missed.add(name)
                log.warning("bounds[%r] watches nothing: it is not logged; %s are", name, ", ".join(sorted(known)))

    def _find_faults(self) -> list[dict[str, Any]]:
        """Every metric out of its bounds; none while the window is not full."""
        faults = []
        for name, bound in self.bounds.items() if len(self._values) == self.window else ():
            values = [value[name] for value in self._values if name in value]
            if not values:
                continue
            mean = sum(values) / len(values)
            if mean > self._best.get(name, -math.inf):  # a NaN is not
                self._best[name] = mean
            if fault := bound.fault(mean, self._best.get(name, -math.inf)):
                words = f"{name}: the mean {mean:.4g} over the last {len(values)} batches {fault}"
                faults.append({"step": self._values[-1]["step"], "metric": name, "mean": mean, "fault": words})
        return faults

    def _act(self, trainer: Trainer, fault: dict[str, Any]) -> None:
        log_batch(trainer)  # the row that shows it
        folder = Path(trainer.checkpoint_callback.dirpath) if trainer.checkpoint_callback else None
        bound = asdict(self.bounds[fault["metric"]])
        event: dict[str, Any] = {"action": self.action, **fault, "bound": bound, "rollbacks_before": self._rollbacks}
        good, spoilt = _split_checkpoints(folder, self._values[0]["step"]) if folder else (None, [])
        if self.action == "roll_back" and (good is None or self._rollbacks >= self.max_rollbacks):
            event["action"] = "stop"
        event["checkpoint"] = good.name if good else None
        words = f"collapse at step {fault['step']}: {fault['fault']}"
        if trainer.is_global_zero:
            log.warning(words)
            try:
                _record(trainer.default_root_dir, event, spoilt if event["action"] == "roll_back" else [])
            except StorageError as error:
                if event["action"] != "warn":
                    raise
                log.warning(error)
        trainer.strategy.barrier("collapse")  # all go on when it is recorded
        if event["action"] == "roll_back":
            raise RolledBack(f"{words}. Rolled back to {good}; rollback {self._rollbacks + 1} of {self.max_rollbacks}")
        if event["action"] == "stop":
            after = f" after {self._rollbacks} rollbacks" if self._rollbacks else ""
            raise RunStopped(f"stopped{after}: {words}. The last good checkpoint is {good}")


def finish_rollback(folder: str | Path) -> None:
    """Remove the checkpoints that a rollback in this phase folder left behind it, if there is one to finish."""
    file = Path(folder) / FILE_NAME
    record = read_json(file)
    if record.get("spoilt"):
        for name in record["spoilt"]:
            (Path(folder) / "checkpoints" / name).unlink(missing_ok=True)
        write_json(file, record | {"spoilt": []})


def last_good(folder: str | Path) -> Path | None:
    """The checkpoint to go on from: the newest that no rollback has condemned; None where there is none."""
    return newest(Path(folder) / "checkpoints", without=read_json(Path(folder) / FILE_NAME).get("spoilt", ()))


def last_whole(folder: str | Path, is_leader: bool = True) -> Path | None:
    """`last_good`, or the newest before it that is whole; the first rank sets damaged ones aside. Raises RunStopped
    where none of several is."""
    spoilt = read_json(Path(folder) / FILE_NAME).get("spoilt", ())
    return newest_whole(Path(folder) / "checkpoints", spoilt, keep_aside=is_leader)


def _split_checkpoints(folder: Path, before: int) -> tuple[Path | None, list[str]]:
    """The newest of less than `before` updates (else the oldest), and the names of those behind it."""
    files = sorted(folder.glob("step-*.ckpt"))
    early = [file for file in files if num_updates(file) < before]
    good = early[-1] if early else next(iter(files), None)
    # One from an interruption is also newer, or a run went on from it and it is of no use.
    kept = files[: files.index(good) + 1] if good else []
    return good, sorted(file.name for file in folder.glob("*.ckpt") if file not in kept)


def _record(folder: str | Path, event: dict[str, Any], spoilt: list[str]) -> None:
    file = Path(folder) / FILE_NAME
    events = [old for old in read_json(file).get("events", ()) if old != event]  # a resumed run says it again
    write_json(file, {"events": [*events, event], "spoilt": spoilt})


def _num_rollbacks(folder: str | Path) -> int:
    return sum(event["action"] == "roll_back" for event in read_json(Path(folder) / FILE_NAME).get("events", ()))


def _scale_learning_rate(trainer: Trainer, factor: float) -> None:
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
