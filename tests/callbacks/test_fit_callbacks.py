"""The small callbacks: merging, pictures, throughput, and interruption."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from safetensors import SafetensorError

from callbacks.checkpoints import RunStopped, WholeCheckpoints, WindowCheckpoint, newest
from callbacks.merge_adapter import MergeAdapter
from callbacks.previews import Previews
from callbacks.save_on_interrupt import SaveOnInterrupt
from callbacks.throughput import Throughput
from datamodules.benchmarks.mig_bench import load_mig_bench
from datamodules.metrics.drawing import GAP, LINE_HEIGHT, PREVIEW_TEXTS, describe_preview, draw_preview
from datamodules.metrics.predictions import Prediction
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, Sample
from lightning_modules.rollouts.vllm.server_pool import ServersLost
from tests.callbacks.conftest import TWO_EPOCHS, FakeEngine, FakeModule, Windows, read_rows, resuming, true_answer


@pytest.fixture
def module(tiny_model_dir) -> FakeModule:
    return FakeModule(str(tiny_model_dir), FakeEngine(true_answer))


class Sends(Callback):
    """Sends this process a signal while the second (or another) batch of the run is trained on."""

    def __init__(self, signum: int, times: int = 1, batch: int = 2) -> None:
        self.signum, self.times, self.batch = signum, times, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch -= 1
        if self.batch == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


def test_the_policy_is_merged_once_into_the_runs_folder(fit, module, tmp_path: Path) -> None:
    fit(module, [MergeAdapter()])
    assert module.policy.merged == [tmp_path / "run/merged"] and module.policy.adapters == [tmp_path / "run/adapter"]
    assert list(module.policy.texts) == ["prompt_form.json"]


def test_throughput_is_logged_from_the_second_batch_on(fit, module, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log")
    fit(module, [Throughput()], max_steps=3, logger=logger, log_every_n_steps=1)
    rows = read_rows(logger)
    assert len(rows) == 2
    assert all(float(row["speed/seconds_per_batch"]) > 0 for row in rows)
    for row in rows:
        wait, share, whole = (
            float(row[f"speed/{name}"]) for name in ("data_wait", "data_wait_share", "seconds_per_batch")
        )
        assert 0 <= share <= 1
        assert wait == pytest.approx(share * whole, rel=1e-3, abs=1e-6)
    assert all(float(row["speed/prompt_tokens_per_second"]) > 0 for row in rows)


def test_previews_are_drawn_for_every_task(fit, module, bench, tmp_path: Path) -> None:
    fit(module, [Previews(str(bench[0]), str(bench[1]), every_n_steps=1)])
    folder = tmp_path / "run/previews"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    files = ["common_object_8.png", "diff_0.png", "region_4.png"]
    assert names == [f"step_{step:06d}/{name}" for step in (1, 2) for name in files]
    texts = json.loads((folder / "step_000002" / PREVIEW_TEXTS).read_text())
    assert sorted(text["file"] for text in texts) == files and all(text["question"] for text in texts)


def test_previews_that_cannot_be_written_are_warned_of(fit, module, bench, small_disk, caplog) -> None:
    small_disk.fill()
    fit(module, [Previews(str(bench[0]), str(bench[1]), folder=str(small_disk.root / "previews"))])
    assert "the previews of step 2 are not kept" in caplog.text
    assert not list(small_disk.root.rglob("*.png"))


def test_a_preview_whose_image_has_gone_meanwhile_is_left_out(fit, module, bench, tmp_path: Path) -> None:
    class Loses(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            (bench[1] / "MIG-Bench/images/diff/0_1.png").unlink(missing_ok=True)

    fit(module, [Loses(), Previews(str(bench[0]), str(bench[1]))])
    names = sorted(path.name for path in (tmp_path / "run/previews").rglob("*.png"))
    assert names == ["common_object_8.png", "region_4.png"]


def prediction(sample: Sample, text: str, box, failure: str | None) -> Prediction:
    given = (sample.id, "diff", "diff", sample.answer, text, BoxFormat.NORMALIZED, (), 1, True, None)
    return Prediction(*given, value=0.2, read=box, failure=failure)


GREEN, RED, WHITE = (0x00, 0xA0, 0x00), (0xE0, 0x20, 0x20), (255, 255, 255)


def test_a_preview_shows_every_image_and_both_boxes_in_their_colours(bench) -> None:
    sample = replace(load_mig_bench(bench[0])[0], answer=BoxAnswer(1, (0.1, 0.2, 0.5, 0.6), ""))
    answer = prediction(sample, "because", (0.9, 0.4, 0.2, 3.0), None)
    picture = draw_preview([Image.new("RGB", (316, 158), colour) for colour in ("blue", "white")], sample, answer)
    assert picture.size == (640, LINE_HEIGHT + 158 + GAP + LINE_HEIGHT), "two images beside each other, and the legend"
    assert picture.getpixel((158, LINE_HEIGHT + 60)) == (0, 0, 255), "the first image has no box"
    left, top = 316 + GAP, LINE_HEIGHT
    assert picture.getpixel((left + 32, top + 60)) == GREEN, "the left side of the true box"
    assert picture.getpixel((left + 150, top + 64)) == RED, "the top of the predicted box, with its sides put in order"
    legend = [picture.getpixel((x, picture.height - LINE_HEIGHT + 8)) for x in (3, 111)]
    assert legend == [GREEN, RED]
    assert describe_preview(sample, answer)["result"] == "IoU 0.20"


def test_a_preview_of_several_boxes_has_them_on_their_images(bench) -> None:
    truth = BoxesAnswer((BoxAnswer(0, (0.1, 0.2, 0.5, 0.6), ""), BoxAnswer(1, (0.1, 0.2, 0.5, 0.6), "")))
    sample = replace(load_mig_bench(bench[0])[0], answer=truth)
    answer = replace(prediction(sample, "text", ((1, 0.6, 0.5, 0.9, 0.9),), None), f1=0.5)
    picture = draw_preview([Image.new("RGB", (316, 158), "white")] * 4, sample, answer)
    assert picture.width == 640 and len(answer.read) == 1
    side = (640 - 2 * GAP) // 3
    second, down = side + GAP, LINE_HEIGHT
    height = round(158 * side / 316)
    assert picture.getpixel((round(0.1 * side), down + height // 2)) == GREEN
    assert picture.getpixel((second + round(0.1 * side), down + height // 2)) == GREEN
    assert picture.getpixel((second + round(0.75 * side), down + round(0.5 * height))) == RED
    assert picture.getpixel((round(0.75 * side), down + round(0.5 * height))) == WHITE
    assert picture.height > 2 * height, "the fourth image is in a second row"
    assert describe_preview(sample, answer)["result"] == "F1 0.50"


def test_a_preview_of_an_answer_without_a_box_is_drawn(bench) -> None:
    sample = load_mig_bench(bench[0])[0]
    answer = prediction(sample, "", None, "empty")
    assert draw_preview([Image.new("L", (90, 900))], sample, answer).size > (640, 6400)
    assert describe_preview(sample, answer)["result"] == "no box: empty"


@resuming
@pytest.mark.parametrize(("signum", "error"), [(signal.SIGINT, SystemExit), (signal.SIGTERM, SIGTERMException)])
def test_a_signal_saves_a_checkpoint_behind_the_batch_and_a_resume_loses_nothing(
    fit, module, tiny_model_dir, tmp_path: Path, signum: int, error: type[BaseException]
) -> None:
    whole = FakeModule(str(tiny_model_dir), module.engine)
    fit(whole, [], max_steps=5)
    before = signal.getsignal(signum)
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=False, every_n_train_steps=100)
    with pytest.raises(error) as caught:
        fit(module, [SaveOnInterrupt(), checkpoints, Sends(signum)], max_steps=5, enable_checkpointing=True)
    assert caught.value.code == (1 if signum == signal.SIGINT else 143)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves Ctrl-C ignored
    assert signum == signal.SIGINT or signal.getsignal(signum) == before
    assert module.seen == whole.seen[:4]
    path = tmp_path / "ckpt/interrupted.ckpt"
    assert path.is_file()
    resumed = FakeModule(str(tiny_model_dir), module.engine)
    fit(resumed, [SaveOnInterrupt(), checkpoints], max_steps=5, enable_checkpointing=True, ckpt_path=path)
    assert resumed.seen == whole.seen[4:]
    assert not path.exists()


@resuming
def test_a_run_stopped_in_its_last_batch_keeps_its_last_checkpoint(fit, tiny_model_dir, tmp_path: Path) -> None:
    """Resuming it trains nothing, so no other checkpoint of its last state is written."""

    def callbacks() -> list[Callback]:
        return [SaveOnInterrupt(), WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=2)]

    first, resumed = (FakeModule(str(tiny_model_dir), FakeEngine(true_answer)) for _ in range(2))
    given = {"max_steps": 3, "enable_checkpointing": True}
    with pytest.raises(SIGTERMException):
        fit(first, [*callbacks(), Sends(signal.SIGTERM, batch=3)], **given)
    fit(resumed, callbacks(), ckpt_path=tmp_path / "ckpt/interrupted.ckpt", **given)
    assert resumed.seen == []
    assert newest(tmp_path / "ckpt").name == "step-00000003.ckpt"
    assert not (tmp_path / "ckpt/interrupted.ckpt").exists()


@resuming
@pytest.mark.parametrize(("batch", "finished"), [(3, 0), (8, 8), (10, 8), (11, 8), (12, 12), (15, 12)])
def test_a_run_stopped_inside_a_window_trains_every_sample_of_its_epochs(
    fit, tiny_model_dir, tmp_path: Path, batch: int, finished: int
) -> None:
    whole, first, resumed = (Windows(str(tiny_model_dir)) for _ in range(3))
    fit(whole, [], **TWO_EPOCHS)
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=100)
    given = TWO_EPOCHS | {"enable_checkpointing": True}
    with pytest.raises(SIGTERMException):
        fit(first, [SaveOnInterrupt(), checkpoints, Sends(signal.SIGTERM, batch=batch)], **given)
    trainer = fit(resumed, [checkpoints], ckpt_path=tmp_path / "ckpt/interrupted.ckpt", **given)
    assert first.seen == whole.seen[: 2 * batch]
    assert resumed.seen == whole.seen[2 * finished :]
    assert trainer.global_step == 5 and trainer.current_epoch == 2
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 20  # what metrics are logged at


@resuming
def test_a_checkpoint_of_an_epochs_end_inside_a_window_resumes_there(fit, tiny_model_dir, tmp_path: Path) -> None:
    whole, resumed = Windows(str(tiny_model_dir)), Windows(str(tiny_model_dir))
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    given = TWO_EPOCHS | {"enable_checkpointing": True}
    fit(whole, [checkpoints], **given)
    trainer = fit(resumed, [checkpoints], ckpt_path=tmp_path / "ckpt/epoch=0.ckpt", **given)
    assert resumed.seen == whole.seen[2 * 8 :]
    assert trainer.global_step == 5 and trainer.fit_loop.epoch_loop._batches_that_stepped == 20


@resuming
@pytest.mark.parametrize(("batch", "finished"), [(17, 15), (18, 18), (19, 18), (20, 20)])
def test_a_run_stopped_around_its_trailing_batches_steps_them_once(
    fit, tiny_model_dir, tmp_path: Path, batch: int, finished: int
) -> None:
    """20 batches in windows of 3: six, and one of two batches."""
    whole, first, resumed = (Windows(str(tiny_model_dir), accumulate=3) for _ in range(3))
    assert fit(whole, [], **TWO_EPOCHS).global_step == 7
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=100)
    given = TWO_EPOCHS | {"enable_checkpointing": True}
    with pytest.raises(SIGTERMException):
        fit(first, [SaveOnInterrupt(), checkpoints, Sends(signal.SIGTERM, batch=batch)], **given)
    trainer = fit(resumed, [checkpoints], ckpt_path=tmp_path / "ckpt/interrupted.ckpt", **given)
    assert resumed.seen == whole.seen[2 * finished :]
    assert trainer.global_step == 7 and not resumed.window_is_open
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


class Handlers(Callback):
    """What SIGTERM would meet once the guard is out of the way."""

    def __init__(self) -> None:
        self.found: list = []

    def on_train_end(self, *_) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))

    def on_exception(self, *_) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_sigterm_behind_the_last_batch_does_not_meet_lightnings_handler(fit, module, stopped: bool) -> None:
    """That one calls a collective, where other ranks are in another: the last checkpoint, or the end."""
    before, handlers = signal.getsignal(signal.SIGTERM), Handlers()
    callbacks = [SaveOnInterrupt(), handlers, *([Sends(signal.SIGTERM)] if stopped else [])]
    with pytest.raises(SIGTERMException) if stopped else nullcontext():
        fit(module, callbacks, max_steps=3)
    assert handlers.found == [before]


def test_lost_servers_on_a_full_disk_are_told_of(fit, tiny_model_dir, small_disk, caplog) -> None:
    class Lost(FakeModule):
        def training_step(self, batch, batch_idx):
            small_disk.fill()
            raise ServersLost("both are gone")

    checkpoints = ModelCheckpoint(small_disk.root / "ckpt", every_n_train_steps=100)
    module = Lost(str(tiny_model_dir), FakeEngine(true_answer))
    with pytest.raises(ServersLost, match="both are gone"):
        fit(module, [SaveOnInterrupt(), checkpoints], plugins=[WholeCheckpoints()], enable_checkpointing=True)
    assert "no checkpoint at step 0" in caplog.text


def test_a_second_ctrl_c_stops_at_once(fit, module, tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=100)
    with pytest.raises(SystemExit):
        fit(module, [SaveOnInterrupt(), checkpoints, Sends(signal.SIGINT, times=2)], enable_checkpointing=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert len(module.seen) == 2
    assert not (tmp_path / "ckpt/interrupted.ckpt").exists()


def test_a_rank_that_cannot_write_the_adapter_takes_part_in_the_merge(fit, module, monkeypatch) -> None:
    """Merging gathers the weights of all ranks: without this rank the others would wait forever."""

    def fill_up(*_: object) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(module.policy, "save_adapter", fill_up)
    with pytest.raises(RunStopped, match=r"the merged model: .*no space left"):
        fit(module, [MergeAdapter()])
    assert len(module.policy.merged) == 1
