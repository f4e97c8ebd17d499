"""The policy in this process as a `Predictor`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from callbacks.encoding import encode_ahead
from callbacks.evaluation import EvaluationSettings
from callbacks.mig_bench import policy_fingerprint
from datamodules.encoding.encoder import Encoder
from datamodules.predictors import Load, Reply, split_windows
from datamodules.samples.sample import Sample, SampleError
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutEngine, RolloutSettings
from lightning_modules.serving.generation_rules import Generation, rules

log = logging.getLogger(__name__)


class PolicyPredictor:
    """`encoder` says how questions are put and refused; a window is one batch of `settings.batch_prompts`.

    `engine` must generate by the rules of `generation`: the native engine does under "greedy", `own_generation` under
    "model".
    """

    def __init__(
        self,
        policy: QwenVL,
        engine: RolloutEngine,
        encoder: Encoder,
        settings: EvaluationSettings,
        generation: Generation = "greedy",
    ) -> None:
        self.policy, self.engine, self.encoder, self.settings = policy, engine, encoder, settings
        self.generation = generation
        self.box_format = encoder.box_format
        self.window = settings.batch_prompts
        self._policy_key = policy_fingerprint(policy)  # once: it reads all weights

    def identity(self) -> dict[str, Any]:
        decoding = asdict(self.settings) | rules(self.generation)
        return {"policy": self._policy_key, "form": self.encoder.form(), "decoding": decoding}

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        rollouts = RolloutSettings.of_evaluation(self.settings.max_new_tokens, self.settings.batch_prompts)
        for window in encode_ahead(self.encoder, split_windows(samples, self.window), load):
            items = []
            for sample, item in window:
                if isinstance(item, SampleError):
                    log.warning("counted as wrong: %s", item)
                    yield sample, Reply("", (), refused=item.rule)
                else:
                    items.append(item.to(self.policy.device))
            for item, (rollout,) in zip(items, self.engine.generate(items, rollouts), strict=True):
                yield item.sample, Reply(rollout.text, item.image_sizes, len(rollout.token_ids), rollout.finished)
