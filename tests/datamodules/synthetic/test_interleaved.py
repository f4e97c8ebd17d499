"""The third pretraining stage teaches to look at a named picture, and nothing that the ten tasks ask."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.encoding import messages
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.synthetic import single_image
from datamodules.synthetic.interleaved import MOST_PICTURES, interleaved_scenes, interleaved_turns
from datamodules.synthetic.question_wordings import REWORDINGS, reworded
from datamodules.synthetic.single_image import Turn
from datamodules.synthetic.tasks import make_puzzle
from datamodules.synthetic.thinking_texts import ORDINALS
from datamodules.synthetic.world import KINDS, Scene

# Words by which a question compares pictures or speaks of several: none may be in pretraining.
COMPARING = (
    *("common", "share", "same kind", "same object", "same colour", "same shape", "differ", "compare", "change"),
    *("every image", "every picture", "all images", "all pictures", "both", "these", "two images", "two pictures"),
    *("region", "sequence", "corresponding", "similar", "each image", "each picture", "views"),
)


def draws(count: int) -> Iterable[tuple[tuple[Scene, ...], list[tuple[Turn, ...]]]]:
    for index in range(count):
        rng = random.Random(f"test:{index}")
        scenes = interleaved_scenes(rng)
        sizes = [ImageSizes(scene.size, scene.size) for scene in scenes]
        yield scenes, interleaved_turns(rng, scenes, sizes, BoxFormat.ABSOLUTE_PIXELS, 5)


def pretraining_turns(count: int) -> list[Turn]:
    turns = [turn for _, conversations in draws(count) for conversation in conversations for turn in conversation]
    for index in range(count):
        rng = random.Random(f"test-single:{index}")
        scene = single_image.single_scene(rng)
        sizes = ImageSizes(scene.size, scene.size)
        turns += single_image.single_turns(rng, scene, sizes, BoxFormat.ABSOLUTE_PIXELS, 5)
    return turns


def skeleton(text: str) -> str:
    """A text without names of things, numbers and boxes: two wordings are equal if their skeletons are."""
    names = sorted((kind.name for kind in KINDS), key=len, reverse=True)
    text = re.sub("|".join(names), "X", text)
    return re.sub(r"\s+", " ", re.sub(r"\d+|first|second|third|fourth|fifth|sixth", "N", text)).strip().lower()


def sentences(text: str) -> set[str]:
    """The skeletons of the sentences of a text."""
    return {part.strip(" .?:") for part in re.split(r"(?<=[.?:]) ", skeleton(text))}


def leaks(turns: Iterable[Turn]) -> list[str]:
    """Everything in these turns that belongs to the ten tasks, or compares pictures."""
    rng = random.Random("tasks")
    questions, rationales = set(), set()
    for task in TASKS:
        for _ in range(300):
            puzzle = make_puzzle(rng, task)
            questions.add(skeleton(puzzle.question))
            if task in REWORDINGS:
                questions.add(skeleton(reworded(rng, puzzle)[0]))
            for wording in range(6):
                rationales |= sentences(puzzle.thinking(wording))  # "Find it in image 2." alone is one too
    found = []
    for turn in turns:
        question = skeleton(turn.question)
        if question in questions:
            found.append(f"question of a task: {turn.question}")
        if any(word in question for word in COMPARING):
            found.append(f"compares pictures: {turn.question}")
        if (sentences(turn.question) | sentences(turn.answer)) & rationales:
            found.append(f"rationale of a task: {turn.question} {turn.answer}")
        if re.search(r"think|<answer>", turn.question + turn.answer):
            found.append(f"answer form of the tasks: {turn.answer}")
        if any(suffix.strip() in turn.question for suffix in (messages.THINK_SUFFIX, messages.ANSWER_SUFFIX)):
            found.append(f"instruction of the tasks: {turn.question}")
    return found


def test_nothing_of_the_ten_tasks_is_in_pretraining() -> None:
    turns = pretraining_turns(1500)
    assert len(turns) > 15_000 and not leaks(turns)


@pytest.mark.parametrize("task", TASKS)
def test_a_question_of_a_task_in_pretraining_would_be_found(task: str) -> None:
    puzzle = make_puzzle(random.Random(7), task)
    assert leaks([Turn("x", puzzle.question, "red circle")])
    assert leaks([Turn("x", "Describe picture 1.", puzzle.thinking())])


def test_comparisons_and_the_answer_form_would_be_found() -> None:
    assert leaks([Turn("x", "Which object do all pictures show?", "red circle")])
    assert leaks([Turn("x", "Describe picture 1.", "<think>red</think><answer>red circle</answer>")])
    assert leaks([Turn("x", f"Describe picture 1. {messages.THINK_SUFFIX}", "red circle")])


def test_every_question_is_about_one_picture_that_it_names_and_its_answer_is_true() -> None:
    counts, shared = set(), 0
    for scenes, conversations in draws(400):
        counts.add(len(scenes))
        for turns in conversations:
            assert {turn.image for turn in turns} == {turns[0].image}, "later turns go on about the same picture"
            k = turns[0].image
            named = {int(n) for n in re.findall(r"(?:picture|image)[ -](\d)", turns[0].question.lower())}
            words = re.findall(r"\w+", turns[0].question)
            ordinals = {ORDINALS.index(word) + 1 for word in words if word in ORDINALS}
            assert named | ordinals == {k + 1}, turns[0].question
            for turn in turns:
                if turn.box is not None:
                    (thing,) = [thing for thing in scenes[k].things if thing.box == turn.box]
                    assert thing.kind.name in turn.question
                    assert sum(other.kind == thing.kind for other in scenes[k].things) == 1
                    shared += any(thing.kind in scene.kinds for number, scene in enumerate(scenes) if number != k)
    assert counts == set(range(2, MOST_PICTURES + 1))
    assert shared > 1000, "the number of the picture has to be read"
