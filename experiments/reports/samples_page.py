"""A page of samples as a model sees them: every image with its boxes, question, thinking and answer.

The page is one file that needs no network; it contains small copies of the images. Boxes are drawn from the values in
the shards, so that wrong boxes are visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from datamodules.encoding.encoder import EncodedSample
from datamodules.images.image_loading import ImageError
from datamodules.samples.sample import (
    Answer,
    BoxPart,
    ChoiceAnswer,
    LoadedSample,
    Sample,
    SampleError,
    TextPart,
)
from datamodules.samples.scores import true_boxes
from experiments.reports.drawing.pictures import small_copy
from experiments.reports.drawing.templates import render

LONGEST_SIDE = 560  # longest side of a copy in pixels
# Name -> range of the share of the image that a box covers.
AREAS = {"below 1 %": 0.01, "1 to 5 %": 0.05, "5 to 20 %": 0.2, "20 to 50 %": 0.5, "above 50 %": 1.01}


@dataclass(frozen=True)
class Shown:
    """One sample of the page: the sample and its encoding, or the errors of reading and encoding.

    `place` is its position in the shards. `encoded` is None without a model.
    """

    place: str
    loaded: LoadedSample | SampleError
    encoded: EncodedSample | SampleError | None = None


def render_samples(
    title: str, groups: Mapping[str, Sequence[Shown]], tables: Mapping[str, Sequence[Sequence[str]]], note: str = ""
) -> str:
    """The whole page.

    Args:
        title: title of the page.
        groups: heading, such as "First 10" -> samples to show.
        tables: heading -> rows of text cells, header first.
        note: a sentence below the title.
    """
    cards = {heading: [_card(shown) for shown in group] for heading, group in groups.items()}
    return render("samples.html.j2", title=title, text=note, tables=tables, groups=cards)


def count_tables(samples: Sequence[Shown]) -> dict[str, list[list[str]]]:
    """Statistics of the samples: tasks, images, boxes, prompt lengths, and broken rules."""
    # 1. Tasks, images and boxes. Areas are shares of the image, because boxes are in 0-1.
    read = [shown.loaded.sample for shown in samples if isinstance(shown.loaded, LoadedSample)]
    boxes = [box for sample in read for box in true_boxes(sample.answer)]
    areas = [(box.box[2] - box.box[0]) * (box.box[3] - box.box[1]) for box in boxes]
    kinds = Counter(next(name for name, most in AREAS.items() if area < most) for area in areas)
    tables = {
        "Tasks": _counted("task", Counter(sample.task for sample in read)),
        "Images of a sample": _counted("images", Counter(str(len(sample.images)) for sample in read)),
        "Boxes of an answer": _counted("boxes", Counter(str(len(true_boxes(sample.answer))) for sample in read)),
        "Share of the image that a box fills": _counted("share", {name: kinds[name] for name in AREAS if kinds[name]}),
    }
    # 2. Prompt lengths in tokens, including images; only with a model.
    encoded = [shown.encoded for shown in samples if isinstance(shown.encoded, EncodedSample)]
    if lengths := sorted(len(item.input_ids) for item in encoded):
        row = [lengths[0], median(lengths), lengths[int(0.95 * (len(lengths) - 1))], lengths[-1]]
        head = ["prompt tokens", "least", "median", "95 %", "most"]
        tables["Prompt lengths"] = [head, [f"{len(lengths):,} samples", *(f"{value:,.0f}" for value in row)]]
    # 3. Samples that break a rule of the reader or of the encoder.
    errors = [error for shown in samples for error in (shown.loaded, shown.encoded) if isinstance(error, SampleError)]
    rows = [["rule", "samples", "the first one"]]
    for rule, count in Counter(error.rule for error in errors).most_common():
        first = next(error for error in errors if error.rule == rule)
        rows.append([rule, f"{count:,}", f"{first.sample_id}: {first.detail[:200]}"])
    tables["Rejections"] = rows if errors else [[*rows[0]], ["none", "0", ""]]
    return tables


def rejection_tables(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Accepted and rejected samples of an import in each part, by rule, from its import.json."""
    rows = [["part", "samples", "rejected", "rule", "the first ones"]]
    for name, part in report.get("parts", {}).items():
        rows.append([name, f"{part['samples']:,}", f"{sum(part['rejected'].values()):,}", "", ""])
        for rule, count in part["rejected"].items():
            rows.append(["", "", f"{count:,}", rule, "; ".join(part["examples"].get(rule, []))[:400]])
    return {"Import": rows} if len(rows) > 1 else {}


def _counted(name: str, counts: Mapping[str, int]) -> list[list[str]]:
    most = sorted(counts.items(), key=lambda item: -item[1]) if isinstance(counts, Counter) else counts.items()
    return [[name, "count"], *([value, f"{count:,}"] for value, count in most)]


def _card(shown: Shown) -> dict[str, Any]:
    """The data of one sample for the template."""
    if isinstance(shown.loaded, SampleError):
        return {"place": shown.place, "fault": str(shown.loaded), "sample": None}
    sample = shown.loaded.sample
    encoded = shown.encoded if isinstance(shown.encoded, EncodedSample) else None
    facts = [f"task {sample.task}", f"source {sample.source}"]
    facts += [f"{len(encoded.input_ids):,} prompt tokens"] if encoded else []
    facts += [f"{name} {value}" for name, value in sample.extra.items() if isinstance(value, str | int)][:8]
    return {
        "place": shown.place,
        "fault": str(shown.encoded) if isinstance(shown.encoded, SampleError) else "",
        "sample": sample,
        "facts": " · ".join(facts),
        "question": numbered_question(sample),
        "answer": _answer_text(sample.answer),
        "figures": [_figure(shown.loaded, index, encoded) for index in range(len(sample.images))],
    }


def _figure(loaded: LoadedSample, index: int, encoded: EncodedSample | None) -> dict[str, Any]:
    """The data of one image: a small copy as a data URI, its boxes in 0-1, and its sizes."""
    sample = loaded.sample
    # Boxes are numbered over the whole question, with the same numbers as in the text of `numbered_question`.
    asked = [part for part in sample.messages if isinstance(part, BoxPart)]
    boxes = [("asked", f"box {k + 1}", part.box) for k, part in enumerate(asked) if part.image == index]
    boxes += [("true", box.label, box.box) for box in true_boxes(sample.answer) if box.image == index]
    caption = f"image {index + 1} of {len(sample.images)}: {sample.images[index]}"
    try:
        copy = small_copy(loaded.images[index], LONGEST_SIDE)
    except ImageError as error:
        return {"uri": "", "boxes": [], "caption": f"{caption}: {error}", "width": 1, "height": 1}
    caption += f", {copy.size[0]}x{copy.size[1]}"
    if encoded:
        width, height = encoded.image_sizes[index].resized
        caption += f", resized to {width}x{height}"
    drawn = [
        {"kind": kind, "label": label, "x": box[0], "y": box[1], "width": box[2] - box[0], "height": box[3] - box[1]}
        for kind, label, box in boxes
    ]
    return {"uri": copy.uri, "boxes": drawn, "caption": caption, "width": copy.size[0], "height": copy.size[1]}


def numbered_question(sample: Sample) -> str:
    """The text of the question; images and boxes are replaced by the names of their figures."""
    texts, boxes, images = [], 0, 0
    for part in sample.messages:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, BoxPart):
            boxes += 1
            texts.append(f"[box {boxes}]")
        else:
            images += 1
            texts.append(f"[image {images}] ")
    return "".join(texts)


def _answer_text(answer: Answer) -> str:
    if isinstance(answer, ChoiceAnswer):
        return f"{answer.letter} of {', '.join(answer.choices)}"
    return "; ".join(
        f"image {box.image + 1}: {box.label or 'no label'} [{', '.join(f'{value:.4g}' for value in box.box)}]"
        for box in true_boxes(answer)
    )
