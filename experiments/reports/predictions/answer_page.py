"""The page of answers: the choice of its questions, and the data of each. It is one file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Benchmark
from datamodules.images.image_loading import ImageError
from datamodules.metrics.drawing import read_boxes
from datamodules.metrics.predictions import Prediction
from datamodules.metrics.result_files import official_gap
from datamodules.samples.answer_text import ParsedAnswer, answer_text, parse_answer
from datamodules.samples.sample import ChoiceAnswer, SampleError
from datamodules.samples.scores import true_boxes
from experiments.reports.drawing.pictures import small_copy
from experiments.reports.drawing.templates import render, script_json
from experiments.reports.report_sections import score_rows
from experiments.reports.rollout_pages import thin
from experiments.reports.samples_page import numbered_question

LONGEST_SIDE = 448  # pixels of a picture
MEGABYTE = 2**20


@dataclass(frozen=True)
class Answers:
    """The evaluation of one model on one benchmark: its name on the page, result.json, and all its predictions."""

    label: str
    folder: Path
    result: Mapping[str, Any]
    predictions: Sequence[Prediction]


@dataclass
class _Pictures:
    """Data URIs of images, each once, up to a number of bytes; `num_left_out` and `num_broken` count images."""

    limit: int
    uris: list[str] = field(default_factory=list)
    num_left_out: int = 0
    num_broken: int = 0
    _places: dict[bytes, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    _size: int = 0

    def add(self, data: bytes) -> tuple[int | None, tuple[int, int] | None]:
        """The index of the image's URI and its size; None for an image that is left out or cannot be read."""
        if data in self._places:
            return self._places[data]
        try:
            copy = small_copy(data, LONGEST_SIDE)
        except ImageError:
            self.num_broken += 1
            return None, None
        if self._size + len(copy.uri) > self.limit:
            self.num_left_out += 1
            return None, copy.size
        self._size += len(copy.uri)
        self.uris.append(copy.uri)
        self._places[data] = len(self.uris) - 1, copy.size
        return self._places[data]


def render_answers(
    models: Sequence[Answers], benchmark: Benchmark | None, missing: str, max_questions: int, max_megabytes: float
) -> str:
    """The whole page.

    Args:
        models: one or two evaluations on the same benchmark.
        benchmark: its questions and images; None if they are not on this machine.
        missing: why there is no benchmark.
        max_questions: largest number of questions, spread evenly over those that all models were asked.
        max_megabytes: largest size of all pictures.
    """
    by_id = [{prediction.id: prediction for prediction in model.predictions} for model in models]
    common = [prediction.id for prediction in models[0].predictions if all(prediction.id in known for known in by_id)]
    shown = thin(common, max_questions)
    samples = {sample.id: sample for sample in benchmark.samples} if benchmark else {}
    pictures = _Pictures(int(max_megabytes * MEGABYTE))
    columns = list(dict.fromkeys(by_id[0][name].column for name in common))

    def question(name: str) -> dict[str, Any]:
        answers = [known[name] for known in by_id]
        found = samples.get(name)
        if found is not None and found.answer != answers[0].answer:
            found = None  # the file has another question there now
        images = _load(lambda: benchmark.load(found).images) if benchmark and found else ()
        kept = [pictures.add(image) for image in images]
        sizes = [size.original for size in answers[0].image_sizes] or [size or (1, 1) for _, size in kept]
        return {
            "id": name,
            "column": columns.index(answers[0].column),
            "question": numbered_question(found) if found else None,
            "sizes": sizes,
            "pictures": [place for place, _ in kept],
            "truths": [[box.image, *box.box] for box in true_boxes(answers[0].answer)],
            "labels": [box.label for box in true_boxes(answers[0].answer)],
            "truth": _option(answers[0].answer),
            "answers": [_answer(prediction) for prediction in answers],
        }

    questions = [question(name) for name in shown]
    data = {"models": [model.label for model in models], "columns": columns, "questions": questions}
    return render(
        "predictions.html.j2",
        title=f"{models[0].result['benchmark']}: {' and '.join(model.label for model in models)}",
        notes=_notes(models, len(common), len(shown), pictures, missing),
        scores=[(model.label, score_rows(model.result)) for model in models],
        models=data["models"],
        has_boxes=any(question["truths"] for question in questions),
        data=script_json(data | {"pictures": pictures.uris}),
    )


def _load(read: Callable[[], Sequence[bytes]]) -> Sequence[bytes]:
    """The images of a question; () if a file is missing or damaged."""
    try:
        return read()
    except (SampleError, ImageError, OSError):
        return ()


def _answer(prediction: Prediction) -> dict[str, Any]:
    """One answer for the page. Boxes are [index of the image, x1, y1, x2, y2], in 0-1 of this image."""
    parsed, is_choice = parse_answer(prediction.text), isinstance(prediction.answer, ChoiceAnswer)
    return {
        "text": prediction.text,
        "thinking": parsed.thinking if isinstance(parsed, ParsedAnswer) else None,
        "answer": answer_text(prediction.text),
        "boxes": [[image, *box] for image, box in read_boxes(prediction)],
        "iou": None if is_choice else prediction.value,
        "option": prediction.read if is_choice else None,
        "f1": prediction.f1,
        "correct": prediction.correct,
        "failure": prediction.failure,
        "tokens": prediction.num_tokens,
        "finished": prediction.finished,
    }


def _option(answer: Any) -> str | None:
    """The right option of a multiple-choice question in words; None for a question with boxes."""
    if not isinstance(answer, ChoiceAnswer):
        return None
    return f"{answer.letter} of {', '.join(answer.choices)}"


def _notes(models: Sequence[Answers], num_common: int, num_shown: int, pictures: _Pictures, missing: str) -> list[str]:
    """Sentences about the content of the page, and about questions and images that are left out."""
    notes = [f"{model.label}: {model.folder}, model {model.result['model']}." for model in models]
    if num_shown < num_common:
        notes.append(f"{num_shown:,} of {num_common:,} questions are here, evenly over the file (--max_questions).")
    for model in models:
        if alone := len(model.predictions) - num_common:
            notes.append(f"{alone:,} questions of {model.label} are left out: the other model was not asked them.")
    notes += [f"No pictures and questions: {missing}."] if missing else []
    if pictures.num_left_out:
        notes.append(f"{pictures.num_left_out:,} pictures are left out, to bound the file (--max_megabytes).")
    notes += [f"{pictures.num_broken:,} images cannot be read."] if pictures.num_broken else []
    gaps = dict.fromkeys(gap for model in models if (gap := official_gap(model.result)))
    return notes + [f"{gap}." for gap in gaps]
