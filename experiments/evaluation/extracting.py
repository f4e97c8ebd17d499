"""Let a language model find the letters of answers that the official parser of a benchmark cannot read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datamodules.benchmarks.base import Benchmark
from datamodules.benchmarks.registry import BENCHMARKS
from datamodules.metrics.extraction import EXTRACTED_READERS, NO_OPTION, needs_extraction, unread
from datamodules.metrics.predictions import Prediction
from datamodules.metrics.scoring import rescore
from datamodules.samples.sample import Sample
from lightning_modules.predictors.extractor import Extractor
from lightning_modules.serving.generation_rules import stating
from lightning_modules.serving.openai_client import EndpointSettings


def extractor_problems(extractor: EndpointSettings | None, names: Sequence[str]) -> list[str]:
    """The settings of the extractor do not fit these benchmarks; the server is not asked."""
    if extractor is None:
        return []
    try:
        stating(extractor, "greedy")
    except ValueError as error:
        return [f"extractor: {error}"]
    lacking = [name for name in ("base_url", "model") if not getattr(extractor, name)]
    problems = [f"extractor.{name}={getattr(extractor, name)!r}: it needs one" for name in lacking]
    known = [name for name, module in BENCHMARKS.items() if module.OFFICIAL.reader in EXTRACTED_READERS]
    if not set(known) & set(names):
        problems.append(f"extractor.model={extractor.model!r} is for {', '.join(known)}, not for {', '.join(names)}")
    return problems


def extract_letters(
    extractor: Extractor, benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[Prediction]
) -> tuple[list[Prediction], dict[str, Any]]:
    """Find letters; returns the predictions with official scores, and the counts for `result.json`.

    An answer without a letter counts as wrong.

    Args:
        extractor: finds the letters.
        benchmark: its official rule decides which answers need the extractor.
        samples: the questions.
        predictions: one prediction for each sample, in order.

    Raises the errors of `Extractor.letters`.
    """
    places = [place for place, found in enumerate(predictions) if needs_extraction(found, benchmark.official)]
    before = Counter(extractor.failures)
    letters = extractor.letters([unread(samples[place], predictions[place]) for place in places])
    scored = list(predictions)
    for place, letter in zip(places, letters, strict=True):
        extracted = replace(scored[place], extracted=letter)
        scored[place] = rescore(extracted, benchmark.rule, benchmark.official)
    none = letters.count(NO_OPTION)
    failed = dict(sorted((extractor.failures - before).items()))
    found = len(letters) - none - sum(failed.values())
    counts = {"asked": len(letters), "found": found, "none": none, "failed": failed}
    return scored, {"model": extractor.settings.model} | counts
