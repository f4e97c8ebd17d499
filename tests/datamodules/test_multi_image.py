from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.encoding.encoder import Batch, EncodedSample
from datamodules.multi_image import MultiImageData
from datamodules.samples.sample import SampleError
from datamodules.streaming import workers
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from datamodules.streaming.workers import WorkersFailed
from tests.datamodules import trainer_process
from tests.datamodules.encoding.tiny_processor import declare, make_sample, save_tiny_processor
from tests.datamodules.image_mutations import encoded, pixels, seeds

NUM_SAMPLES = 17  # 5 batches of 3; one sample is damaged, one is over


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 4; the second image of s6 is lost. With seed 5, s6 is the first sample of the first epoch."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=4) as writer:
        for index in range(NUM_SAMPLES):
            writer.add(make_sample(f"s{index}", ((28, 28), (56, 28))))
    path = folder / "shard-00001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"00001_000002.1.png", b"00001_000002.7.png", 1))
    declare(folder)
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_processor(tmp_path_factory.mktemp("processor"))


def make_data(shards: Path, processor: Path, **settings: Any) -> MultiImageData:
    defaults = {"batch_size": 3, "seed": 5, "shuffle_buffer": 5, "max_prompt_tokens": 500, "max_completion_tokens": 100}
    return MultiImageData(str(shards), str(processor), **(defaults | settings))


def undisturbed(shards: Path, tmp_path: Path, rank: int = 0, world_size: int = 1) -> list[list[str]]:
    saved: dict[str, Any] = {"state": None, "ids": []}
    data = trainer_process.make_data(str(shards), 0, rank, world_size)
    trainer_process.train(data, saved, tmp_path / "undisturbed.json", stop_at=0)
    return saved["ids"]


def start(shards: Path, state_file: Path, num_workers: int, stop_at: int, *rest: str) -> subprocess.Popen[str]:
    arguments = [str(shards), str(state_file), str(num_workers), str(stop_at), *rest]
    return subprocess.Popen([sys.executable, trainer_process.__file__, *arguments], stdout=subprocess.PIPE, text=True)


def kill_when_saved(process: subprocess.Popen[str]) -> None:
    with process:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers_before", "workers_after", "stop_at"),
    [(0, 0, 3), (2, 2, 7), (0, 2, 5), (2, 0, 10)],
    ids=["no workers", "two workers", "end of the first epoch", "end of the second epoch"],
)
def test_resume_after_sigkill_loses_and_repeats_nothing(
    shards: Path, tmp_path: Path, workers_before: int, workers_after: int, stop_at: int
) -> None:
    state_file = tmp_path / "state.json"
    kill_when_saved(start(shards, state_file, workers_before, stop_at))
    assert len(json.loads(state_file.read_text())["ids"]) == stop_at
    with start(shards, state_file, workers_after, 0) as process:
        assert process.wait() == 0
    ids = json.loads(state_file.read_text())["ids"]
    assert ids == undisturbed(shards, tmp_path)
    for epoch in range(trainer_process.NUM_EPOCHS):
        seen = [sample_id for batch in ids[5 * epoch : 5 * epoch + 5] for sample_id in batch]
        assert len(seen) == len(set(seen)) == 15 and "s6" not in seen


@pytest.mark.slow
def test_two_ranks_resume_after_sigkill_from_the_state_of_the_first(shards: Path, tmp_path: Path) -> None:
    # Only rank 0 meets the damaged sample: the state that rank 0 saves must hold the places of both.
    files = [tmp_path / "rank0.json", tmp_path / "rank1.json"]

    def launch(name: str, stop_at: int) -> list[subprocess.Popen[str]]:
        rest = [(str(rank), "2", str(tmp_path / name)) for rank in range(2)]
        return [start(shards, files[rank], 0, stop_at, *rest[rank]) for rank in range(2)]

    for process in launch("before", 1):
        kill_when_saved(process)
    saved = [json.loads(file.read_text()) for file in files]
    assert saved[0]["state"] == saved[1]["state"]
    files[1].write_text(json.dumps({"state": saved[0]["state"], "ids": saved[1]["ids"]}))
    for process in launch("after", 0):
        with process:
            assert process.wait() == 0
    for rank in range(2):
        expected = undisturbed(shards, tmp_path, rank, world_size=2)
        assert json.loads(files[rank].read_text())["ids"] == expected


class Recorder(LightningModule):
    """Trains one number and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch.sample_ids)
        self.trainer.datamodule.mark_trained(batch)
        return self.weight * sum(float(item.pixel_values.mean()) for item in batch.items)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: MultiImageData, folder: Path, max_epochs: int, ckpt_path: Path | None = None) -> Recorder:
    module = Recorder()
    checkpoints = [
        ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(folder, "end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        callbacks=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # on purpose: all runs share one
def test_lightning_resumes_from_every_checkpoint(shards: Path, processor: Path, tmp_path: Path) -> None:
    whole = fit(make_data(shards, processor), tmp_path, max_epochs=2)
    assert len(whole.seen) == 10
    checkpoints = {f"step={step}.ckpt": step for step in range(1, 10)} | {"end-epoch=0.ckpt": 5}
    for name, step in checkpoints.items():
        rest = fit(make_data(shards, processor), tmp_path, max_epochs=2, ckpt_path=tmp_path / name)
        assert rest.seen == whole.seen[step:], name
        torch.testing.assert_close(rest.weight, whole.weight)


def test_batches_are_encoded_and_carry_their_position(shards: Path, processor: Path) -> None:
    data = make_data(shards, processor, num_workers=1)
    alone = make_data(shards, processor).train_dataloader()
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [3] * 5
    assert batches[1].position["batch"] == 2 and batches[-1].position["epoch"] == 1
    for batch, other in zip(batches, alone, strict=True):
        for item, twin in zip(batch.items, other.items, strict=True):
            assert item.sample == twin.sample and torch.equal(item.pixel_values, twin.pixel_values)
            assert item.completion_ids is not None and item.image_sizes == twin.image_sizes
    assert data.rejections.counts == {"missing_image": 1}


def test_batches_of_the_thread_are_those_encoded_one_by_one(shards: Path, processor: Path) -> None:
    data, alone = make_data(shards, processor), make_data(shards, processor)
    reader, loader = ShardReader(str(shards)), data.train_dataloader()
    numbers = [number for number in loader.stream.order(0) if reader.find({"s6"})["s6"] != number]
    for batch, other in zip(loader, loader, strict=True):  # two threads with one reader and one processor
        for item, again in zip(batch.items, other.items, strict=True):
            true = alone.encoder.encode(reader.read(numbers.pop(0)))
            for field in fields(EncodedSample):
                values = [getattr(each, field.name) for each in (item, again, true)]
                is_tensor = isinstance(values[0], torch.Tensor)
                assert all(torch.equal(value, values[2]) if is_tensor else value == values[2] for value in values)


def test_state_survives_until_there_is_a_loader(shards: Path, processor: Path) -> None:
    data = make_data(shards, processor)
    assert data.state_dict() == {}
    batches = iter(data.train_dataloader())
    data.mark_trained(next(batches))
    state = data.state_dict()
    expected = next(batches).sample_ids
    resumed = make_data(shards, processor)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(2):  # also when the loader is made anew
        assert next(iter(resumed.train_dataloader())).sample_ids == expected


def test_samples_that_cannot_be_encoded_are_counted_with_those_that_cannot_be_read(
    shards: Path, processor: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(shards, processor, max_image_pixels=56 * 28 - 1)
    with pytest.raises(ValueError, match=r"no usable sample.*decompression_bomb 16.*missing_image 1 "):
        list(data.train_dataloader())
    data.teardown("fit")
    assert "17 samples rejected" in caplog.text


def test_images_that_no_decoder_takes_are_counted_and_training_goes_on(processor: Path, tmp_path: Path) -> None:
    whole = [make_sample(f"s{index}", ((28, 28), (56, 28))) for index in range(6)]
    dds, eps = (seeds(kind)[0] for kind in ("DDS", "EPS"))
    spoilt = {1: dds[:150], 2: eps, 4: without_end(encoded(pixels(1), "PNG"))}
    if avif := seeds("AVIF"):
        spoilt[5] = without_end(avif[1])
    with ShardWriter(tmp_path) as writer:
        for index, loaded in enumerate(whole):
            images = (loaded.images[0], spoilt.get(index, loaded.images[1]))
            writer.add(replace(loaded, images=images))
    data = make_data(tmp_path, processor, batch_size=1)
    ids = {batch.sample_ids[0] for batch in data.train_dataloader()}
    assert ids == {f"s{index}" for index in range(6) if index not in spoilt}
    assert data.rejections.counts == {"unreadable_image": 2, "truncated_image": len(spoilt) - 2}


def without_end(data: bytes) -> bytes:
    """The file cut in its pixels."""
    return data[: len(data) - 40]


def test_pixels_of_a_sample_are_bounded_by_a_setting(shards: Path, processor: Path) -> None:
    data = make_data(shards, processor, max_sample_pixels=28 * 28 + 56 * 28 - 1)
    with pytest.raises(ValueError, match=r"no usable sample.*too_many_pixels 16"):
        list(data.train_dataloader())


def test_strict_data_raises(shards: Path, processor: Path) -> None:
    with pytest.raises(SampleError, match="'s6': missing_image"):
        list(make_data(shards, processor, strict=True).train_dataloader())


def test_bad_settings_are_named_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=0 must be at least 1; num_workers=-1 .*worker_timeout=0 .*; shards=\[\]"
    ):
        MultiImageData([], "unused", batch_size=0, num_workers=-1, worker_timeout=0)


@pytest.mark.parametrize(("free", "outcome"), [(10**5, "refused"), (10**7, "warned"), (10**12, "silent")])
def test_shared_memory_is_measured_before_training(
    shards: Path, processor: Path, tmp_path: Path, monkeypatch, caplog, free: int, outcome: str
) -> None:
    monkeypatch.setattr(workers, "free_bytes", lambda folder: free)
    data = make_data(shards, processor, num_workers=2)
    if outcome == "refused":
        with pytest.raises(WorkersFailed, match=r"0 MiB free, but the workers .*up to 12 samples"):
            fit(data, tmp_path / "with", max_epochs=1)
    else:
        assert len(fit(data, tmp_path / "with", max_epochs=1).seen) == 5
    assert ("if all were as long as max_prompt_tokens admits" in caplog.text) == (outcome == "warned")
    fit(make_data(shards, processor), tmp_path / "without", max_epochs=1)  # without workers, none is needed


def test_the_largest_sample_is_that_of_the_longest_prompt(shards: Path, processor: Path) -> None:
    """A sample all of images, as many tokens as are admitted, has as many bytes."""
    data = make_data(shards, processor)
    item = next(iter(data.train_dataloader())).items[0]
    merged = data.encoder.processor.image_processor.merge_size**2
    tokens = len(item.pixel_values) // merged
    data.encoder.max_prompt_tokens = tokens
    assert workers.largest_pixels(data.encoder) == item.pixel_values.nbytes


def test_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        MultiImageData(str(tmp_path / "nowhere"), "unused").train_dataloader()
