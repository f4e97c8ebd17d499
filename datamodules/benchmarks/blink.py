"""BLINK (Fu et al.): the seven subsets of the paper, validation split (the test answers are hidden).

    BLINK/<Subset>/val-00000-of-00001.parquet   idx, question, image_1 … image_4, choices, answer "(A)", prompt, …

The question is the column `prompt`, which lists the options; it comes after the images. The official accuracy is exact
match with the letter that the official parser finds. The last step of that parser asks GPT-3.5. This step is skipped
unless an extractor is named (`extraction.py`).

Style `official` adds BLINK's disclaimer before the prompts of the two subsets that have one. Two differences to
eval/test_benchmark.py remain. That script sends the text before the images; here the images come first in every style.
In that script a stray comma makes the disclaimer a tuple, so it fails for these subsets; here the text in the tuple is
used. Images are shown as EXIF turns them; the `datasets` library also gives them to that script in this form.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import WITHOUT_MODEL, Benchmark, Rule, files_fingerprint, make_sample
from datamodules.benchmarks.reading.parquet import null_columns, read_rows, row_bytes
from datamodules.encoding.messages import OFFICIAL_PREFIX
from datamodules.samples.sample import LoadedSample, Sample

NAME, FOLDER = "blink", "BLINK"
SUBSETS = (  # in the order of the paper's Table 6
    "Counting",
    "Forensic_Detection",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Visual_Similarity",
    "Visual_Correspondence",
)
AVERAGES = {"avg": SUBSETS}
RULE = Rule(source="paper Table 6: accuracy, mean over subsets")
OFFICIAL = Rule(source=f"BLINK eval/test_benchmark.py {WITHOUT_MODEL}, mean over subsets", reader="blink")
IMAGES = ("image_1", "image_2", "image_3", "image_4")
DISCLAIMED = ("Forensic_Detection", "Jigsaw")
DISCLAIMER = (  # verbatim from eval/test_benchmark.py
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your"
    " assessment on this question. You don't need to identify the real people. You just need to analyze based on the"
    " information I gave you.\n\n"
)


def load(root: Path) -> Benchmark:
    """Raises ValueError that names a missing column or a wrong answer, FileNotFoundError for a missing subset."""
    samples = [sample for subset in SUBSETS for sample in _subset(root, subset)]

    data = files_fingerprint(root, [str(_file(root, subset).relative_to(root)) for subset in SUBSETS])
    return Benchmark(NAME, tuple(samples), partial(_read, root=root), RULE, OFFICIAL, AVERAGES, data)


def _read(sample: Sample, root: Path) -> LoadedSample:
    columns = [name.rsplit("#", 1)[1] for name in sample.images]
    return LoadedSample(sample, tuple(row_bytes(_file(root, sample.task), sample.extra["row"], columns)))


def _file(root: Path, subset: str) -> Path:
    return root / subset / "val-00000-of-00001.parquet"


def _subset(root: Path, subset: str) -> list[Sample]:
    path = _file(root, subset)
    rows = read_rows(path, ("idx", "prompt", "choices", "answer"))
    nulls = null_columns(path, IMAGES)
    return [_sample(row, position, subset, null) for position, (row, null) in enumerate(zip(rows, nulls, strict=True))]


def _sample(row: dict[str, Any], position: int, subset: str, null: set[str]) -> Sample:
    letter = re.fullmatch(r"\(([A-Z])\)", row["answer"] or "")
    if letter is None:
        raise ValueError(f"BLINK {subset}, {row['idx']}: answer={row['answer']!r} is not of the form (A)")
    # A row has four image columns. The unused columns of a question with fewer images are null.
    images = [name for name in IMAGES if name not in null]
    names, answer = [f"{row['idx']}#{name}" for name in images], {"letter": letter[1], "choices": row["choices"]}
    prefix = {OFFICIAL_PREFIX: DISCLAIMER} if subset in DISCLAIMED else {}
    return make_sample(NAME, row["idx"], subset, names, row["prompt"], answer, row=position, **prefix)
