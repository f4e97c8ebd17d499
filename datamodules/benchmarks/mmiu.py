"""MMIU (Meng et al.): the tasks of the paper's Tables 7 and 8 (three semantic groups, and two-dimensional space).

    MMIU/all.parquet        task, question, context, options "A: …\\nB: …", input_image_path [str], output (a letter)
    MMIU/<Category>/<task>/…   the images; some copies lack <Category>

A column of the table is a task of the paper. It may join two keys of the file; then its accuracy is the mean of both
accuracies. The official code parses a letter, and asks GPT-4o-mini if it finds none. This last step is skipped unless
an extractor is named (`extraction.py`).

Questions and options hold coordinates of the stored pixels, in many wordings. They cannot be converted for a photograph
that EXIF rotates, so a question on such an image counts as wrong with the reason "turned_image".
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.benchmarks.base import (
    WITHOUT_MODEL,
    Benchmark,
    Rule,
    file_benchmark,
    files_fingerprint,
    make_sample,
)
from datamodules.benchmarks.reading.parquet import read_rows
from datamodules.images.image_files import file_size, load_images, refuse_turned
from datamodules.samples.option_mentions import option_letters
from datamodules.samples.sample import LoadedSample, Sample, SampleError

NAME, FOLDER = "mmiu", "MMIU"
# Column -> keys of the file, compared in lower case.
SEMANTIC = {
    "VGR": ("visually_grounded_reasoning_marvl", "visually_grounded_reasoning_nlvr2"),
    "STS": ("spot_the_similarity",),
    "VCor": ("visual_correspondence_blink", "visual_correspondence_scannet"),
    "SC": ("semantic_correspondence_blink", "semantic_correspondence_misc210k"),
    "FC": ("functional_correspondence_blink", "functional_correspondence_funk_point"),
    "ER": ("emotion_recognition_expw", "emotion_recognition_findingemo"),
    "CR": ("casuality_reasoning_next_qa", "casuality_reasoning_var"),
    "MIC": ("multiple_image_captioning",),
    "VQA": ("visual_quality_assessment_q_bench+", "visual_quality_assessment_ve_lol_l"),
    "FD": ("forensic_detection_blink", "forensic_detection_forgerynet"),
}
SPATIAL = {
    "RPM": ("ravens_progressive_matrices",),
    "JPS": ("jigsaw_puzzle_solving",),
    "ICSC": ("image_captioning_with_spatial_context",),
    "IQASC": ("icon_question_answering_with_spatial_context",),
    "ITRSC": ("image_text_retrieval_with_spatial_context",),
    "ISTE": ("image_spatial_transformation_estimation",),
    "HE": ("homography_estimation",),
    "PT": ("point_tracking",),
    "SOT": ("single_object_tracking",),
}
COLUMNS = SEMANTIC | SPATIAL
AVERAGES = {"avg": tuple(COLUMNS), "semantic": tuple(SEMANTIC), "spatial": tuple(SPATIAL)}
RULE = Rule(source="paper Tables 7 and 8: mean over tasks, a task of two keys is their mean", within="macro")
OFFICIAL = Rule(source=f"MMIU evaluate.py {WITHOUT_MODEL}", within="macro", reader="mmiu")
_KEYS = {key: column for column, keys in COLUMNS.items() for key in keys}
_FIELDS = ("task", "question", "context", "options", "input_image_path", "output")
_OPTION = re.compile(r"^\s*\(?([A-Z])\)?\s*[:.)][ \t]?(.*)$", re.MULTILINE)


def load(root: Path) -> Benchmark:
    """Raises ValueError that names a missing column, a task without rows or a wrong field."""
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    for position, row in enumerate(read_rows(root / "all.parquet", _FIELDS)):
        _check_texts(row, position)
        key = row["task"].lower()
        if key not in _KEYS:
            dropped["task of another group"] += 1
        elif not row["output"]:
            dropped["no output"] += 1  # the official script skips these too
        else:
            samples.append(_sample(row, key, position))
    if absent := sorted(set(_KEYS) - {sample.task for sample in samples}):
        raise ValueError(f"{root / 'all.parquet'}: no row has the task {', '.join(absent)}")

    benchmark = file_benchmark(NAME, samples, root, RULE, OFFICIAL, AVERAGES, dict(dropped), frame="stored")
    # Copies of the data set have the images either in a folder for each category or without it. Both are read.
    names = sorted({image for sample in samples for image in sample.images})
    places = [_without_category(name) if file_size(root / name) is None else name for name in names]
    # part of the key of cached answers, so that an answer belongs to these images
    data = files_fingerprint(root, places)
    return replace(benchmark, load=partial(_read, root=root), data=data)


def _check_texts(row: dict[str, Any], position: int) -> None:
    for name in ("task", "question", "options"):
        if not isinstance(row[name], str):
            raise ValueError(f"MMIU row {position} ({row['task']}): {name}={row[name]!r:.80} is no text")
    for name in ("context", "output"):
        if not isinstance(row[name], str | None):
            raise ValueError(f"MMIU row {position} ({row['task']}): {name}={row[name]!r:.80} is neither text nor null")


def _without_category(name: str) -> str:
    return str(PurePosixPath(*PurePosixPath(name).parts[1:]))


def _read(sample: Sample, root: Path) -> LoadedSample:
    """The image paths, with the category's folder, or without it for an image that is not found there.

    Raises SampleError "missing_image", and "turned_image" for a photograph that EXIF turns.
    """
    try:
        loaded = load_images(sample, root)
    except SampleError:
        names = tuple(_without_category(name) for name in sample.images)
        loaded = replace(load_images(replace(sample, images=names), root), sample=sample)
    for name, data in zip(sample.images, loaded.images, strict=True):
        refuse_turned(sample.id, name, data)
    return loaded


def _sample(row: dict[str, Any], key: str, position: int) -> Sample:
    where = f"MMIU row {position} ({row['task']})"
    if not isinstance(row["input_image_path"], list) or not all(isinstance(n, str) for n in row["input_image_path"]):
        raise ValueError(f"{where}: input_image_path={row['input_image_path']!r:.80} is not a list of paths")
    options = _OPTION.findall(row["options"])
    letters = [letter for letter, _ in options]
    # The letter is the index of the choice, so a gap would shift every later option.
    if letters != option_letters(len(letters)) or not letters:
        raise ValueError(f"{where}: options={row['options']!r:.80} are not lettered A, B, …")
    letter = row["output"].strip().strip("().:").upper()
    if letter not in letters:
        raise ValueError(f"{where}: output={row['output']!r} is none of {letters}")
    images = [str(PurePosixPath(name)) for name in row["input_image_path"]]
    answer = {"letter": letter, "choices": [text for _, text in options]}
    return make_sample(NAME, position, key, images, _text(row), answer, column=_KEYS[key])


def _text(row: dict[str, Any]) -> str:
    """The question, the context, and the options if the context does not contain them."""
    parts = [row["question"].strip(), (row["context"] or "").strip()]
    if row["options"].strip() not in parts[1]:
        parts.append(row["options"].strip())
    return "\n".join(part for part in parts if part)
