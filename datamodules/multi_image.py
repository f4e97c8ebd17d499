"""The LightningDataModule of both phases: batches of encoded samples from shards, with exact resume."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from datamodules.encoding.encoder import Batch, EncodedSample, Encoder
from datamodules.encoding.messages import PromptStyle
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.persistence.problems import Problems
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat, BoxFormatName
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.samples.scores import require_boxes
from datamodules.streaming.epoch_order import Order
from datamodules.streaming.remote_cache import CacheSettings
from datamodules.streaming.resumable_loader import WORKER_SECONDS, BatchLoader, num_samples_held
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import mixing_weights, source_faults
from datamodules.streaming.stream import ShardStream
from datamodules.streaming.url_openers import FetchError
from datamodules.streaming.workers import WorkersFailed, check_room, largest_pixels

logger = logging.getLogger(__name__)

NUM_MEASURED = 8  # samples that are encoded in advance to measure the usual size of a sample


def encode_for_training(encoder: Encoder, loaded: LoadedSample) -> EncodedSample:
    """Encode a sample that training can use. Both CoT-SFT and GRPO need an answer with a box; with the form that names
    images it may have several.

    Raises:
        SampleError: with the rule "no_box_answer", or with a rule of `Encoder.encode`.
    """
    require_boxes(loaded.sample, encoder.answer_form)  # first, because it costs no decoding
    return encoder.encode(loaded)


class MultiImageData(LightningDataModule):
    """Training batches from local or remote shards.

    The LightningModule calls `mark_trained(batch)` when it has used a batch. A run that resumes from a checkpoint
    continues with the batch after the last marked batch.

    Args:
        shards: a source of shards (a folder, a brace list, a URL, a command: `streaming/shard_sources.py`), a list of
            sources, or a mapping {source: weight} that mixes them. A remote shard that cannot be fetched ends the run
            with FetchError.
        processor: folder or Hub name of the model's processor.
        box_format: the meaning of the numbers that the model reads and writes.
        style: the text after the question (`PromptStyle`).
        answer_form: "one_box" is the paper's answer. With "named_image" answers have one or several boxes, and each
            names its image by number; "label_images" should then be set, so that the images have numbers.
        batch_size: samples of one batch on one rank.
        num_workers: processes that encode samples; 0 encodes in this process. If a worker dies, is stopped, or cannot
            hand over its samples, the run ends with WorkersFailed.
        seed: seed of the order of samples.
        shuffle_buffer: number of samples in the buffer, or in one block, in which the order is shuffled.
        order: "buffer" draws the next sample at random from the buffer; "block" shuffles one block after the other, so
            that few shards are needed at a time.
        with_target: encode the target of supervised training too.
        max_prompt_tokens: a sample with a longer prompt, images included, is rejected.
        max_completion_tokens: a sample with a longer target is rejected.
        max_image_pixels: a stored image with more pixels is refused (decompression bomb).
        max_sample_pixels: a sample whose stored images together have more pixels is refused.
        max_resized_pixels: largest area of an image after resizing; null takes the processor's own limit.
        label_images: write "Picture k: " before image k.
        strict: raise the error of the first rejected sample, instead of counting rejected samples.
        verify_shards: compare the sha256 of each shard with its manifest when the shard is first read.
        worker_timeout: seconds that a worker may take for one sample.
        cache: folder for remote shards, shared by the runs of a machine; null is ~/.cache/multi-image-grounding/shards.
        cache_gib: the largest size of these shards, in GiB; those that were not used for the longest time go first.
    """

    def __init__(
        self,
        shards: str | list[str] | dict[str, float],
        processor: str,
        box_format: BoxFormatName = "absolute_pixels",
        style: Literal["think", "answer", "plain", "official"] = "think",
        answer_form: Literal["one_box", "named_image"] = "one_box",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        order: Order = "buffer",
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
        cache: str | None = None,
        cache_gib: float = 100.0,
    ) -> None:
        super().__init__()
        # All wrong settings are reported together, before anything is loaded.
        problems = Problems()
        problems.at_least(1, batch_size=batch_size, shuffle_buffer=shuffle_buffer)
        problems.at_least(0, num_workers=num_workers)
        problems.positive(worker_timeout=worker_timeout, cache_gib=cache_gib)
        problems += source_faults(shards)
        problems.raise_all("data")
        self.shards, self.batch_size, self.num_workers = shards, batch_size, num_workers
        self.seed, self.shuffle_buffer, self.order = seed, shuffle_buffer, order
        self.cache, self.cache_gib = cache, cache_gib
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
            AnswerForm(answer_form),
        )
        self._loader: BatchLoader | None = None
        self._state: dict[str, Any] = {}  # a checkpoint's state, kept until the loader is made

    def setup(self, stage: str) -> None:
        """Check that shared memory has room for the samples of the workers; warn if the largest ones would not fit.

        Raises:
            WorkersFailed: samples of the usual size do not fit.
        """
        # Lightning calls this before rejection sampling, which may take hours: the error must come first.
        if stage == "fit" and self.num_workers:
            held, ranks = num_samples_held(self.batch_size, self.num_workers), self.trainer.num_devices
            warning = check_room(held, largest_pixels(self.encoder), self._mean_pixels, ranks)
            if warning and self.trainer.is_global_zero:
                logger.warning(warning)

    def train_dataloader(self) -> BatchLoader:
        """The loader of this rank, at the position of the checkpoint if there is one."""
        stream, state = self._stream(), self.state_dict()
        self._loader = BatchLoader(stream, self.batch_size, self.num_workers, self.rejections, self.worker_timeout)
        if state:
            self._loader.load_state_dict(state)
        if self.num_workers:
            _ = self.encoder.processor  # loaded before the workers are forked, so that they need not load it each epoch
        return self._loader

    def workers_failure(self, error: BaseException) -> WorkersFailed | None:
        """The error to show if `error` reports that a worker has ended; None for any other error."""
        workers = self._loader.workers if self._loader is not None else None
        return workers.failure(error) if workers is not None else None

    def mark_trained(self, batch: Batch) -> dict[str, float]:
        """Record that `batch` has been used: `state_dict` now contains the position after it.

        Returns metrics of the data: the actual share of each weighted source so far.
        """
        assert self._loader is not None, "the batch does not come from train_dataloader"
        self._loader.mark_trained(batch)
        return {f"data/share_{k}": share for k, share in enumerate(self._loader.shares())}

    def reorder(self, number: int) -> None:
        """Continue with order `number` of the samples; the run begins with order 0.

        It is used after a rollback, so that the samples differ from those that led to the collapse. Samples of this
        epoch may be repeated.
        """
        assert self._loader is not None, "there is no train_dataloader yet"
        self._loader.stream.reorder(number)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for the checkpoint."""
        return self._loader.state_dict() if self._loader is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position in a checkpoint. Lightning may call this before or after the loader is made."""
        self._state = state_dict
        if self._loader is not None:
            self._loader.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Report the rejected samples."""
        if self._loader is not None:
            self._loader.report()

    def shard_reader(self) -> ShardReader:
        """A reader of all sources, indexed by the number of a sample.

        Raises:
            ValueError: a source or its manifest is not usable.
            FetchError: a manifest cannot be fetched.
        """
        ranks = getattr(self.trainer, "num_devices", 1) if self.trainer else 1  # ranks on this machine share one cache
        cache = CacheSettings(self.cache, self.cache_gib, sharers=ranks)
        return ShardReader(self.shards, self.verify_shards, cache=cache)

    def _stream(self) -> ShardStream:
        """The endless stream of this rank's samples, encoded."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        reader = self.shard_reader()
        return ShardStream(
            reader,
            partial(encode_for_training, self.encoder),
            self.seed,
            rank,
            world_size,
            self.shuffle_buffer,
            reader.fetching_ahead if reader.has_remote else None,
            order=self.order,
            weights=mixing_weights(self.shards),
            spans=reader.spans,
        )

    def _mean_pixels(self) -> int:
        """Mean number of bytes of a sample's pixel values, over the first samples; 0 if none of them is usable."""
        values = [slot.value for slot in self._stream().window(0, 0, NUM_MEASURED)]
        if failed := [value for value in values if isinstance(value, FetchError)]:
            raise failed[0]
        sizes = [value.pixel_values.nbytes for value in values if not isinstance(value, SampleError)]
        return sum(sizes) // max(1, len(sizes))
