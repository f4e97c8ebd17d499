"""A page of samples as a model would be shown them: every image with its boxes, question, thinking and answer.

The page is one file and opens offline: images are small copies inside it. Boxes are drawn in 0-1 over each image, as
the shards hold them, so a box in a wrong place is seen to be there.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from datamodules.encoding.encoder import EncodedSample
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, ImageError, load_image
from datamodules.samples.sample import (
    Answer,
    BoxAnswer,
    BoxesAnswer,
    BoxPart,
    ChoiceAnswer,
    LoadedSample,
    Sample,
    SampleError,
    TextPart,
)
from experiments.reports.templates import render

LONGEST_SIDE = 560  # pixels of a copy
# Shares of its image that a box fills, by name.
AREAS = {"below 1 %": 0.01, "1 to 5 %": 0.05, "5 to 20 %": 0.2, "20 to 50 %": 0.5, "above 50 %": 1.01}


@dataclass(frozen=True)
class Shown:
    """One sample of the page: as it was read, and as the encoder makes it, or the errors that came instead.

    `place` says where it comes from. `encoded` is None where no model is given.
    """

    place: str
    loaded: LoadedSample | SampleError
    encoded: EncodedSample | SampleError | None = None


def render_samples(
    title: str, groups: Mapping[str, Sequence[Shown]], tables: Mapping[str, Sequence[Sequence[str]]], note: str = ""
) -> str:
    """The whole page.

    Args:
        title: of the page.
        groups: the samples to show, by a heading such as "First 10".
        tables: rows of text cells, header first, by a heading.
        note: a sentence below the title.
    """
    cards = {heading: [_card(shown) for shown in group] for heading, group in groups.items()}
    return render("samples.html.j2", title=title, text=note, tables=tables, groups=cards)


def count_tables(samples: Sequence[Shown]) -> dict[str, list[list[str]]]:
    """What the samples hold: tasks, images, boxes, prompt lengths, and the rules that some of them break."""
    # 1. What was read: tasks, images, boxes. Areas are shares of the image, as boxes are in 0-1.
    read = [shown.loaded.sample for shown in samples if isinstance(shown.loaded, LoadedSample)]
    boxes = [box for sample in read for box in _boxes(sample.answer)]
    areas = [(box.box[2] - box.box[0]) * (box.box[3] - box.box[1]) for box in boxes]
    kinds = Counter(next(name for name, most in AREAS.items() if area < most) for area in areas)
    tables = {
        "Tasks": _counted("task", Counter(sample.task for sample in read)),
        "Images of a sample": _counted("images", Counter(str(len(sample.images)) for sample in read)),
        "Boxes of an answer": _counted("boxes", Counter(str(len(_boxes(sample.answer))) for sample in read)),
        "Share of the image that a box fills": _counted("share", {name: kinds[name] for name in AREAS if kinds[name]}),
    }
    # 2. Prompt lengths in tokens, images included; only where a model was given.
    encoded = [shown.encoded for shown in samples if isinstance(shown.encoded, EncodedSample)]
    if lengths := sorted(len(item.input_ids) for item in encoded):
        row = [lengths[0], median(lengths), lengths[int(0.95 * (len(lengths) - 1))], lengths[-1]]
        head = ["prompt tokens", "least", "median", "95 %", "most"]
        tables["Prompt lengths"] = [head, [f"{len(lengths):,} samples", *(f"{value:,.0f}" for value in row)]]
    # 3. Samples that break a rule, by the reader's rules and the encoder's.
    errors = [error for shown in samples for error in (shown.loaded, shown.encoded) if isinstance(error, SampleError)]
    rows = [["rule", "samples", "the first one"]]
    for rule, count in Counter(error.rule for error in errors).most_common():
        first = next(error for error in errors if error.rule == rule)
        rows.append([rule, f"{count:,}", f"{first.sample_id}: {first.detail[:200]}"])
    tables["Rejections"] = rows if errors else [[*rows[0]], ["none", "0", ""]]
    return tables


def rejection_tables(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """What an import (its import.json) took and rejected in each part, and why."""
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
    """One sample for the template."""
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
        "question": _question(sample),
        "answer": _answer_text(sample.answer),
        "figures": [_figure(shown.loaded, index, encoded) for index in range(len(sample.images))],
    }


def _figure(loaded: LoadedSample, index: int, encoded: EncodedSample | None) -> dict[str, Any]:
    """One image: a small copy as a data URI, its boxes in 0-1, and its sizes."""
    sample = loaded.sample
    # Boxes are numbered over the whole question, as `_question` numbers them in its text.
    asked = [part for part in sample.messages if isinstance(part, BoxPart)]
    boxes = [("asked", f"box {k + 1}", part.box) for k, part in enumerate(asked) if part.image == index]
    boxes += [("true", box.label, box.box) for box in _boxes(sample.answer) if box.image == index]
    caption = f"image {index + 1} of {len(sample.images)}: {sample.images[index]}"
    try:
        image = load_image(loaded.images[index], MAX_IMAGE_PIXELS)
    except ImageError as error:
        return {"uri": "", "boxes": [], "caption": f"{caption}: {error}", "width": 1, "height": 1}
    caption += f", {image.width}x{image.height}"
    if encoded:
        width, height = encoded.image_sizes[index].resized
        caption += f", resized to {width}x{height}"
    # The original size is kept for the page's coordinates: `thumbnail` changes the image in place.
    size = image.size
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    drawn = [
        {"kind": kind, "label": label, "x": box[0], "y": box[1], "width": box[2] - box[0], "height": box[3] - box[1]}
        for kind, label, box in boxes
    ]
    return {"uri": uri, "boxes": drawn, "caption": caption, "width": size[0], "height": size[1]}


def _boxes(answer: Answer) -> tuple[BoxAnswer, ...]:
    if isinstance(answer, BoxesAnswer):
        return answer.boxes
    return (answer,) if isinstance(answer, BoxAnswer) else ()


def _question(sample: Sample) -> str:
    """The question's text, its images and boxes as the names that the figures have."""
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
        for box in _boxes(answer)
    )
