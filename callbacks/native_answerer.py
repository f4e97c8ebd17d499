"""The policy in this process as an `Answerer`: greedy answers of the native engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from callbacks.encoding import encode_ahead
from callbacks.evaluation import EvaluationSettings
from callbacks.mig_bench import policy_fingerprint
from datamodules.answerers import Load, Reply, split_windows
from datamodules.batches import Encoder
from datamodules.samples import Sample, SampleError
from lightning_modules.qwen_vl import QwenVL
from lightning_modules.rollouts import RolloutEngine, RolloutSettings

log = logging.getLogger(__name__)


class NativeAnswerer:
    """`encoder` says how questions are put and refused; a window is one batch of `settings.batch_prompts`."""

    def __init__(self, policy: QwenVL, engine: RolloutEngine, encoder: Encoder, settings: EvaluationSettings) -> None:
        self.policy, self.engine, self.encoder, self.settings = policy, engine, encoder, settings
        self.convention = encoder.convention
        self.window = settings.batch_prompts
        self._policy_key = policy_fingerprint(policy)  # once: it reads all weights

    def identity(self) -> dict[str, Any]:
        return {"policy": self._policy_key, "form": self.encoder.form(), "decoding": asdict(self.settings)}

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        rollout_settings = RolloutSettings(
            1, 1.0, self.settings.max_new_tokens, greedy=True, batch_prompts=self.settings.batch_prompts
        )
        for window in encode_ahead(self.encoder, split_windows(samples, self.window), load):
            items = []
            for sample, item in window:
                if isinstance(item, SampleError):
                    log.warning("counted as wrong: %s", item)
                    yield sample, Reply("", (), refused=item.rule)
                else:
                    items.append(item.to(self.policy.device))
            for item, (rollout,) in zip(items, self.engine.generate(items, rollout_settings), strict=True):
                yield item.sample, Reply(rollout.text, item.geometries, len(rollout.token_ids), rollout.finished)
