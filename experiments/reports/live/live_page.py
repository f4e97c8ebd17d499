"""The page of a running experiment: its report, with the state, the times of the newest steps and the newest groups."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.persistence import folder_lock
from datamodules.persistence.durations import in_words
from experiments.reports.drawing.templates import render, script_json
from experiments.reports.find_runs import Run, find_runs
from experiments.reports.live.step_timeline import COLOUR, timeline
from experiments.reports.pipeline_report import report_values
from experiments.reports.rollout_pages import Pictures, run_shards, whole_group
from experiments.runs import metrics_csv, run_identity
from experiments.runs.results import find_phases
from lightning_modules.rl.rollout_log import LoggedGroup, read_newest

NUM_GROUPS = 6  # newest groups on the page
MOST_PICTURES = 400  # files; then the older ones are removed


class LivePage:
    """Builds the page of an experiment again when its files have changed.

    Args:
        folder: the experiment's folder; it may not exist yet.
        pictures: a folder for the pictures of groups, which the page names as pictures/<file>.
        seconds: how often the page in the browser asks for changes.
    """

    def __init__(self, folder: Path, pictures: Path, seconds: float) -> None:
        self.folder, self.pictures, self.seconds = folder, pictures, seconds
        self._built: tuple[str, str] = ("", "")  # (state, page)
        self._written: tuple[Path, Pictures] | None = None  # (phase, its pictures)

    def state(self) -> str:
        """A text that changes when the page would."""
        marks = []
        for phase in find_phases(self.folder):
            files = [
                *phase.glob("attempts/*/metrics.*"),
                *phase.glob("*.json*"),
                *phase.glob("benchmarks/*/result.json"),
            ]
            files += phase.glob("previews/*/previews.json")
            stats = [(file.name, file.stat()) for file in sorted(files) if file.exists()]
            marks.append((phase.name, folder_lock.is_locked(phase), [(n, s.st_size, s.st_mtime_ns) for n, s in stats]))
        return str(hash(str(marks)))

    def html(self) -> str:
        """The page."""
        state = self.state()
        if state != self._built[0]:
            self._built = state, self._render(state)
        return self._built[1]

    def _render(self, state: str) -> str:
        phases = find_phases(self.folder)
        if not phases:
            return render("waiting.html.j2", title=self.folder.name, folder=self.folder, seconds=self.seconds)
        newest = max(phases, key=_changed)
        values = report_values(self.folder)
        sections = {"now": "Now"} | values.pop("sections")
        facts = script_json({"state": state, "seconds": self.seconds})
        return render("live.html.j2", **values, sections=sections, now=self._now(newest), facts=facts, colours=COLOUR)

    def _now(self, phase: Path) -> dict[str, Any]:
        rows = metrics_csv.read_rows(phase)
        groups, notes = self._groups(phase)
        return {
            "phase": phase.name,
            "is_running": folder_lock.is_locked(phase),
            "is_finished": bool(run_identity.read_marker(phase)),
            "step": int(rows[-1]["step"]) if rows else None,
            "changed": in_words(max(0.0, time.time() - _changed(phase))),
            "timeline": timeline(rows),
            "groups": groups,
            "notes": notes,
        }

    def _groups(self, phase: Path) -> tuple[list[dict[str, Any]], list[str]]:
        """The newest groups of the rollout log of a phase, for the template, and sentences about missing pictures."""
        (run,) = find_runs([phase])
        log = run.rollout_log
        logged = read_newest(log, NUM_GROUPS) if run.config.get("data.box_format") else []
        if not logged:
            return [], []
        pictures = self._pictures(run, logged)
        return [_group_values(group, run, pictures) for group in logged], pictures.notes

    def _pictures(self, run: Run, logged: Sequence[LoggedGroup]) -> Pictures:
        """The pictures of these groups, written where they are new."""
        if self._written is None or self._written[0] != run.folder or self._written[1].num_written > MOST_PICTURES:
            shutil.rmtree(self.pictures, ignore_errors=True)
            self._written = run.folder, Pictures(self.pictures, run_shards(run), 2 * MOST_PICTURES)
        pictures = self._written[1]
        pictures.notes.clear()
        pictures.write(group.id for group in logged if group.id not in pictures.files)
        return pictures


def _changed(phase: Path) -> float:
    """The time of the last change of a phase's logs, in seconds since 1970."""
    files = [*phase.glob("attempts/*/metrics.*"), phase / run_identity.STARTED, *phase.glob("*.jsonl")]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _group_values(logged: LoggedGroup, run: Run, pictures: Pictures) -> dict[str, Any]:
    group = whole_group(logged, run, pictures)
    figures = []
    for place, (width, height) in enumerate(group["sizes"]):
        drawn = [{"kind": "true", "label": "", **_rectangle(box)} for box in group["truths"] if box[0] == place]
        written = [box for completion in group["completions"] for box in completion["boxes"]]
        drawn += [{"kind": "predicted", "label": "", **_rectangle(box)} for box in written if box[0] == place]
        file = group["pictures"][place] if place < len(group["pictures"]) else None
        figure = {"uri": f"pictures/{file}" if file else "", "caption": f"image {place + 1}", "boxes": drawn}
        figures.append(figure | {"width": width, "height": height})
    head = f"update {logged.update}, mean reward {logged.mean_reward:.2f}, mean IoU {logged.mean_iou:.2f}"
    return group | {"task": logged.task, "head": head, "figures": figures, "is_equal": logged.zero_advantage}


def _rectangle(box: Sequence[float]) -> dict[str, float]:
    """A box [image, x1, y1, x2, y2], possibly inverted or outside, cut to the picture."""
    xs, ys = (sorted(min(max(edge, 0.0), 1.0) for edge in edges) for edges in (box[1::2], box[2::2]))
    return {"x": xs[0], "y": ys[0], "width": xs[1] - xs[0], "height": ys[1] - ys[0]}
