"""What a page must be at any width: nothing outside its card, no clipped tick, readable text, reachable controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTHS = (1400, 400)  # a desk and a phone

MEASURE = Path(__file__).with_suffix(".js").read_text()


def page_faults(page: Any) -> list[str]:
    """The faults of an open page at all widths, each once for a width."""
    found = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(150)  # plots that follow the width are drawn again
        found += [f"at {width} px: {fault}" for fault in dict.fromkeys(page.evaluate(MEASURE))]
    return found
