"""Published files that may lie beside the repository, in ../shared: tests that read them are skipped without them."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
