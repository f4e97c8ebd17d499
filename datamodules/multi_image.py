"""The LightningDataModule of both phases: batches of encoded samples from shards, with exact resume."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from datamodules.encoding.encoder import Batch, EncodedSample, Encoder
from datamodules.encoding.messages import PromptStyle
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.samples.boxes import BoxFormat, BoxFormatName
from datamodules.samples.sample import LoadedSample, Rejections, SampleError
from datamodules.samples.scores import require_box
from datamodules.streaming.shards import ShardReader
from datamodules.streaming.stream import WORKER_SECONDS, BatchLoader, ShardStream, num_samples_held
from datamodules.streaming.workers import WorkersFailed, check_room, largest_pixels

logger = logging.getLogger(__name__)

NUM_MEASURED = 8  # samples that are encoded to see how large one is, where that matters


def encode_for_training(encoder: Encoder, loaded: LoadedSample) -> EncodedSample:
    """An item that a phase can learn from: both need an answer of one box, CoT-SFT to write it and GRPO to reward it.
    Raises SampleError: "no_box_answer", before any image is decoded, and the rules of `Encoder.encode`."""
    require_box(loaded.sample)
    return encoder.encode(loaded)


class MultiImageData(LightningDataModule):
    """Training batches from folders of shards (one path or several).

    The LightningModule calls `mark_trained(batch)` at the end of its training step; a checkpoint then resumes with the
    very next batch. `batch_size` is per rank. `strict` raises the first rejected sample instead of counting it.
    `verify_shards` compares the sha256 of each shard with its manifest when it is first read (`ShardReader`).
    `num_workers` processes encode samples; each may take `worker_timeout` seconds for one sample. A worker that dies,
    is stopped, or cannot hand its samples over ends the run with WorkersFailed.
    """

    def __init__(
        self,
        shards: str | list[str],
        processor: str,
        box_format: BoxFormatName = "absolute_pixels",
        style: Literal["think", "answer", "plain", "official"] = "think",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        with_target: bool = True,
        max_prompt_tokens: int = 4096,
        max_completion_tokens: int = 1024,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_sample_pixels: int = MAX_SAMPLE_PIXELS,
        max_resized_pixels: int | None = None,
        label_images: bool = False,
        strict: bool = False,
        verify_shards: bool = True,
        worker_timeout: float = WORKER_SECONDS,
    ) -> None:
        super().__init__()
        low = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "shuffle_buffer": (shuffle_buffer, 1)}
        faults = [f"{name}={value} is below {least}" for name, (value, least) in low.items() if value < least]
        if not worker_timeout > 0:
            faults.append(f"worker_timeout={worker_timeout} must be greater than 0")
        if not shards:
            faults.append(f"shards={shards!r} names no folder")
        if faults:
            raise ValueError("; ".join(faults))
        self.shards, self.batch_size, self.num_workers = shards, batch_size, num_workers
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.verify_shards, self.worker_timeout = verify_shards, worker_timeout
        self.rejections = Rejections(strict)
        self.encoder = Encoder(
            processor,
            BoxFormat(box_format),
            PromptStyle(style),
            max_prompt_tokens,
            max_completion_tokens,
            with_target,
            max_image_pixels,
            max_sample_pixels,
            max_resized_pixels,
            label_images,
        )
        self._loader: BatchLoader | None = None
        self._state: dict[str, Any] = {}  # until there is a loader

    def setup(self, stage: str) -> None:
        """Before rejection sampling, which may take hours. Raises WorkersFailed where workers cannot hand over samples
        of usual size; warns where they cannot those of the largest."""
        if stage == "fit" and self.num_workers:
            held, ranks = num_samples_held(self.batch_size, self.num_workers), self.trainer.num_devices
            warning = check_room(held, largest_pixels(self.encoder), self._mean_pixels, ranks)
            if warning and self.trainer.is_global_zero:
                logger.warning(warning)

    def train_dataloader(self) -> BatchLoader:
        stream, state = self._stream(), self.state_dict()
        self._loader = BatchLoader(stream, self.batch_size, self.num_workers, self.rejections, self.worker_timeout)
        if state:
            self._loader.load_state_dict(state)
        if self.num_workers:
            _ = self.encoder.processor  # loaded before the workers are forked, not in each of them in each epoch
        return self._loader

    def workers_failure(self, error: BaseException) -> WorkersFailed | None:
        """The message for a worker that has ended, if `error` reports one; None for any other error."""
        workers = self._loader.workers if self._loader is not None else None
        return workers.failure(error) if workers is not None else None

    def mark_trained(self, batch: Batch) -> None:
        """`batch` has been trained on: a state taken from here on resumes after it."""
        assert self._loader is not None, "the batch does not come from train_dataloader"
        self._loader.mark_trained(batch)

    def reorder(self, number: int) -> None:
        """Take the samples from here on in another order (0 is the first): what was seen of an epoch may come again."""
        assert self._loader is not None, "there is no train_dataloader yet"
        self._loader.stream.reorder(number)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict() if self._loader is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        if self._loader is not None:
            self._loader.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        if self._loader is not None:
            self._loader.report()

    def _stream(self) -> ShardStream:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        reader = ShardReader(self.shards, self.verify_shards)
        encode = partial(encode_for_training, self.encoder)
        return ShardStream(reader, encode, self.seed, rank, world_size, self.shuffle_buffer)

    def _mean_pixels(self) -> int:
        """Bytes of pixel values of a sample, by the first that can be used; 0 where there is none."""
        values = (slot.value for slot in self._stream().window(0, 0, NUM_MEASURED))
        sizes = [value.pixel_values.nbytes for value in values if not isinstance(value, SampleError)]
        return sum(sizes) // max(1, len(sizes))
