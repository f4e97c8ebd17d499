"""How fast an import is, and how its memory goes: `make test-slow ARGS=tests/datamodules/importers/test_speed.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.streaming.manifest import read_manifest
from datamodules.streaming.shard_reader import ShardReader
from tests.datamodules.importers.published import jpeg, mgrounding_record, write_mgrounding

ROOT = Path(__file__).resolve().parents[3]
NUM_RECORDS = 10_000
RATE = 2000  # samples a second on two cores
SLACK_MB = 32


def look(pid: int, used: dict[int, float]) -> float:
    """Resident memory, in MB, of the process and of all that it started, shared pages counted in each.

    `used` gets their CPU seconds so far, by process: a starter does not count those of a fork server's workers.
    """
    total, waiting = 0, [pid]
    while waiting:
        here = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{here}/task/{here}/children").read_text().split())
            total += int(Path(f"/proc/{here}/statm").read_text().split()[1])
            ticks = Path(f"/proc/{here}/stat").read_text().rpartition(")")[2].split()[11:13]
            used[here] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        except OSError:  # it ended between the two looks
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_ten_thousand_records_are_imported_fast_and_in_flat_memory(tmp_path: Path, capsys) -> None:
    records = [mgrounding_record(number, kind=1) for number in range(NUM_RECORDS)]  # three images each
    root = write_mgrounding(tmp_path, records, [jpeg(seed, (320, 240)) for seed in range(3)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.import_shards", "--source=mgrounding", f"--root={root}"]
    begin, by_process = time.monotonic(), {}
    process = subprocess.Popen([*command, f"--out={out}", "--processes=2"], cwd=ROOT, stdout=subprocess.DEVNULL)
    seen: list[tuple[int, float]] = []  # shards done, megabytes
    while process.poll() is None:
        done = len(list(out.glob("common_object/shard-*.tar")))
        seen.append((done, look(process.pid, by_process)))
        time.sleep(0.05)
    seconds, used = time.monotonic() - begin, sum(by_process.values())
    assert process.returncode == 0
    assert ShardReader(out).count == NUM_RECORDS
    num_shards = len(read_manifest(out)["shards"])
    quarter = max(mb for done, mb in seen if done <= num_shards / 4)
    end = max(mb for done, mb in seen if done > num_shards / 4)
    with capsys.disabled():
        print(
            f"\n{NUM_RECORDS:,} samples, 3 images of {len(jpeg(0, (320, 240))):,} bytes each, start and scan included:"
            f" {NUM_RECORDS / seconds:,.0f} a second by the clock ({seconds:.1f} s), {2 * NUM_RECORDS / used:,.0f} by"
            f" the CPU time of two cores ({used:.1f} s); peak memory {quarter:.0f} MB until a quarter, {end:.0f} later"
        )
    assert end < quarter + SLACK_MB
    assert 2 * NUM_RECORDS / used >= RATE
