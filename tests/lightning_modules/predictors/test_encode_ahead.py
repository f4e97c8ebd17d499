from __future__ import annotations

from pathlib import Path

import torch

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.samples.sample import LoadedSample, SampleError
from lightning_modules.predictors.encode_ahead import encode_ahead, prompt_encoder
from tests.datamodules.encoding.tiny_processor import make_sample, save_tiny_processor


def test_evaluation_shares_no_processor_with_the_thread_that_encodes_for_training(tmp_path: Path) -> None:
    training = Encoder(str(save_tiny_processor(tmp_path)), "absolute_pixels", "think", 500, 100, with_target=True)
    assert training.processor is training.processor
    evaluating = prompt_encoder(training)
    assert evaluating.processor is not training.processor
    loaded = make_sample("a")
    assert torch.equal(evaluating.encode(loaded).input_ids, training.encode(loaded).input_ids)


def test_chunks_come_in_order_with_refusals_in_place(tmp_path: Path) -> None:
    encoder = Encoder(str(save_tiny_processor(tmp_path)), "absolute_pixels", "think", 500, 100, with_target=False)
    asked: list[str] = []

    def load(name: str) -> LoadedSample:
        asked.append(name)
        if name == "bad":
            raise SampleError(name, "missing_image")
        return make_sample(name)

    chunks = [["a", "b"], ["bad"], ["c"], ["d"]]
    for chunk, encoded in zip(chunks, encode_ahead(encoder, chunks, load), strict=True):
        assert [name for name, _ in encoded] == chunk
        assert all(isinstance(item, SampleError if name == "bad" else EncodedSample) for name, item in encoded)
    assert asked == ["a", "b", "bad", "c", "d"]
    assert list(encode_ahead(encoder, [], load)) == []
