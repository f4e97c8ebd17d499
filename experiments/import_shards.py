"""Import data sets as shards: `make shards SOURCE=mgrounding ROOT=/data/MGrounding-630k`.

SOURCE is a name in datamodules/importers/registry.py: a published data set, or the format of your own data (jsonl, hf,
coco; docs/own_data.md). It may also be a YAML file with several sources and their shares, such as the paper's mixture.
The output is

    <out>/<part>/         the shards of one part
    <out>/manifest.json   all parts as one folder of shards
    <out>/import.json     the schema reports, and the rejected samples by rule

An import that was killed continues. A finished import is not changed.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.parts import Part
from datamodules.importers.reading.field_checks import format_report
from datamodules.importers.reading.source import Scan
from datamodules.importers.registry import OWN_DATA, VERSION
from datamodules.importers.run_import import Settings, Workers, forget_parts, import_part, outcomes
from datamodules.importers.tally import Tally
from datamodules.persistence import folder_lock
from datamodules.persistence.files import fingerprint, read_json, write_atomic, write_json
from datamodules.persistence.problems import Problems
from datamodules.streaming.manifest import MANIFEST, name_fault, read_manifest, write_manifest
from experiments.runs import preflight, run_identity
from experiments.runs.changes import MadeOf
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli

REPORT = "import.json"
MADE_BY = "import_shards"  # name in the marker of a folder that this command has written and may replace
NOTHING_SAID = OwnData()
PREVIEWED = 10  # number of first records and number of random records that the page shows for each part


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
    preview: str = "",
    own: OwnData = NOTHING_SAID,
) -> None:
    """Import one source, or the parts of a mixture.

    Args:
        root: folder with the files of the source; for a mixture, the folder with the folders of its sources; for your
            own data a folder or a file, and for hf also a name on the Hub
        source: mgrounding, refcoco, odinw, v3det, jsonl, hf or coco; each of its subsets becomes a part
        out: folder to write; by default data/<source>, and for your own data data/<its name>
        subsets: patterns of the source's subsets, such as "*/val", or "!vector/*" to leave some out; by default those
            for training
        count: number of samples from each subset, drawn at random; by default all
        parts: a mixture, in place of `source`, `subsets` and `count`
        surplus: all counts are multiplied by this, because a later step will remove some samples
        seed: seed of the random choice of samples
        records_per_shard: records of the source in one shard
        max_rejected: stop if a larger share of the samples breaks a rule
        one_box: reject answers with several boxes, which only data.answer_form=named_image trains on
        allow: unknown fields of the source's records that are accepted
        processes: number of processes; 0 means one for each core
        scan_only: print the schema reports and write nothing
        dry_run: check every record and every image too, print the counts, and write nothing
        preview: file for a page with the first and with random samples, written before any shard
        own: statements about your own data (jsonl, hf, coco)
    """
    # 1. Check the settings, and compute the key: a hash of the settings and of the annotation files.
    wanted = [Part(source, source, "", subsets or [], count, own)] if parts is None else parts
    _check(root, source, out, parts, wanted, surplus, records_per_shard)
    folder = Path(out or f"data/{own.dataset_name(root) if source in OWN_DATA else source}")
    settings = Settings(None, seed, records_per_shard, max_rejected, one_box)
    sources = {part.origin: part for part in wanted}
    digests = {origin: part.digests(root) for origin, part in sources.items()}
    plan = [part.describe() | {"digests": digests[part.origin]} for part in wanted]
    key = fingerprint(VERSION, plan, parts is None, surplus, seed, records_per_shard, one_box)
    is_trial = scan_only or dry_run
    with folder_lock.locked(folder):
        _refuse_foreign(folder)
        if run_identity.read_marker(folder).get("key") == key and not is_trial:
            print(f"{folder} is already imported with these settings", flush=True)
            return
        # 2. Read the annotations of all sources.
        scans = {origin: _scan(part, root, allow or ()) for origin, part in sources.items()}
        if parts is None:
            wanted = _part_for_each_subset(wanted[0], scans[wanted[0].origin])
        if preview:
            _write_preview(Path(preview), [(part, scans[part.origin]) for part in wanted], one_box, seed)
        if scan_only:
            return
        with Workers(processes or os.cpu_count() or 1) as workers:
            if dry_run:
                for part in wanted:
                    _convert(None, part, scans[part.origin], settings, workers)
                return
            # 3. Write the parts one by one. The old manifest is removed first, because it may name parts that are
            # renamed now.
            run_identity.write_marker(folder, run_identity.STARTED, key=key, made_by=MADE_BY)
            (folder / MANIFEST).unlink(missing_ok=True)
            tallies = dict.fromkeys(part.name for part in wanted)
            # A folder above others comes first: where it is moved aside, they are moved with it, and made anew.
            for part in sorted(wanted, key=lambda part: part.name.count("/")):
                scan, found = scans[part.origin], digests[part.origin]
                tallies[part.name] = _import(folder, part, scan, found, settings, surplus, workers)
        # 4. The common manifest and report; the marker comes last.
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
    """Raise SettingsError with all wrong settings at once."""
    problems = Problems()
    if (parts is None) == (not source) or parts == []:
        problems.append(f"source={source!r} with {len(parts or ())} parts: exactly one of the two is needed")
    else:
        problems += dict.fromkeys(problem for part in wanted for problem in part.problems(root))
    if parts is not None and not out:
        problems.append("out='': a mixture needs a folder to write")
    folders = [part.name for part in parts or ()]
    problems += [f"two parts are named {name!r}" for name in sorted(set(folders)) if folders.count(name) > 1]
    problems += _name_problems(folders)
    # Sample ids begin with the name of the data set, so two data sets with the same name would share ids.
    origins = {part.origin: part for part in wanted if part.is_own}
    names = [part.own.dataset_name(part.place(root)) for part in origins.values()]
    problems += [f"two data sets are named {name!r}: say own.name" for name in set(names) if names.count(name) > 1]
    problems.at_least(1, surplus=surplus, records_per_shard=records_per_shard)
    preflight.raise_all(problems)


def _name_problems(names: Sequence[str]) -> list[str]:
    """The names of parts or subsets that cannot be folders below `out`, as messages."""
    problems = []
    own_files = {MANIFEST, REPORT, run_identity.DONE, run_identity.STARTED}
    for name in names:
        # The manifest names the shards by these folders, and a reader refuses the same names.
        if fault := name_fault(name):
            problems.append(f"name={name!r} of a part or subset {fault}: rename it")
        elif taken := own_files & set(name.split("/")):
            problems.append(f"name={name!r} of a part or subset: {taken.pop()} is a file of the import; rename it")
    return problems


def _scan(part: Part, root: str, allow: Sequence[str]) -> Scan:
    """Scan a source, and print its schema report and its subsets."""
    print(f"{part.source} in {part.place(root)}:", flush=True)
    scan = part.scan(root, allow)
    print(format_report(scan.report))
    print("  subsets: " + ", ".join(f"{name} {len(entries):,}" for name, entries in scan.subsets.items()))
    print("  no questions: " + (", ".join(f"{why} {n:,}" for why, n in scan.skipped.items()) or "none"), flush=True)
    return scan


def _part_for_each_subset(part: Part, scan: Scan) -> list[Part]:
    """One part for each chosen subset of a single source."""
    names = part.chosen(scan)
    preflight.raise_all(_name_problems(names))
    if left := [name for name in scan.subsets if name not in names and not part.subsets]:
        print(f"  not taken, as others are for training: {', '.join(left[:20])}; --subsets takes them", flush=True)
    return [replace(part, name=name, subsets=[name]) for name in names]


def _write_preview(page: Path, parts: Sequence[tuple[Part, Scan]], one_box: bool, seed: int) -> None:
    """Write a page with the first and some random records of each part."""
    from experiments.reports.samples_page import Shown, count_tables, render_samples  # imports torch

    groups: dict[str, list[Shown]] = {}
    for part, scan in parts:
        entries = _entries(part, scan)
        drawn = random.Random(seed).sample(range(len(entries)), min(PREVIEWED, len(entries)))
        for kind, numbers in (("first", range(min(PREVIEWED, len(entries)))), ("at random", sorted(drawn))):
            converted = outcomes([entries[n] for n in numbers], scan.convert, scan.image_root, scan.frame, one_box)
            groups[f"{part.name}: {len(numbers)} {kind}"] = [Shown(part.name, one) for one in converted]
    tables = count_tables([shown for group in groups.values() for shown in group])
    write_atomic(page, render_samples("Before the import", groups, tables, "The tables count these samples alone."))
    print(f"wrote {page}", flush=True)


def _entries(part: Part, scan: Scan) -> Sequence[Any]:
    """The entries of all subsets. With a single subset they are not copied, because there may be millions."""
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
    """Import one part, unless it is finished; returns its counts."""
    folder, names = out / part.name, part.chosen(scan)
    count = None if part.count is None else math.ceil(part.count * surplus)
    # Each part has its own key, so a change in one part of a mixture does not affect the others.
    made_of = settings.seed, settings.records_per_shard, settings.one_box
    own = (asdict(part.own),) if part.is_own else ()
    key = fingerprint(VERSION, part.source, digests, names, count, made_of, *own)
    recorded = {"version": VERSION, "source": part.source, "subsets": names, "count": count, "annotations": digests}
    recorded |= dict(zip(("seed", "records_per_shard", "one_box"), made_of, strict=True))
    if run_identity.claim(folder, MadeOf(key, recorded)):
        print(f"{folder} is already imported with these settings", flush=True)
    else:
        tally = _convert(folder, part, scan, replace(settings, count=count), workers)
        write_json(folder / REPORT, tally.to_json())
        run_identity.write_marker(folder, key=key)
    forget_parts(folder)
    return read_json(folder / REPORT)


def _convert(folder: Path | None, part: Part, scan: Scan, settings: Settings, workers: Workers) -> Tally:
    """Convert one part, as `import_part` does, and print its counts."""
    entries = _entries(part, scan)
    tally = import_part(folder, entries, scan.convert, scan.image_root, settings, workers, part.name, scan.frame)
    print(f"{part.name}:\n{tally}", flush=True)
    return tally


def _finish(out: Path, scans: dict[tuple[str, str, str], tuple[Part, Scan]], tallies: dict[str, Any]) -> None:
    """Write the report of all parts, and the common manifest that joins the parts to one folder of shards."""
    sources: dict[str, Any] = {}
    for part, scan in scans.values():
        found = {"subsets": {name: len(entries) for name, entries in scan.subsets.items()}, "skipped": scan.skipped}
        statements = {"own": asdict(part.own)} if part.is_own else {}
        sources[f"{part.source} {part.root}".strip()] = scan.report | found | statements
    write_json(out / REPORT, {"sources": sources, "parts": tallies})
    shards = [
        shard | {"name": f"{name}/{shard['name']}"} for name in tallies for shard in read_manifest(out / name)["shards"]
    ]
    write_manifest(out, shards)
    print(f"{out}: {sum(shard['count'] for shard in shards):,} samples in {len(shards):,} shards", flush=True)


def _refuse_foreign(folder: Path) -> None:
    """End the program if `folder` has files that were not written by an import."""
    if folder.exists() and not folder.is_dir():
        sys.exit(f"out={str(folder)!r} is a file, where a folder of shards is to be written")
    made_here = run_identity.read_marker(folder, run_identity.STARTED).get("made_by") == MADE_BY
    if folder.exists() and any(folder.iterdir()) and not made_here:
        sys.exit(f"out={str(folder)!r} holds files that no import has written; choose another folder")


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards SOURCE=...`."""
    run_cli(run, args)


if __name__ == "__main__":
    main()
