from __future__ import annotations

import pytest

from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import SampleError


def test_rejections_are_counted_by_rule_with_example_ids() -> None:
    rejections = Rejections()
    assert len(rejections) == 0 and rejections.summary() == "0 samples rejected"
    for index in range(5):
        rejections.add(SampleError(f"s{index}", "degenerate_box"))
    rejections.add(SampleError("t", "missing_image"))
    assert len(rejections) == 6
    assert rejections.counts == {"degenerate_box": 5, "missing_image": 1}
    assert rejections.summary() == "6 samples rejected: degenerate_box 5 (s0, s1, s2); missing_image 1 (t)"


def test_strict_rejections_raise_the_error_itself() -> None:
    error = SampleError("s", "degenerate_box")
    with pytest.raises(SampleError) as caught:
        Rejections(strict=True).add(error)
    assert caught.value is error
