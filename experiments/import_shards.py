"""Import data sets as shards: `make shards SOURCE=mgrounding ROOT=/data/MGrounding-630k`.

SOURCE is one of datamodules/importers/registry.py's, a published data set or the form of your own (jsonl, hf, coco:
docs/own_data.md), or a YAML that names several with their shares, such as the paper's mixture. <out>/<part>/ holds a
part's shards, <out>/manifest.json all parts as one folder of shards, <out>/import.json the schema reports and what was
rejected, and why. A killed import goes on; a finished one is left as it is.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.parts import Part
from datamodules.importers.reading.field_checks import format_report
from datamodules.importers.reading.source import DataError, Scan
from datamodules.importers.registry import OWN_DATA, VERSION
from datamodules.importers.run_import import Settings, Workers, check_part, forget_parts, import_part
from datamodules.importers.tally import Tally
from datamodules.persistence.files import fingerprint, read_json, write_json
from datamodules.persistence.processes import ProcessLost
from datamodules.streaming.shards import MANIFEST, read_manifest, write_manifest
from experiments.runs import preflight, run_identity
from experiments.runs.changes import MadeOf
from experiments.runs.commands import command

REPORT = "import.json"
MADE_BY = "import_shards"
NOTHING_SAID = OwnData()


def run(
    root: str = "",
    source: str = "",
    out: str = "",
    subsets: list[str] | None = None,
    count: int | None = None,
    parts: list[Part] | None = None,
    surplus: float = 1.0,
    seed: int = 0,
    records_per_shard: int = 1000,
    max_rejected: float = 0.2,
    one_box: bool = False,
    allow: list[str] | None = None,
    processes: int = 0,
    scan_only: bool = False,
    dry_run: bool = False,
    own: OwnData = NOTHING_SAID,
) -> None:
    """Import one source, or the parts of a mixture.

    Args:
        root: folder with the source's files as published, or that holds the folders of a mixture's sources; for your
            own data a folder or a file, for hf also a name on the Hub
        source: mgrounding, refcoco, odinw, v3det, jsonl, hf or coco; each of its subsets becomes a part
        out: folder to write; data/<source>, or data/<name of your data>, if it is not given
        subsets: patterns of the source's subsets, such as "*/val", or "!vector/*" to leave some out; those meant for
            training if none are given
        count: samples to draw at random from each subset; all if it is not given
        parts: a mixture, in place of `source`, `subsets` and `count`
        surplus: multiplies the counts, for what a later step will filter out
        seed: seed of the draw
        records_per_shard: records of the source that go into one shard
        max_rejected: stop when a larger share of samples breaks a rule
        one_box: reject answers of several boxes, as in tracks, which training cannot score
        allow: unknown fields of the source's records to put up with
        processes: how many to use; 0 is one for each core
        scan_only: print the schema reports and write nothing
        dry_run: check every record and every image too, print the counts, and write nothing
        own: what is to be said of your own data (jsonl, hf, coco)
    """
    wanted = [Part(source, source, "", subsets or [], count, own)] if parts is None else parts
    _check(root, source, out, parts, wanted, surplus, records_per_shard)
    folder = Path(out or f"data/{own.dataset_name(root) if source in OWN_DATA else source}")
    settings = Settings(None, seed, records_per_shard, max_rejected, one_box)
    sources = {part.origin: part for part in wanted}
    digests = {origin: part.digests(root) for origin, part in sources.items()}
    plan = [part.describe() | {"digests": digests[part.origin]} for part in wanted]
    key = fingerprint(VERSION, plan, parts is None, surplus, seed, records_per_shard, one_box)
    is_trial = scan_only or dry_run
    with run_identity.locked(folder):
        _refuse_foreign(folder)
        if run_identity.read_marker(folder).get("key") == key and not is_trial:
            print(f"{folder} is already imported with these settings", flush=True)
            return
        scans = {origin: _scan(part, root, allow or ()) for origin, part in sources.items()}
        if parts is None:
            wanted = _part_for_each_subset(wanted[0], scans[wanted[0].origin])
        if scan_only:
            return
        with Workers(processes or os.cpu_count() or 1) as workers:
            if dry_run:
                for part in wanted:
                    print(f"{part.name}:\n{_try(part, scans[part.origin], settings, workers)}", flush=True)
                return
            run_identity.write_marker(folder, run_identity.STARTED, key=key, made_by=MADE_BY)
            (folder / MANIFEST).unlink(missing_ok=True)  # of other settings: parts may be moved aside now
            tallies = {}
            for part in wanted:
                scan, found = scans[part.origin], digests[part.origin]
                tallies[part.name] = _import(folder, part, scan, found, settings, surplus, workers)
        _finish(folder, {origin: (part, scans[origin]) for origin, part in sources.items()}, tallies)
        run_identity.write_marker(folder, key=key)


def _check(
    root: str,
    source: str,
    out: str,
    parts: Sequence[Part] | None,
    wanted: Sequence[Part],
    surplus: float,
    records_per_shard: int,
) -> None:
    """All wrong settings at once, as SettingsError."""
    faults = []
    if (parts is None) == (not source):
        faults.append(f"source={source!r} with {len(parts or ())} parts: exactly one of the two is needed")
    else:
        faults += dict.fromkeys(fault for part in wanted for fault in part.faults(root))
    if parts is not None and not out:
        faults.append("out='': a mixture needs a folder to write")
    folders = [part.name for part in parts or ()]
    faults += [f"two parts are named {name!r}" for name in sorted(set(folders)) if folders.count(name) > 1]
    # Ids of samples begin with the data set's name: two of one name would share ids.
    origins = {part.origin: part for part in wanted if part.is_own}
    names = [part.own.dataset_name(part.place(root)) for part in origins.values()]
    faults += [f"two data sets are named {name!r}: say own.name" for name in set(names) if names.count(name) > 1]
    if surplus < 1:
        faults.append(f"surplus={surplus} is below 1")
    if records_per_shard < 1:
        faults.append(f"records_per_shard={records_per_shard} is below 1")
    preflight.raise_all(faults)


def _scan(part: Part, root: str, allow: Sequence[str]) -> Scan:
    """Scan a source and print what it holds."""
    print(f"{part.source} in {part.place(root)}:", flush=True)
    scan = part.scan(root, allow)
    print(format_report(scan.report))
    print("  subsets: " + ", ".join(f"{name} {len(entries):,}" for name, entries in scan.subsets.items()))
    print("  no questions: " + (", ".join(f"{why} {n:,}" for why, n in scan.skipped.items()) or "none"), flush=True)
    return scan


def _part_for_each_subset(part: Part, scan: Scan) -> list[Part]:
    names = part.chosen(scan)
    if left := [name for name in scan.subsets if name not in names and not part.subsets]:
        print(f"  not taken, as others are for training: {', '.join(left[:20])}; --subsets takes them", flush=True)
    return [replace(part, name=name, subsets=[name]) for name in names]


def _try(part: Part, scan: Scan, settings: Settings, workers: Workers) -> Tally:
    """What an import of the part would take and reject."""
    return check_part(_entries(part, scan), scan.convert, scan.image_root, settings, workers, part.name, scan.frame)


def _entries(part: Part, scan: Scan) -> Sequence[Any]:
    """The entries of all of the part's subsets; of one alone without a copy, as there may be millions."""
    first, *more = part.chosen(scan)
    return (
        list(itertools.chain.from_iterable(scan.subsets[name] for name in (first, *more)))
        if more
        else scan.subsets[first]
    )


def _import(
    out: Path,
    part: Part,
    scan: Scan,
    digests: dict[str, str],
    settings: Settings,
    surplus: float,
    workers: Workers,
) -> dict[str, Any]:
    """Import one part unless it is there; its tally."""
    folder, names = out / part.name, part.chosen(scan)
    count = None if part.count is None else math.ceil(part.count * surplus)
    made_of = settings.seed, settings.records_per_shard, settings.one_box
    own = (asdict(part.own),) if part.is_own else ()
    key = fingerprint(VERSION, part.source, digests, names, count, made_of, *own)
    recorded = {"version": VERSION, "source": part.source, "subsets": names, "count": count, "annotations": digests}
    recorded |= dict(zip(("seed", "records_per_shard", "one_box"), made_of, strict=True))
    if run_identity.claim(folder, MadeOf(key, recorded)):
        print(f"{folder} is already imported with these settings", flush=True)
    else:
        entries = _entries(part, scan)
        settings = replace(settings, count=count)
        where = scan.image_root, settings, workers, part.name, scan.frame
        tally = import_part(folder, entries, scan.convert, *where)
        write_json(folder / REPORT, tally.to_json())
        run_identity.write_marker(folder, key=key)
        print(f"{part.name}:\n{tally}", flush=True)
    forget_parts(folder)
    return read_json(folder / REPORT)


def _finish(out: Path, scans: dict[tuple[str, str, str], tuple[Part, Scan]], tallies: dict[str, Any]) -> None:
    """The report of the whole, and the manifest that makes one folder of shards of all parts."""
    sources: dict[str, Any] = {}
    for part, scan in scans.values():
        found = {"subsets": {name: len(entries) for name, entries in scan.subsets.items()}, "skipped": scan.skipped}
        said = {"own": asdict(part.own)} if part.is_own else {}
        sources[f"{part.source} {part.root}".strip()] = scan.report | found | said
    write_json(out / REPORT, {"sources": sources, "parts": tallies})
    shards = [
        shard | {"name": f"{name}/{shard['name']}"} for name in tallies for shard in read_manifest(out / name)["shards"]
    ]
    write_manifest(out, shards)
    print(f"{out}: {sum(shard['count'] for shard in shards):,} samples in {len(shards):,} shards", flush=True)


def _refuse_foreign(folder: Path) -> None:
    """End the program where `folder` holds anything that no import has made."""
    made_here = run_identity.read_marker(folder, run_identity.STARTED).get("made_by") == MADE_BY
    if folder.exists() and any(folder.iterdir()) and not made_here:
        sys.exit(f"out={str(folder)!r} holds what was not made here; choose another folder")


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards SOURCE=...`."""
    try:
        auto_cli(run, as_positional=False, args=args)
    except (preflight.SettingsError, DataError, ProcessLost) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
