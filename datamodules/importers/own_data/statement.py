"""The user's statements about their own data, which the format does not contain. They are never guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from datamodules.images.image_files import Frame
from datamodules.persistence.problems import Problems

# The four numbers are x1, y1, x2, y2; for names that end in xywh they are x, y, width, height.
Coordinates = Literal[
    "pixels",  # of the image file
    "pixels_xywh",
    "resized_pixels",  # of the image as Qwen2.5-VL's processor resizes it (`resized_limits`)
    "relative_1000",  # 0 to 1000 over the image
    "relative_1000_xywh",
    "normalized",  # 0 to 1 over the image
    "normalized_xywh",
]
COORDINATES: tuple[Coordinates, ...] = get_args(Coordinates)
# Names of the subsets that are imported by default; if no subset has such a name, all are imported.
TRAIN = ("train*", "*/train*", "*_train*", "*-train*")


@dataclass(frozen=True)
class OwnData:
    """A user's statements about their own data.

    Args:
        name: name of the data set in the ids of its samples; by default the name of ROOT's folder or file
        box_format: format of the four numbers of a box, if the record's format does not define it
        frame: frame of the boxes in photographs that EXIF rotates: "stored" (pixels as in the file) or "shown"
            (upright). By default such photographs are rejected
        images: folder to which the image names are relative; by default ROOT
        task: name of the task for records without a field `task`; by default `name`
        fields: field name of the format -> field name in the records: {prompt: problem, solution: bbox}
        questions: wordings of questions about categories, with {} for the category; by default the project's wordings
        categories: names of the categories, if records contain category numbers from 0
        image_in_question: whether a question that names exactly one image means the image of its answer
        resized_limits: smallest and largest number of pixels of the resized images, for box_format=resized_pixels
        follow_links: whether links in the image folder may lead out of it
        max_misfits: stop when a larger share of the boxes contradicts the box format
        config: name of the configuration, for a Hugging Face data set with several
    """

    name: str = ""
    box_format: Coordinates | None = None
    frame: Frame | None = None
    images: str = ""
    task: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    image_in_question: bool = False
    resized_limits: list[int] | None = None
    follow_links: bool = False
    max_misfits: float = 0.05
    config: str | None = None

    def problems(self) -> Problems:
        """The invalid statements, as messages."""
        problems, limits = Problems("own."), self.resized_limits
        # The limits and the format must be given together.
        needed = self.box_format == "resized_pixels"
        problems.require(
            needed == (limits is not None),
            ": the processor's [min_pixels, max_pixels], such as [3136, 1003520], belong to resized_pixels",
            box_format=self.box_format,
            resized_limits=limits,
        )
        sound = limits is None or (len(limits) == 2 and 0 < limits[0] <= limits[1])
        problems.require(sound, "must be two numbers of pixels, the smaller one first", resized_limits=limits)
        for text in self.questions:
            # A second brace, such as "{0}" or "{name}", would make str.format fail in the middle of an import.
            once = text.count("{}") == text.count("{") == text.count("}") == 1
            problems.require(once, "must hold {} once, where the category stands", questions=text)
        problems.require(not self.images or Path(self.images).is_dir(), "is no folder", images=self.images)
        problems.require(0 <= self.max_misfits <= 1, "is a share and must lie in 0-1", max_misfits=self.max_misfits)
        plain = "/" not in self.name and self.name not in (".", "..")
        problems.require(plain, "must be a plain name", name=self.name)
        return problems

    def dataset_name(self, root: str | Path) -> str:
        """`name`, or the last part of the data set's path: "kites" of /data/kites and of /data/kites.jsonl."""
        path = Path(root)
        return self.name or (path.stem if path.is_file() else path.absolute().name)
