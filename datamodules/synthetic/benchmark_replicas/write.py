"""Write the nano replicas that are missing: in each benchmark's own files, by a pure function of a fixed seed.

data/nano/{Ref-L4,ReasonSeg,ReVOS,odinw,BLINK,MMIU,MC-Bench}    (data/nano/MIG-Bench comes with the synthetic dataset)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datamodules.persistence.files import fingerprint, read_json, whole_folder, write_json
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.synthetic.benchmark_replicas import grounding, multi_context, multiple_choice

MARKER, OLD_MARKER = ".replica.json", ".twin.json"  # earlier versions wrote the second
# Benchmark -> (its folder, writer, questions or pictures of each split, set, subset, task key or style).
REPLICAS: dict[str, tuple[str, Callable[[Path, int], None], int]] = {
    "ref_l4": ("Ref-L4", grounding.write_ref_l4, 40),
    "lisa": ("ReasonSeg", grounding.write_reason_seg, 40),
    "revos": ("ReVOS", grounding.write_revos, 30),
    "odinw": ("odinw", grounding.write_odinw, 12),
    "blink": ("BLINK", multiple_choice.write_blink, 12),
    "mmiu": ("MMIU", multiple_choice.write_mmiu, 6),
    "mc_bench": ("MC-Bench", multi_context.write_mc_bench, 40),
}


def write_replica(name: str, data_root: str | Path, count: int | None = None) -> None:
    """Write the replica of benchmark `name` unless it is there as this code makes it.

    Raises:
        ValueError: the folder holds files that this function did not write, such as a download.
    """
    folder_name, writer, default = REPLICAS[name]
    folder = Path(data_root) / folder_name
    # The key changes with the code of this room and with the number of questions.
    sources = [path_fingerprint(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    key = fingerprint(sources, count or default)
    marker = read_json(folder / MARKER) or read_json(folder / OLD_MARKER)
    if marker.get("key") == key:
        return
    if folder.exists() and not marker:
        raise ValueError(f"data_root={str(data_root)!r}: {folder} was not made here; replicas=true would replace it")
    # An interruption leaves no partial benchmark: the folder is renamed when it is complete.
    with whole_folder(folder) as draft:
        writer(draft, count or default)
        write_json(draft / MARKER, {"key": key})
