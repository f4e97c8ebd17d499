"""GRPO through a real vLLM server on the CPU. It needs the environment that `make vllm-server` makes.

The nano base is trained on questions of one and of two images for ten updates, once through the server, which is killed
and started again in the middle, and once with the native engine.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.encoding.encoder import Encoder
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.synthetic.single_image import GROUNDING, single_scene
from datamodules.synthetic.world import draw_scene, encode_png
from lightning_modules import group_objective
from lightning_modules.grpo import GRPO
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings
from lightning_modules.serving.vllm_server import serve_command, serve_environment
from tests.lightning_modules.grpo_modules import build_grpo

ROOT = Path(__file__).resolve().parents[4]
MODEL = ROOT / "models" / "nano-base"
VENV = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm"))
UPDATES, PROMPTS, GROUP, MAX_NEW = 10, 8, 4, 64
QUANTILE = 3.29  # two-sided 0.1 % of a normal distribution: one false alarm in a thousand runs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (VENV / "bin" / "vllm").exists(), reason=f"no vLLM in {VENV}: make vllm-server MODEL="),
]


class RealServer:
    """`vllm serve` as a process group of its own, that can be killed and started again at its port."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        more = ["--host", "127.0.0.1", "--port", str(self.port), "--max-lora-rank", "16", "--max-model-len", "1024"]
        environment = serve_environment(on_cpu=True) | {"HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                serve_command(VENV, str(MODEL), True, more),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path):
    server = RealServer(tmp_path)
    server.start()
    yield server
    server.kill()


def make_items(count: int) -> list:
    """Where is that thing? In the only image, or in the last of two."""
    encoder = Encoder(str(MODEL), "absolute_pixels", "plain", 512, MAX_NEW, False, label_images=True)
    rng, items = random.Random(7), []
    for number in range(count):
        scenes = [single_scene(rng) for _ in range(1 + number % 2)]
        thing = rng.choice(scenes[-1].things)
        parts = (*(ImagePart(k) for k in range(len(scenes))), TextPart(rng.choice(GROUNDING).format(thing.kind.name)))
        names = tuple(f"{k}.png" for k in range(len(scenes)))
        answer = BoxAnswer(len(scenes) - 1, thing.box, thing.kind.name)
        sample = Sample(f"question/{number}", "test", "single", names, parts, answer)
        items.append(encoder.encode(LoadedSample(sample, tuple(encode_png(draw_scene(s)) for s in scenes))))
    return items


class Recorder(Callback):
    """Rewards of every group, adapter names, and metrics; kills and restarts a server behind one update."""

    def __init__(self, server: RealServer | None = None, restart_at: int = 0) -> None:
        self.server, self.restart_at = server, restart_at
        self.rewards: dict[tuple[int, str], float] = {}
        self.names: list[str] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        for record in module.last_rollouts:
            totals = [parts["total"] for parts in record["rewards"]]
            self.rewards[record["batch"], record["id"]] = sum(totals) / len(totals)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if self.server is not None:
            self.names.append(module.engine.adapter.name)
            if trainer.global_step == self.restart_at:
                self.server.kill()
                self.server.start()


def module(lora, **more) -> GRPO:
    settings = {"group_size": GROUP, "temperature": 1.0, "max_new_tokens": MAX_NEW, "learning_rate": 1e-3}
    return build_grpo(str(MODEL), lora=lora, skip_zero_advantage=False, importance_cap=2.0, **settings | more)


def test_ten_updates_through_a_server_that_is_restarted(server, lora, fit, monkeypatch, capsys) -> None:
    differences = []
    weigh = group_objective.sampler_correction
    monkeypatch.setattr(
        group_objective,
        "sampler_correction",
        lambda own, theirs, *more: (differences.append((own.detach() - theirs).abs()), weigh(own, theirs, *more))[1],
    )
    items = make_items(UPDATES * PROMPTS)
    served = Recorder(server, restart_at=UPDATES // 2)
    vllm = VLLMSettings((server.url,), timeout=300, patience=1200, pause=0.5)
    trainer = fit(module(lora, engine="vllm", vllm=vllm), items, PROMPTS, max_steps=UPDATES, callbacks=[served])
    assert trainer.global_step == UPDATES
    of_server = torch.cat(differences)

    native = Recorder()
    fit(module(lora), items, PROMPTS, max_steps=UPDATES, callbacks=[native])

    # The same prompts with other random numbers: the mean of the paired differences of group means against its error.
    assert served.rewards.keys() == native.rewards.keys() and len(native.rewards) == UPDATES * PROMPTS
    paired = torch.tensor([served.rewards[key] - native.rewards[key] for key in native.rewards], dtype=torch.float64)
    z = float(paired.mean() / (paired.std() / math.sqrt(len(paired))))
    loads = server.log.read_text().split("Loaded new LoRA adapter: name '")[1:]
    loaded = [line.partition("'")[0] for line in loads]
    with capsys.disabled():
        print(
            f"\nlog-probabilities, server against trainer: {len(of_server)} tokens, mean {of_server.mean():.2e}, "
            f"largest {of_server.max():.2e}\nmean reward {mean(served.rewards):.4f} served, "
            f"{mean(native.rewards):.4f} native; paired z = {z:.2f} over {len(paired)} groups\n"
            f"adapters loaded: {loaded}"
        )
    assert abs(z) < QUANTILE
    assert 0.1 < mean(native.rewards) < 1.0, "rewards that could differ"
    assert of_server.max() < 1e-3 and of_server.mean() < 1e-5
    assert all(metrics["grpo/frac_capped"] == 0 for metrics in served.metrics)

    assert len(set(served.names)) == UPDATES, "a new name behind every update"
    before = served.names[UPDATES // 2 - 1]
    assert loaded.count(before) == 2, "the restarted server was given the adapter that the killed one had"
    assert len(loaded) == 1 + UPDATES + 1 and set(loaded) > set(served.names)


def mean(rewards: dict[tuple[int, str], float]) -> float:
    return sum(rewards.values()) / len(rewards)
