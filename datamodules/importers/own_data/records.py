"""Convert a user's records to samples. Both JSON lines and rows of Hugging Face data sets use this."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from datamodules.importers.own_data.coordinates import Size, Written, refuse_misfits, to_unit
from datamodules.importers.own_data.drafts import NO_BOX, Draft, DraftBox, DraftRecord, draft_record
from datamodules.importers.own_data.forms import FIELDS
from datamodules.importers.own_data.image_folder import ImageFolder, ReadImages
from datamodules.importers.own_data.statement import Coordinates, OwnData
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.image_bytes import turn_upright
from datamodules.importers.reading.source import name_record
from datamodules.samples.sample import LoadedSample, Sample, SampleError

T = TypeVar("T")
CHECKED = 2000  # number of records of a file whose boxes are compared with the box format before anything is written
_MARKED = "<|box_start|>({},{}),({},{})<|box_end|>"  # notation of a box in a question of Qwen2-VL and MIG-Bench


@dataclass(frozen=True)
class RecordReader:
    """Makes samples of records.

    `name` is the name of the data set, `source` the name in the registry, `own` the user's statements.
    """

    source: str
    name: str
    own: OwnData
    folder: ImageFolder

    def samples(self, record: Mapping[str, Any], place: str) -> Iterator[LoadedSample | SampleError]:
        """Make a sample or an error for each question of a record.

        Args:
            record: the record as in the file.
            place: its position, such as "train:17"; the ids of the samples are made of the data set's name and this.
        """
        sample_id = f"{self.name}/{place}"
        try:
            made = draft_record(record, self.own, sample_id)
            any_sound = any(isinstance(draft, Draft) for draft in made.drafts)
            images = self.folder.read(made.images, sample_id) if any_sound else None
        except SampleError as error:
            yield name_record(error, self._own_id(record))
            return
        except RecursionError:
            yield SampleError(sample_id, "field_type", "its lists and objects are nested too deep")
            return
        yield from self.finish(made, images, record, sample_id)

    def finish(
        self, made: DraftRecord, images: ReadImages | None, record: Mapping[str, Any], sample_id: str
    ) -> Iterator[LoadedSample | SampleError]:
        """Make the samples of a record whose images have been read.

        Args:
            made: the record's drafts.
            images: its images; None is allowed if no draft is a question.
            record: the record, for its fields `id` and `task`.
            sample_id: id of the record; if it has several samples, their numbers are added.
        """
        for number, draft in enumerate(made.drafts):
            name = f"{sample_id}/{number}" if len(made.drafts) > 1 else sample_id
            try:
                if isinstance(draft, SampleError):
                    raise draft
                yield self._sample(record, made, draft, images, name)
            except SampleError as error:
                yield name_record(error, self._own_id(record))

    def _sample(
        self, record: Mapping[str, Any], made: DraftRecord, draft: Draft, images: ReadImages, name: str
    ) -> LoadedSample:
        coordinates = made.coordinates
        if coordinates is None:  # boxes are so rare in the file that the check of the file did not see one
            raise SampleError(name, "box_format_unknown", "nothing says what its numbers mean: state own.box_format")
        # 1. Convert boxes to 0-1, each with the size of its own image.
        boxes = [self._box(box, coordinates, images, name) for box in draft.boxes]
        parts, asked = [], []
        for part in draft.parts:
            if isinstance(part, DraftBox):
                asked.append(self._box(part, coordinates, images, name))
                text = _MARKED.format(*(round(1000 * value) for value in asked[-1][0]["box"]))
                parts.append({"type": "box", "image": part.image, "box": asked[-1][0]["box"], "text": text})
            elif isinstance(part, int):
                parts.append({"type": "image", "image": part})
            elif part:
                parts.append({"type": "text", "text": part})
        # 2. The additional fields, and the sample itself, validated like every sample.
        answers = [answer for answer, _ in boxes]
        extra: dict[str, Any] = {"image_from": draft.image_from, "form": made.form}
        # The record's own id is only an additional field, because it may not be unique.
        if (number := self._own_id(record)) is not None:
            extra["record"] = number
        if any(clamped for _, clamped in boxes + asked):
            extra["repaired"] = "clamped_box"
        sample = Sample.from_json(
            {
                "id": name,
                "source": self.source,
                "task": self._task(record),
                "images": list(images.names),
                "messages": parts,
                "answer": answers[0] if len(answers) == 1 else {"boxes": answers},
                "thinking": draft.thinking,
                "extra": extra,
            }
        )
        # 3. Boxes of stored pixels become boxes of the image as it is shown.
        return turn_upright(LoadedSample(sample, images.files), images.headers, self.folder.frame)

    def _box(
        self, box: DraftBox, coordinates: Coordinates, images: ReadImages, name: str
    ) -> tuple[dict[str, Any], bool]:
        size = images.sizes[box.image]
        unit, clamped = to_unit(box.values, coordinates, size, self.own.resized_limits, name)
        return {"image": box.image, "box": list(unit), "label": box.label}, clamped

    def _task(self, record: Mapping[str, Any]) -> str:
        task = record.get(self.own.fields.get("task", "task"))
        return task if isinstance(task, str) and task else self.own.task or self.name

    def _own_id(self, record: Mapping[str, Any]) -> str | int | None:
        number = record.get(self.own.fields.get("id", "id"))
        if isinstance(number, str):
            return number.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to a shard
        return number if isinstance(number, int) and not isinstance(number, bool) else None


class Reservoir(Generic[T]):
    """Draws CHECKED items from a stream with equal probability and a fixed seed (Vitter 1985, algorithm R)."""

    def __init__(self) -> None:
        self.kept: list[T] = []
        self.seen = 0
        self.rng = random.Random(0)

    def add(self, item: T) -> None:
        """Take one item of the stream into account."""
        self.seen += 1
        if len(self.kept) < CHECKED:
            self.kept.append(item)
        elif (index := self.rng.randrange(self.seen)) < CHECKED:
            self.kept[index] = item


class Kept(NamedTuple):
    """The data of one record that the check of a file's boxes needs. `key` identifies its images."""

    coordinates: Coordinates | None
    boxes: tuple[DraftBox, ...]
    key: Any
    place: str


def compare_boxes(
    where: str, drawn: Sequence[Kept], sizes_of: Callable[[Kept], Sequence[Size]], own: OwnData, schema: Schema
) -> None:
    """Check the boxes of a file, and count the box formats that fit them.

    Args:
        where: the file, for messages and the report.
        drawn: records of the file, or a random part of them.
        sizes_of: the sizes of a record's images in the frame of the boxes; it may raise SampleError.
        own: the user's statements.
        schema: the report to which the counts are added.

    Raises:
        DataError: the boxes contradict the box format, or none is known.
    """
    # Records of several formats may state different box formats, so each group is checked separately. The scan reads
    # image headers only here, for at most CHECKED records of the file.
    by_coordinates: dict[Coordinates | None, list[Written]] = {}
    for kept in drawn:
        written = by_coordinates.setdefault(kept.coordinates, [])
        try:
            sizes = sizes_of(kept)
        except SampleError:
            continue  # the import itself rejects and counts it
        written += [Written(box.values, sizes[box.image], kept.place) for box in kept.boxes]
    for coordinates, written in by_coordinates.items():
        fits = refuse_misfits(where, written, coordinates, own.resized_limits, own.max_misfits)
        title = f"{where}: of {len(written):,} boxes said to be {coordinates}, each format could mean"
        schema.counts[title].update(fits)


@dataclass
class RecordScan:
    """The scan of the records of one file. It counts their fields and checks their boxes.

    Memory does not grow with the file, because only CHECKED random records (with a fixed seed) are checked. `images_of`
    returns the images for the key of a record.
    """

    reader: RecordReader
    schema: Schema
    skipped: Counter[str]
    images_of: Callable[[Any], Sequence[Any]]
    drawn: Reservoir[Kept] = field(default_factory=Reservoir)

    def look(self, record: Mapping[str, Any], place: str, key: Any = None) -> bool:
        """Count one record; returns whether it is imported. A record whose answers are texts is only counted.

        An invalid record is imported too, so that the import rejects it with its rule.

        Args:
            record: the record as in the file; only the number of its images is used.
            place: its position, for messages.
            key: the key for `images_of`; by default the record's own images.
        """
        own = self.reader.own
        try:
            made = draft_record(record, own, place)
        except SampleError as error:
            return not self._skip(error.rule)
        except RecursionError:
            return True
        # 1. Count the content of the file.
        self.schema.count("forms", made.form)
        self.schema.count("images a record", str(len(made.images)))
        if made.has_system:
            self.schema.count("system prompts", "not used: the project's own stands in the chat template")
        known = [own.fields.get(name, name) for name in FIELDS[made.form]]
        self.schema.tally(f"{made.form} record", record, known)
        # 2. Check whether the record is a question, and keep its boxes for the check of the whole file.
        sound = [draft for draft in made.drafts if isinstance(draft, Draft)]
        if not sound:
            rules = {draft.rule for draft in made.drafts if isinstance(draft, SampleError)}
            return not (rules == {NO_BOX} and self._skip(NO_BOX))
        boxes = tuple(box for draft in sound for box in (*draft.parts, *draft.boxes) if isinstance(box, DraftBox))
        self.drawn.add(Kept(made.coordinates, boxes, made.images if key is None else key, place))
        return True

    def finish(self, where: str) -> None:
        """Raise DataError if the boxes contradict the box format, or if it is unknown. Then forget the kept records."""

        def sizes_of(kept: Kept) -> list[Size]:
            return self.reader.folder.sizes(self.images_of(kept.key), kept.place)

        compare_boxes(where, self.drawn.kept, sizes_of, self.reader.own, self.schema)
        # The next file begins with an empty reservoir, because each file is checked alone.
        self.drawn = Reservoir()

    def _skip(self, rule: str) -> bool:
        """Count a record that is not a question; returns whether `rule` has this meaning."""
        self.skipped[NO_BOX] += rule == NO_BOX
        return rule == NO_BOX
