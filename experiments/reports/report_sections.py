"""Sections of report.html beside the stages: evaluations, settings with command and machine, previews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.metrics.drawing import PREVIEW_TEXTS
from datamodules.metrics.result_files import RESULT, official_gap, read_result
from datamodules.persistence.files import read_json
from experiments.reports.drawing.pictures import data_uri
from experiments.reports.find_runs import flatten
from experiments.runs.results import EVALUATION
from experiments.runs.run_identity import STARTED, read_marker, read_settings
from lightning_modules.serving.generation_rules import note

MAX_PREVIEWS = 12  # largest number of previews of one phase, because they are inside the page


def evaluations(homes: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The results of all benchmarks.

    Args:
        homes: name of a model, such as "grpo" -> folder with one folder for each benchmark.

    Returns:
        For each benchmark of each model: title, rows of text cells (header first), and notes.

    Raises OtherVersion for a result of an earlier version.
    """
    found = []
    for name, home in homes.items():
        for file in sorted(home.glob(f"*/{RESULT}")):
            result = read_result(file)
            found.append({"title": f"{name}: {file.parent.name}", "rows": score_rows(result), "notes": _notes(result)})
    return found


def score_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Columns and averages of a result with their intervals, as rows of text cells, header first."""
    gap = official_gap(result)
    has_f1 = any("f1" in cell for cell in result["columns"].values())
    rows = [["column", "score", "95 % interval", *["official"] * (gap is None), *["F1"] * has_f1, "questions"]]
    for kind in ("columns", "averages"):
        for name, cell in result[kind].items():
            row = [name, f"{cell['score']:.2f}", f"{cell['low']:.2f} to {cell['high']:.2f}"]
            if gap is None:
                official = result["official"].get(kind, {}).get(name)
                row.append(f"{official['score']:.2f}" if official else "–")
            rows.append([*row, *([f"{cell['f1']:.2f}" if "f1" in cell else "–"] * has_f1), f"{cell['n']:,}"])
    return rows


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences about how a result was measured."""
    rule, failures = result.get("rule", {}).get("source"), sum(result["failures"].values())
    notes = [f"Model: {result['model']}. Data: {result['data_root']}."]
    notes += [f"Scores are percentages. Rule: {rule}."] if rule else []
    notes += [f"{gap}."] if (gap := official_gap(result)) else []
    notes += [f"At most {result['limit']} questions of each column were asked."] if result["limit"] is not None else []
    notes += [f"Decoding{how}."] if (how := note(result["generation"])) else []
    return [*notes, f"{failures:,} of {result['n']:,} answers could not be read."]


def settings(phases: Sequence[Path]) -> list[dict[str, Any]]:
    """For each phase: name, command ("" if it was not recorded), rows about the machine, rows of all settings."""
    shown = []
    for phase in phases:
        started = read_marker(phase, STARTED)
        facts = started if "command" in started else read_json(phase / "benchmarks" / EVALUATION)
        fields = flatten(read_settings(phase))
        cells = [[name, "null" if value is None else str(value)] for name, value in fields.items()]
        shown.append(described(phase.name, facts) | {"rows": [["setting", "value"], *cells] if cells else []})
    return [entry for entry in shown if entry["command"] or entry["rows"]]


def described(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Name, command, machine and (no) settings of a run from its recorded facts."""
    machine = facts.get("machine", {})
    commit = [["commit", facts["commit"]]] if facts.get("commit") else []
    rows = [["machine", "value"], *commit, *([key, value] for key, value in machine.items())]
    return {"name": name, "command": facts.get("command", ""), "machine": rows if len(rows) > 1 else [], "rows": []}


def previews(phase: Path) -> dict[str, Any]:
    """The newest previews of a phase: their step, and for each the PNG as a data URI, its texts, and an alt text."""
    folder = next(iter(sorted((phase / "previews").glob("step_*"), reverse=True)), None)
    if folder is None:
        return {"step": 0, "num_left_out": 0, "items": []}
    texts = read_json(folder / PREVIEW_TEXTS)  # previews of earlier versions have their texts in the picture
    known = {text["file"]: text for text in texts} if isinstance(texts, list) else {}
    files = sorted(folder.glob("*.png"))
    items = []
    for file in files[:MAX_PREVIEWS]:
        text = known.get(file.name)
        alt = f"{file.stem}: images with the true and the predicted boxes"
        uri = data_uri(file.read_bytes())
        items.append({"name": file.stem, "uri": uri, "text": text, "alt": alt})
    step = int(folder.name.removeprefix("step_"))
    return {"step": step, "num_left_out": len(files) - len(items), "items": items}
