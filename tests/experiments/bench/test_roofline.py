"""The lower bound against counts made another way: torch's own counter of operations, and sums written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datamodules.encoding.encoder import Encoder
from experiments.bench.roofline import Peaks, Sizes, Work, machine_peaks, step_work
from experiments.bench.shapes import model_folder
from experiments.bench.workload import Workload, make_samples
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.layers import onednn_linear
from lightning_modules.models.qwen_vl import QwenVL


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("tiny", tmp_path_factory.mktemp("models"))


def test_a_forward_pass_counts_as_torch_counts_it(tiny: Path, monkeypatch) -> None:
    workload = Workload(task="sft", prompts=2, group_size=1, completion_tokens=8, images=2, image_size=(56, 56))
    encoder = Encoder(str(tiny), "absolute_pixels", "think", 4096, 512, with_target=True)
    items = [encoder.encode(sample) for sample in make_samples(workload)[:2]]
    policy = QwenVL(str(tiny))
    rows = pack_rows(items, [[item.completion_ids] for item in items], 4096)
    monkeypatch.setattr(onednn_linear, "_ONEDNN", None)  # the counter does not know oneDNN's products
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        features = policy.encode_images(items)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        for row in rows:
            policy.token_log_probs(row, features)
    counts = [sum(len(item.input_ids) for item in items), sum(len(item.completion_ids) for item in items)]
    work = step_work(Sizes.read(tiny), workload, *counts, sum(len(item.pixel_values) for item in items))
    # The counter does not know that half of a causal product is masked, nor that the last token goes in for nothing,
    # and the lower bound counts LoRA, which this policy does not have.
    lora = 2 * Sizes.read(tiny).lora_weights(workload.lora_rank) * sum(counts)
    assert work["forward"].operations - lora == pytest.approx(forward.get_total_flops(), rel=0.15)
    assert work["encode"].operations == pytest.approx(encoding.get_total_flops(), rel=0.15)


def test_the_weights_counted_are_those_of_the_model(tiny: Path) -> None:
    policy, sizes = QwenVL(str(tiny)), Sizes.read(tiny)
    layers = policy.base.model.language_model.layers
    assert sizes.layer_weights == sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert sizes.head_weights == policy.base.lm_head.weight.numel()


def test_decoding_reads_weights_each_step_and_a_prompt_once_for_its_group(tiny: Path) -> None:
    sizes = Sizes.read(tiny)

    def read(group_size: int, length: int, prompt_tokens: int = 100) -> float:
        workload = Workload(prompts=1, group_size=group_size, completion_tokens=length)
        return step_work(sizes, workload, prompt_tokens, group_size * length, 16)["decode"].bytes

    assert read(1, 1) == 0  # the prefill gives the first token
    a_token = 2 * sizes.kv_width * sizes.layers * 4
    weights = 4 * (sizes.layer_weights + sizes.head_weights)
    assert read(1, 3) == pytest.approx(2 * (weights + a_token * (100 + 1.5)))
    assert read(8, 3) - read(1, 3) == pytest.approx(2 * a_token * 7 * 1.5)
    assert read(8, 3, prompt_tokens=200) - read(8, 3) == pytest.approx(2 * a_token * 100)


def test_no_reference_without_beta_and_no_rollout_in_sft(tiny: Path) -> None:
    sizes = Sizes.read(tiny)
    assert "reference" in step_work(sizes, Workload(), 100, 1024, 96)
    assert "reference" not in step_work(sizes, Workload(beta=0.0), 100, 1024, 96)
    sft = step_work(sizes, Workload(task="sft", group_size=1), 100, 128, 96)
    assert set(sft) == {"encode", "forward", "backward", "optimizer"}


def test_a_phase_takes_the_longer_of_its_two_times() -> None:
    peaks = Peaks(operations=100.0, bandwidth=10.0, source="stated")
    assert Work(1000.0, 10.0).seconds(peaks) == 10.0
    assert Work(100.0, 50.0).seconds(peaks) == 5.0


def test_the_measured_peaks_of_this_machine_are_rates() -> None:
    peaks = machine_peaks()
    assert peaks.operations > 1e8
    assert peaks.bandwidth > 1e7
