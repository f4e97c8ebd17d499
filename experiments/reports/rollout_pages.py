"""Write the rollouts of a run as small files beside a page. The page loads only the files that it shows.

    <folder>/index.js          the fields by which a reader filters and sorts groups
    <folder>/chunk-00012.js    GROUPS_PER_CHUNK groups
    <folder>/pictures/7-1.png  image 1 of sample 7

The files are scripts, because a page that is opened as file:// can load only scripts and images. Each calls one
function of pages/compare.js. Model output in them is data: JSON strings in ASCII, without "<", which could end a
script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.images.image_loading import MAX_IMAGE_PIXELS, ImageError, load_image
from datamodules.metrics.predictions import answer_from_json
from datamodules.persistence.files import write_atomic
from datamodules.samples.answer_text import AnswerForm, ParsedAnswer, answer_text, parse_answer
from datamodules.samples.boxes import BoxFormat, image_sizes_from_json
from datamodules.samples.sample import SampleError
from datamodules.samples.scores import score_text, true_boxes
from datamodules.streaming.manifest import MANIFEST
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import source_list
from experiments.reports.drawing.pictures import SHARP
from experiments.reports.drawing.templates import script_json
from experiments.reports.find_runs import Run
from experiments.runs import run_identity
from lightning_modules.rl.rollout_log import LoggedGroup

GROUPS_PER_CHUNK = 50
LONGEST_SIDE = 640  # pixels of a picture


@dataclass(frozen=True)
class WrittenLog:
    """Counts and notes about the written rollouts of one run."""

    num_groups: int
    num_written: int
    num_pictures: int
    notes: tuple[str, ...]  # sentences for the reader of the page


def write_rollouts(run: Run, folder: Path, name: str, max_groups: int, max_pictures: int) -> WrittenLog:
    """Write the files of a run that has a rollout log.

    Args:
        run: the run.
        folder: the folder for its files.
        name: the run's name in the page's script.
        max_groups: largest number of groups, spread evenly over the run.
        max_pictures: largest number of pictures, spread evenly over the written groups.

    Raises ValueError if the run's configuration does not contain the box format.
    """
    if not run.config:
        raise ValueError(
            f"{run.folder}: rollouts, but no {run_identity.CONFIG} with data.box_format to read their boxes by"
        )
    # raises an error with the file name if another version has written it
    run_identity.read_field(run.folder, "data.box_format")
    # 1. Choose the groups, because a long run has more than a browser can show.
    groups = thin(run.groups, max_groups)
    notes = []
    if len(groups) < len(run.groups):
        notes.append(f"{len(groups):,} of {len(run.groups):,} groups are here, evenly over the run (--max_groups).")
    # 2. Read their images and questions from the shards, because the log has neither.
    pictures = Pictures(folder / "pictures", run_shards(run), max_pictures)
    pictures.write(group.id for group in groups)
    notes += pictures.notes
    # 3. Write a short index that the page loads first, and chunks of groups that it loads on demand.
    tasks = sorted({group.task for group in groups})
    rows = [_index_row(group, tasks) for group in groups]
    head = {"chunk": GROUPS_PER_CHUNK, "tasks": tasks, "groups": rows}
    write_script(folder / "index.js", "receiveIndex", name, head)
    for number, start in enumerate(range(0, len(groups), GROUPS_PER_CHUNK)):
        whole = [whole_group(group, run, pictures) for group in groups[start : start + GROUPS_PER_CHUNK]]
        write_script(folder / f"chunk-{number:05d}.js", "receiveChunk", f"{name}/{number}", whole)
    return WrittenLog(len(run.groups), len(groups), pictures.num_written, tuple(notes))


def thin(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, evenly spaced, including the first and (if `limit` > 1) the last."""
    if len(items) <= limit:
        return list(items)
    if limit < 2:
        return list(items[:limit])
    return [items[round(k * (len(items) - 1) / (limit - 1))] for k in range(limit)]


def write_script(path: Path, function: str, name: str, value: Any) -> None:
    """A script that passes a value to a function of the page."""
    write_atomic(path, f"{function}({script_json(name)}, {script_json(value)});\n")


class Pictures:
    """The images of logged samples as small files, and their questions; `notes` names the missing ones."""

    def __init__(self, folder: Path, shards: list[str], limit: int) -> None:
        self.folder, self.shards, self.limit = folder, shards, limit
        self.files: dict[str, list[str]] = {}  # sample id -> names in `folder`
        self.questions: dict[str, str] = {}
        self.num_written = 0
        self.notes: list[str] = []

    def write(self, ids: Iterable[str]) -> None:
        """Write the images of the samples up to the limit, spread evenly over the samples."""
        wanted = list(dict.fromkeys(ids))
        if not all((Path(folder) / MANIFEST).is_file() for folder in self.shards):
            self.notes.append(f"No pictures and questions: no shards in {', '.join(self.shards)}.")
            return
        reader = ShardReader(self.shards, since=0)  # the training run has already verified these shards
        numbers = reader.find(set(wanted))
        if len(numbers) < len(wanted):
            self.notes.append(f"{len(wanted) - len(numbers):,} of {len(wanted):,} samples are not in the shards.")
        self.folder.mkdir(parents=True, exist_ok=True)
        broken = 0
        for name in _spread([name for name in wanted if name in numbers]):
            try:
                loaded = reader.read(numbers[name])
                self.questions[name] = loaded.sample.question
                if self.num_written + len(loaded.images) <= self.limit:
                    self.files[name] = [
                        self._save(data, f"{numbers[name]}-{place}") for place, data in enumerate(loaded.images)
                    ]
            except (SampleError, ImageError):
                broken += 1
        if broken:
            self.notes.append(f"{broken:,} samples have images that cannot be read.")
        if len(self.files) + broken < len(numbers):
            shown = f"{len(self.files):,} of {len(numbers):,} prompts ({self.num_written:,} files)"
            self.notes.append(f"Pictures are here for {shown}, spread over the run (--max_pictures).")

    def _save(self, data: bytes, stem: str) -> str:
        image = load_image(data, MAX_IMAGE_PIXELS)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        # Small images stay sharp as PNG; photographs take far less space as JPEG.
        name = f"{stem}.png" if max(image.size) <= SHARP else f"{stem}.jpg"
        image.save(self.folder / name)
        self.num_written += 1
        return name


def _spread(items: list[Any]) -> list[Any]:
    """The items in an order of which any first part is spread evenly: items 0, 16, 32, …, then 1, 17, 33, …"""
    return [item for start in range(16) for item in items[start::16]]


def run_shards(run: Run) -> list[str]:
    """The shards with the prompts of the run: those that rejection sampling has kept, or else the pool."""
    kept = run.folder / "rejection_sampling" / "shards"
    if (kept / MANIFEST).is_file():
        return [str(kept)]
    return [str(folder) for folder in source_list(run_identity.read_field(run.folder, "data.shards"))]


def _index_row(group: LoggedGroup, tasks: list[str]) -> list[Any]:
    scores = round(group.mean_reward, 4), round(group.mean_iou, 4)
    return [group.batch, group.update, group.id, tasks.index(group.task), int(group.zero_advantage), *scores]


def whole_group(group: LoggedGroup, run: Run, pictures: Pictures) -> dict[str, Any]:
    """The data of a group for the page. Each box is [index of its image, x1, y1, x2, y2], in 0-1 of this image."""
    record = group.read()
    answer = answer_from_json(record["answer"])
    image_sizes = image_sizes_from_json(record["sizes"])
    # Use the settings of this run, because today's defaults may differ. Earlier versions had one form of answers.
    box_format = BoxFormat(run.config["data.box_format"])
    form = AnswerForm(run.config.get("data.answer_form", AnswerForm.ONE_BOX))
    completions = []
    for text, reward, advantage in zip(record["texts"], record["rewards"], record["advantages"], strict=True):
        parsed, score = parse_answer(text), score_text(text, answer, image_sizes, box_format, form=form)
        completions.append(
            {
                "thinking": parsed.thinking if isinstance(parsed, ParsedAnswer) else None,
                "answer": answer_text(text),
                "text": text,
                "boxes": [[box.image, *box.box] for box in score.matching.written if box.image is not None],
                "iou": score.iou,
                "reward": reward,
                "advantage": advantage,
            }
        )
    return {
        "id": group.id,
        "question": pictures.questions.get(group.id),
        "pictures": pictures.files.get(group.id, []),
        "sizes": [sizes.original for sizes in image_sizes],
        "truths": [[box.image, *box.box] for box in true_boxes(answer)],
        "labels": [box.label for box in true_boxes(answer)],
        "completions": completions,
    }
