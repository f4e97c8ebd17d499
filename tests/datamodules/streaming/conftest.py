from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.streaming import manifest, url_openers
from datamodules.streaming.shard_writer import ShardWriter
from tests.datamodules.encoding.tiny_processor import make_sample
from tests.datamodules.streaming.shard_server import ShardServer

NUM_SAMPLES = 12


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Short pauses between attempts, loopback without a proxy, and nothing kept from another test."""
    monkeypatch.setattr(url_openers, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(url_openers, "LONGEST_PAUSE", 0.05)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
    manifest._fetched.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of three samples."""
    return write_shards(tmp_path / "served")


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as server:
        yield server


def write_shards(folder: Path, num_samples: int = NUM_SAMPLES, prefix: str = "s", max_samples: int = 3) -> Path:
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for index in range(num_samples):
            writer.add(make_sample(f"{prefix}{index}", ((14, 14), (28, 14))))
    return folder
