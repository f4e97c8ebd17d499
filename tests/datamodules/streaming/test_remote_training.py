"""Training from a server that fails at random, killed with -9 again and again: the samples of a local run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.datamodules import trainer_process
from tests.datamodules.streaming.conftest import write_shards
from tests.datamodules.streaming.shard_server import ShardServer, cut, hang_up, status

pytestmark = pytest.mark.slow
BRACES = "shard-{00000..00005}.tar"
KILLS = (2, 5, 8)  # batches after which the run is killed


@pytest.fixture
def served(tmp_path: Path):
    """Six shards of three samples, whose server cuts, refuses and hangs up now and then."""
    folder = write_shards(tmp_path / "a", 18)
    write_shards(folder / "b", 18, "t")
    rng = random.Random(0)
    with ShardServer(folder) as server:
        for name in [f"{part}shard-{k:05d}.tar" for part in ("", "b/") for k in range(6)]:
            server.faults[name] = rng.choices([cut(700), cut(3000), status(500), hang_up], k=rng.randrange(4))
        yield server


def start(shards: str, state: Path, workers: int, stop_at: int, *rest: str) -> subprocess.Popen[str]:
    arguments = [shards, str(state), str(workers), str(stop_at), *rest]
    return subprocess.Popen([sys.executable, trainer_process.__file__, *arguments], stdout=subprocess.PIPE, text=True)


def run_with_kills(shards: str, folder: Path, workers: int, ranks: int) -> list[list[list[str]]]:
    """The ids of each rank's batches."""
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    for attempt, stop_at in enumerate((*KILLS, 0)):
        rest = [(str(rank), str(ranks), str(folder / f"meet{attempt}")) if ranks > 1 else () for rank in range(ranks)]
        processes = [start(shards, files[k], workers, stop_at, *rest[k]) for k in range(ranks)]
        if stop_at:  # all have saved before any is killed: they wait for each other
            assert [process.stdout.readline() for process in processes] == ["saved\n"] * ranks
        for process in processes:
            with process:
                if stop_at:
                    process.send_signal(signal.SIGKILL)
                assert process.wait() == (-signal.SIGKILL if stop_at else 0)
        saved = [json.loads(file.read_text()) for file in files]
        for file, own in zip(files, saved, strict=True):  # a checkpoint is that of the first rank
            file.write_text(json.dumps(own | {"state": saved[0]["state"]}))
        if attempt == 1:  # another machine, which has fetched nothing
            shutil.rmtree(folder / "cache_home" / "multi-image-grounding")
    return [json.loads(file.read_text())["ids"] for file in files]


def undisturbed(shards: str, tmp_path: Path, rank: int, ranks: int) -> list[list[str]]:
    saved = {"state": None, "ids": []}
    data = trainer_process.make_data(shards, 0, rank, ranks)
    trainer_process.train(data, saved, tmp_path / "undisturbed.json", stop_at=0)
    return saved["ids"]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (2, 2)])
def test_a_killed_run_on_a_failing_server_is_the_undisturbed_local_run(
    served: ShardServer, tmp_path: Path, workers: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))
    found = run_with_kills(f"{served.url}/{BRACES}", tmp_path, workers, ranks)
    for rank in range(ranks):
        assert found[rank] == undisturbed(str(served.folder), tmp_path, rank, ranks)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_mixture_of_a_server_and_a_folder_is_the_undisturbed_one(
    served: ShardServer, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))
    remote = json.dumps({str(served.folder): 0.7, f"{served.url}/b": 0.3})
    local = json.dumps({str(served.folder): 0.7, str(served.folder / "b"): 0.3})
    (found,) = run_with_kills(remote, tmp_path, workers, 1)
    assert found == undisturbed(local, tmp_path, 0, 1)
    share = sum(name.startswith("t") for batch in found for name in batch) / (3 * len(found))
    assert abs(share - 0.3) < 0.02
