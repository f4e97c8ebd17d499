"""Import published data sets as shards: `make shards SOURCE=mgrounding ROOT=/data/MGrounding-630k`.

SOURCE is a name in datamodules/importers/registry.py, or a YAML file with several sources and their shares, such as the
paper's mixture. The output is

    <out>/<part>/         the shards of one part
    <out>/manifest.json   all parts as one folder of shards
    <out>/import.json     the schema reports, and the rejected samples by rule

An import that was killed continues. A finished import is left as it is.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from datamodules.importers.reading.field_checks import format_report
from datamodules.importers.reading.source import Scan
from datamodules.importers.registry import SOURCES, VERSION
from datamodules.importers.run_import import Settings, Workers, forget_parts, import_part
from datamodules.persistence.files import file_sha256, fingerprint, read_json, write_json
from datamodules.persistence.processes import ProcessLost
from datamodules.streaming.shards import MANIFEST, read_manifest, write_manifest
from experiments.runs import preflight, run_identity
from experiments.runs.changes import MadeOf
from experiments.runs.commands import command

REPORT = "import.json"
MADE_BY = "import_shards"  # in the marker of a folder: this command has written it and may replace it


@dataclass(frozen=True)
class Part:
    """One part of a mixture.

    Args:
        name: name of its folder in `out`
        source: mgrounding, refcoco, odinw or v3det
        root: folder of the source, below the root of the mixture
        subsets: patterns of the source's subsets, or "!pattern" to leave some out; by default those for training
        count: number of samples, drawn at random; by default all
    """

    name: str
    source: str
    root: str = ""
    subsets: list[str] = field(default_factory=list)
    count: int | None = None


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
) -> None:
    """Import one source, or the parts of a mixture.

    Args:
        root: folder with the published files of the source; for a mixture, the folder with the folders of its sources
        source: mgrounding, refcoco, odinw or v3det; each of its subsets becomes a part
        out: folder to write; by default data/<source>
        subsets: patterns of the source's subsets, such as "*/val", or "!vector/*" to leave some out; by default those
            for training
        count: number of samples from each subset, drawn at random; by default all
        parts: a mixture, in place of `source`, `subsets` and `count`
        surplus: all counts are multiplied by this, because a later step will remove some samples
        seed: seed of the random choice of samples
        records_per_shard: records of the source in one shard
        max_rejected: stop if a larger share of the samples breaks a rule
        one_box: reject answers with several boxes, which training cannot score
        allow: unknown fields of the source's records that are accepted
        processes: number of processes; 0 means one for each core
        scan_only: print the schema reports and write nothing
    """
    # 1. Settings, and the key: a hash of the settings and of the annotation files.
    _check(root, source, out, parts, [count, *(part.count for part in parts or ())], surplus, records_per_shard)
    folder = Path(out or f"data/{source}")
    settings = Settings(None, seed, records_per_shard, max_rejected, one_box)
    wanted = [Part(source, source, "", subsets or [], count)] if parts is None else parts
    digests = {(part.source, part.root): _digests(part, root) for part in wanted}
    plan = [asdict(part) | {"digests": digests[part.source, part.root]} for part in wanted]
    key = fingerprint(VERSION, plan, parts is None, surplus, seed, records_per_shard, one_box)
    with run_identity.locked(folder):
        _refuse_foreign(folder)
        if run_identity.read_marker(folder).get("key") == key and not scan_only:
            print(f"{folder} is already imported with these settings", flush=True)
            return
        # 2. Read the annotations of all sources.
        scans = {place: _scan(*place, root, allow or ()) for place in digests}
        if scan_only:
            return
        # 3. Write the parts, one after the other. The old manifest goes first, because it may name parts that will be
        # renamed now.
        run_identity.write_marker(folder, run_identity.STARTED, key=key, made_by=MADE_BY)
        (folder / MANIFEST).unlink(missing_ok=True)
        if parts is None:
            wanted = _part_for_each_subset(wanted[0], scans[source, ""])
        tallies = {}
        with Workers(processes or os.cpu_count() or 1) as workers:
            for part in wanted:
                place = part.source, part.root
                tallies[part.name] = _import(folder, part, scans[place], digests[place], settings, surplus, workers)
        # 4. The common manifest and report; the marker comes last.
        _finish(folder, scans, tallies)
        run_identity.write_marker(folder, key=key)


def _check(
    root: str,
    source: str,
    out: str,
    parts: Sequence[Part] | None,
    counts: Sequence[int | None],
    surplus: float,
    records_per_shard: int,
) -> None:
    """Raise SettingsError with all wrong settings at once."""
    faults = []
    if not Path(root).is_dir() or not root:
        faults.append(f"root={root!r} is no folder")
    if (parts is None) == (not source):
        faults.append(f"source={source!r} with {len(parts or ())} parts: exactly one of the two is needed")
    if parts is not None and not out:
        faults.append("out='': a mixture needs a folder to write")
    names = [source] * bool(source) + [part.source for part in parts or ()]
    faults += [f"source={name!r} is none of {', '.join(SOURCES)}" for name in names if name not in SOURCES]
    folders = [part.name for part in parts or ()]
    faults += [f"two parts are named {name!r}" for name in sorted(set(folders)) if folders.count(name) > 1]
    faults += [f"count={count} is below 1" for count in counts if count is not None and count < 1]
    if surplus < 1:
        faults.append(f"surplus={surplus} is below 1")
    if records_per_shard < 1:
        faults.append(f"records_per_shard={records_per_shard} is below 1")
    preflight.raise_all(faults)


def _digests(part: Part, root: str) -> dict[str, str]:
    """{path: sha256} of the annotation files of a part's source."""
    files = SOURCES[part.source].annotation_files(Path(root, part.root))
    return {str(file.relative_to(Path(root, part.root))): file_sha256(file) for file in files}


def _scan(source: str, below: str, root: str, allow: Sequence[str]) -> Scan:
    """Scan a source, and print its schema report and its subsets."""
    print(f"{source} in {Path(root, below)}:", flush=True)
    scan = SOURCES[source].scan(Path(root, below), allow)
    print(format_report(scan.report))
    print("  subsets: " + ", ".join(f"{name} {len(entries):,}" for name, entries in scan.subsets.items()))
    print("  no questions: " + (", ".join(f"{why} {n:,}" for why, n in scan.skipped.items()) or "none"), flush=True)
    return scan


def _chosen(part: Part, scan: Scan) -> list[str]:
    """The subsets that match the part's patterns and none of its "!patterns".

    Raises:
        ValueError: a pattern matches no subset, or no subset is left.
    """
    without = [pattern[1:] for pattern in part.subsets if pattern.startswith("!")]
    asked = [pattern for pattern in part.subsets if not pattern.startswith("!")]
    patterns = asked or SOURCES[part.source].DEFAULT_SUBSETS

    def matches(name: str, some: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in some)

    names = [name for name in scan.subsets if matches(name, patterns) and not matches(name, without)]
    idle = [pattern for pattern in asked if not fnmatch.filter(scan.subsets, pattern)]
    if idle or not names:
        raise ValueError(f"{part.name}: subsets={idle or list(patterns)} match none of {', '.join(scan.subsets)}")
    return names


def _part_for_each_subset(part: Part, scan: Scan) -> list[Part]:
    """One part for each chosen subset of a single source."""
    return [Part(name, part.source, part.root, [name], part.count) for name in _chosen(part, scan)]


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
    folder, names = out / part.name, _chosen(part, scan)
    count = None if part.count is None else math.ceil(part.count * surplus)
    # Each part has its own key, so a change in one part of a mixture leaves the others as they are.
    made_of = settings.seed, settings.records_per_shard, settings.one_box
    key = fingerprint(VERSION, part.source, digests, names, count, made_of)
    recorded = {"version": VERSION, "source": part.source, "subsets": names, "count": count, "annotations": digests}
    recorded |= dict(zip(("seed", "records_per_shard", "one_box"), made_of, strict=True))
    if run_identity.claim(folder, MadeOf(key, recorded)):
        print(f"{folder} is already imported with these settings", flush=True)
    else:
        # The entries of a single subset are not copied into a list.
        several = list(itertools.chain.from_iterable(scan.subsets[name] for name in names)) if names[1:] else None
        entries = scan.subsets[names[0]] if several is None else several
        settings = replace(settings, count=count)
        where = scan.image_root, settings, workers, part.name, scan.frame
        tally = import_part(folder, entries, scan.convert, *where)
        write_json(folder / REPORT, tally.to_json())
        run_identity.write_marker(folder, key=key)
        print(f"{part.name}:\n{tally}", flush=True)
    forget_parts(folder)
    return read_json(folder / REPORT)


def _finish(out: Path, scans: dict[tuple[str, str], Scan], tallies: dict[str, Any]) -> None:
    """Write the report of all parts, and the manifest by which the parts are one folder of shards."""
    sources = {
        f"{source} {below}".strip(): scan.report
        | {"subsets": {name: len(entries) for name, entries in scan.subsets.items()}, "skipped": scan.skipped}
        for (source, below), scan in scans.items()
    }
    write_json(out / REPORT, {"sources": sources, "parts": tallies})
    shards = [
        shard | {"name": f"{name}/{shard['name']}"} for name in tallies for shard in read_manifest(out / name)["shards"]
    ]
    write_manifest(out, shards)
    print(f"{out}: {sum(shard['count'] for shard in shards):,} samples in {len(shards):,} shards", flush=True)


def _refuse_foreign(folder: Path) -> None:
    """End the program if `folder` holds files that no import has written."""
    made_here = run_identity.read_marker(folder, run_identity.STARTED).get("made_by") == MADE_BY
    if folder.exists() and any(folder.iterdir()) and not made_here:
        sys.exit(f"out={str(folder)!r} holds files that no import has written; choose another folder")


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards SOURCE=...`."""
    try:
        auto_cli(run, as_positional=False, args=args)
    except (preflight.SettingsError, ProcessLost) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
