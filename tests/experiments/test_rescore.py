"""Which results `make rescore` takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from datamodules.persistence.files import write_json
from experiments.evaluation.rescore import only_results


def test_the_results_of_a_phase_are_found_where_there_is_one_benchmark(tmp_path: Path) -> None:
    results = tmp_path / "grpo/benchmarks/mig_bench"
    write_json(results / "result.json", {})
    assert only_results(tmp_path / "grpo") == only_results(results.parent) == only_results(results) == results


def test_none_and_several_are_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no result.json is there; make eval MODEL="):
        only_results(tmp_path)
    for name in ("blink", "lisa"):
        write_json(tmp_path / name / "result.json", {})
    with pytest.raises(ValueError, match=re.escape(f"name one of {tmp_path / 'blink'}, {tmp_path / 'lisa'}")):
        only_results(tmp_path)
