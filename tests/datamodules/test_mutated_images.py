"""A campaign of damaged images: every outcome is an RGB image or a counted rejection, and no program is started."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from datamodules.images.image_loading import decode_images, open_image, open_images
from datamodules.samples.sample import LoadedSample, SampleError
from tests.datamodules.encoding.tiny_processor import make_sample
from tests.datamodules.image_mutations import ADMITTED, REFUSED, mutate, seeds

RULES = {
    "unreadable_image",
    "decompression_bomb",
    "too_many_pixels",
    "unknown_value_range",
    "extreme_aspect_ratio",
    "truncated_image",
}
MAX_PIXELS = 300_000  # so that a damaged size costs little time


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when anything starts `gs`, which stands first on PATH."""
    from PIL import EpsImagePlugin

    log = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow has not looked for it yet
    return log


def outcome(data: bytes) -> str:
    """The rule that the image breaks, or "shown"."""
    sample = make_sample("a", ((4, 4),)).sample
    try:
        stored = open_images(LoadedSample(sample, (data,)), MAX_PIXELS, MAX_PIXELS)
        (image,) = decode_images(sample.id, stored)
    except SampleError as error:
        return error.rule
    assert image.mode == "RGB" and image.size in (stored[0].size, stored[0].size[::-1])
    assert image.width * image.height <= MAX_PIXELS
    return "shown"


def importer_outcome(data: bytes) -> str:
    """What an import does with the file."""
    try:
        orientation = open_image(data, MAX_PIXELS).orientation()
    except ValueError as error:
        return error.rule
    return "upright" if orientation == 1 else "turned"


# In a run Pillow's warnings are shown and decoding goes on; as errors they would hide what comes after them.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [6_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_damaged_images_are_shown_or_counted(count: int, started: Path) -> None:
    files = {kind: found for kind in (*ADMITTED, *REFUSED) if (found := seeds(kind))}
    assert len(files) >= 10
    everything = [data for found in files.values() for data in found]
    rng, outcomes = random.Random(count), Counter()
    for number in range(count):
        kind = list(files)[number % len(files)]
        data = mutate(rng.choice(files[kind]), rng, everything)
        outcomes[kind, outcome(data)] += 1
        importer_outcome(data)
    assert not started.exists(), f"a program was started: {started.read_text()[:200]}"
    assert {rule for _, rule in outcomes} <= RULES | {"shown"}
    for kind in ADMITTED:  # damage of both kinds was there
        assert kind not in files or (outcomes[kind, "shown"] and outcomes[kind, "unreadable_image"]), kind
    for kind in REFUSED:
        assert not outcomes[kind, "shown"]
    print({rule: sum(n for (_, found), n in outcomes.items() if found == rule) for rule in RULES | {"shown"}})


@pytest.mark.parametrize("kind", REFUSED)
def test_other_formats_are_refused_whole_or_not(kind: str, started: Path) -> None:
    for data in seeds(kind):
        assert outcome(data) == importer_outcome(data) == "unreadable_image"
    assert not started.exists()


@pytest.mark.parametrize("kind", ADMITTED)
def test_whole_images_of_admitted_formats_are_shown(kind: str) -> None:
    found = seeds(kind)
    if not found:
        pytest.skip(f"this Pillow does not write {kind}")
    for data in found:
        assert outcome(data) == "shown"
