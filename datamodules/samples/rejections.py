"""Counting of the samples that break a rule."""

from __future__ import annotations

from collections import Counter, defaultdict

from datamodules.samples.sample import SampleError


class Rejections:
    """Counts rejected samples by rule and keeps a few ids for each rule. With `strict`, the first error is raised."""

    NUM_EXAMPLES = 3

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)
        self._next_report = 1  # number of rejected samples at which the next report is due

    def add(self, error: SampleError) -> None:
        """Count `error`, or raise it if strict."""
        if self.strict:
            raise error
        self.counts[error.rule] += 1
        if len(self.examples[error.rule]) < self.NUM_EXAMPLES:
            self.examples[error.rule].append(error.sample_id)

    def __len__(self) -> int:
        return self.counts.total()

    def report_is_due(self) -> bool:
        """True at the first rejected sample, then whenever their number has doubled."""
        is_due = len(self) >= self._next_report
        self._next_report = 2 * len(self) if is_due else self._next_report
        return is_due

    def summary(self) -> str:
        """One line for the log: the number of rejected samples, the rules, and a few ids for each rule."""
        rules = [f"{rule} {count} ({', '.join(self.examples[rule])})" for rule, count in self.counts.most_common()]
        return f"{len(self)} samples rejected" + (f": {'; '.join(rules)}" if rules else "")
