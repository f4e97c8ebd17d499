"""Encode samples for evaluation and sampling, in the same way as in training, one chunk ahead of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lightning.pytorch import LightningModule

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.streaming.prefetch import prefetch
from lightning_modules.rollouts.base import RolloutEngine
from lightning_modules.rollouts.native.engine import NativeEngine

T = TypeVar("T")


def prompt_encoder(encoder: Encoder, max_prompt_tokens: int | None = None) -> Encoder:
    """The encoder of training without targets, so that prompts are the same as in training."""
    encoder = copy.copy(encoder)
    encoder.with_target = False
    encoder.max_prompt_tokens = max_prompt_tokens or encoder.max_prompt_tokens
    return encoder


def rollout_engine(pl_module: LightningModule) -> RolloutEngine:
    """The engine of the module, or an engine in this process."""
    return getattr(pl_module, "engine", None) or NativeEngine(pl_module.policy)


def encode_ahead(
    encoder: Encoder, chunks: Sequence[Sequence[T]], load: Callable[[T], LoadedSample]
) -> Iterator[list[tuple[T, EncodedSample | SampleError]]]:
    """Yields each chunk with its encoded samples; a refused sample is replaced by its error.

    A thread encodes the next chunk while the caller works on the current one. At most one chunk is encoded in advance.
    """

    def encode(member: T) -> EncodedSample | SampleError:
        try:
            return encoder.encode(load(member))
        except SampleError as error:
            return error

    def encode_chunk(chunk: Sequence[T]) -> list[tuple[T, EncodedSample | SampleError]]:
        return [(member, encode(member)) for member in chunk]

    return prefetch(map(encode_chunk, chunks), num_ahead=1)
