"""Count the samples of an import: accepted samples, and rejected samples by rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.samples.scores import true_boxes

NUM_EXAMPLES = 3  # number of rejected samples whose detail is kept, for each rule
COUNTED = ("image_from", "repaired", "turned")  # fields of a sample's `extra` whose values the report counts


class Tally:
    """Counts of accepted samples, and of rejected samples by rule. Tallies of several shards can be added."""

    def __init__(self) -> None:
        self.samples = 0
        self.rejected: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.counts: dict[str, Counter[str]] = {}

    def count(self, outcome: LoadedSample | SampleError) -> bool:
        """Count one result; returns whether it is a usable sample."""
        if isinstance(outcome, SampleError):
            example = f"{outcome.sample_id}: {outcome.detail:.200}".encode("utf-8", "backslashreplace").decode()
            self.add({"rejected": {outcome.rule: 1}, "examples": {outcome.rule: [example]}})
            return False
        self.samples += 1
        for what in COUNTED:
            if what in outcome.sample.extra:
                self.counts.setdefault(what, Counter())[outcome.sample.extra[what]] += 1
        if boxes := len(true_boxes(outcome.sample.answer)):
            self.counts.setdefault("boxes in an answer", Counter())[str(boxes)] += 1
        return True

    def add(self, note: dict[str, Any]) -> None:
        self.samples += note.get("samples", 0)
        self.rejected.update(note["rejected"])
        for rule, examples in note["examples"].items():
            known = self.examples.setdefault(rule, [])
            known += examples[: NUM_EXAMPLES - len(known)]
        for what, counts in note.get("counts", {}).items():
            self.counts.setdefault(what, Counter()).update(counts)

    def to_json(self) -> dict[str, Any]:
        counts = {what: dict(counter) for what, counter in self.counts.items()}
        rejected = dict(self.rejected.most_common())
        return {"samples": self.samples, "rejected": rejected, "examples": self.examples, "counts": counts}

    def __str__(self) -> str:
        lines = [f"  {self.samples:,} samples, {self.rejected.total():,} rejected"]
        for rule, count in self.rejected.most_common():
            lines.append(f"    {rule} {count:,}: {'; '.join(self.examples[rule])}")
        lines += [f"    {what}: {dict(counter)}" for what, counter in self.counts.items()]
        return "\n".join(lines)
