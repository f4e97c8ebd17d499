"""Write the synthetic dataset to disk: shards for CoT-SFT and RL, and a MIG-Bench in the real benchmark's file format.

    root/shards/sft, root/shards/rl_pool                 WebDataset shards of Samples (datamodules/streaming/)
    root/MIG-Bench/MIG_data.json, root/MIG-Bench/images  in the format of the published MIG-Bench
    root/validation/MIG-Bench/...                        other questions of the same kind, for choosing settings

Puzzle i of a training part is a pure function of (seed, part, i). The benchmark and the validation questions do not
depend on the seed. Training never sees a scene of theirs: a training puzzle that has such a scene is replaced by the
next one.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.persistence.processes import end_with_parent, process_pool
from datamodules.persistence.progress_lines import Counted
from datamodules.samples.sample import BoxAnswer, BoxPart, ImagePart, LoadedSample, Part, Sample, TextPart
from datamodules.streaming.shard_writer import ShardWriter
from datamodules.synthetic.puzzles import Puzzle, box_text
from datamodules.synthetic.question_wordings import BOX, reworded
from datamodules.synthetic.single_image import GROUNDING, single_scene
from datamodules.synthetic.tasks import make_puzzle
from datamodules.synthetic.thinking_texts import thinking_text
from datamodules.synthetic.world import draw_scene, encode_png

# Shares of the tasks in training, similar to the paper's Table 1: common_object and refer_grounding are the largest. A
# few single-image questions keep the abilities of the base model.
MIXTURE = {"common_object": 0.33, "refer_grounding": 0.24, "diff": 0.19, "region": 0.14, "single": 0.1}
# The RL pool also has prompts that the policy always or never solves, like real data. Rejection sampling removes them.
POOL_DIFFICULTY = {"normal": 0.7, "easy": 0.12, "hard": 0.18}
# Text before and after the box in a single-image question. With MARKING, the picture also has a red frame there.
POINTING = (("Which object is at ", "? Name it and locate it."), ("Name the object at ", " and give its bounding box."))
MARKING = (("What is in the red bounding box ", "? Locate it."), ("Name and locate the object marked in red ", "."))
BENCHMARK, VALIDATION = "MIG-Bench", "validation"
PARTS = ("shards", BENCHMARK, VALIDATION)  # the folders that `build_nano` writes
IMAGE_FOLDERS = {"common_object": "common", "diff": "static_diff"}  # other folders have the name of their task


def training_puzzle(part: str, seed: int, index: int) -> tuple[Sample, tuple[bytes, ...], frozenset[str]]:
    """Sample `index` of a training part ("sft" or "rl_pool"), its PNG files, and the hashes of its scenes."""
    # 1. Task and difficulty. The seed holds the index, so that processes can make samples in any order.
    rng = random.Random(f"{part}:{seed}:{index}")
    task = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    difficulty = "normal"
    if part == "rl_pool":
        difficulty = rng.choices(tuple(POOL_DIFFICULTY), tuple(POOL_DIFFICULTY.values()))[0]
    # 2. Question, pictures, thinking text and answer.
    name = f"nano/{part}/{seed}/{index}"
    if task == "single":
        sample, images, hashes = _single(rng, name)
    else:
        puzzle = make_puzzle(rng, task, difficulty)
        images = tuple(encode_png(puzzle.picture(k)) for k in range(len(puzzle.scenes)))
        question, wording = reworded(rng, puzzle)
        parts = _question(replace(puzzle, question=question))
        answer = BoxAnswer(puzzle.target, puzzle.box, puzzle.label)
        sample = _sample(name, task, len(puzzle.scenes), parts, answer, puzzle.thinking(wording), difficulty)
        hashes = puzzle.content_hashes()
    return sample, images, hashes


def _sample(
    name: str, task: str, count: int, question: Iterable[Part], answer: BoxAnswer, thinking: str, difficulty: str
) -> Sample:
    """A sample of the synthetic dataset.

    Args:
        name: id of the sample; its images are called name/0.png, name/1.png, …
        task: its task.
        count: number of its images, which stand before the question.
        question: texts and boxes.
        answer: the true box.
        thinking: its thinking text.
        difficulty: a key of `tasks.SCALES`, kept in the sample's `extra`.
    """
    images, shown = tuple(f"{name}/{k}.png" for k in range(count)), map(ImagePart, range(count))
    return Sample(name, "nano", task, images, (*shown, *question), answer, thinking, {"difficulty": difficulty})


def _question(puzzle: Puzzle) -> tuple[TextPart | BoxPart, ...]:
    """The question of a puzzle as parts of a message, with the box of the only thing in image 1 at the mark BOX."""
    before, mark, after = puzzle.question.partition(BOX)
    if not mark:
        return (TextPart(puzzle.question),)
    (thing,) = puzzle.scenes[0].things
    return TextPart(before), BoxPart(0, thing.box, box_text(thing.box)), TextPart(after)


def _single(rng: random.Random, name: str) -> tuple[Sample, tuple[bytes, ...], frozenset[str]]:
    """Single-image grounding with a thinking text, so that the policy keeps this ability of the base model.

    Half of the questions name the thing. The other half give its box, in some with a red frame in the picture, and ask
    for its name too.
    """
    scene = replace(single_scene(rng), frame=None)
    thing = rng.choice(scene.things)
    kind = thing.kind.name
    if rng.random() < 0.5:  # by name
        question = (TextPart(rng.choice(GROUNDING).format(kind)),)
        thinking = f"The question asks for the {kind}. Find it in image 1."
    else:  # by box
        wording = rng.randrange(len(POINTING + MARKING))
        before, after = (POINTING + MARKING)[wording]
        question = (TextPart(before), BoxPart(0, thing.box, box_text(thing.box)), TextPart(after))
        thinking = thinking_text(("The marked object",), kind, 0, wording)
        if (before, after) in MARKING:
            scene = scene.with_frame(thing.box)
    sample = _sample(name, "single", 1, question, BoxAnswer(0, thing.box, kind), thinking, "normal")
    return sample, (encode_png(draw_scene(scene)),), frozenset({scene.content_hash()})


def benchmark_puzzle(task: str, index: int, split: str = BENCHMARK) -> Puzzle:
    """Question `index` of a task, in the benchmark or in the validation set (`split`)."""
    return make_puzzle(random.Random(f"{split}:{task}:{index}"), task)


def write_benchmark(root: Path, per_task: int, split: str = BENCHMARK) -> frozenset[str]:
    """Write MIG_data.json and its pictures; returns the hashes of all its scenes.

    Args:
        root: folder in which MIG-Bench/ is written.
        per_task: number of questions of each of the ten tasks.
        split: BENCHMARK or VALIDATION; each has its own questions.
    """
    records, hashes = [], set()
    with Counted(len(TASKS) * per_task, split, "question") as progress:
        for task in TASKS:
            folder = f"MIG-Bench/images/{IMAGE_FOLDERS.get(task, task)}"
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(per_task):
                puzzle = benchmark_puzzle(task, index, split)
                hashes |= puzzle.content_hashes()
                paths = [f"{folder}/{index:05d}_{k}.png" for k in range(len(puzzle.scenes))]
                for k, path in enumerate(paths):
                    (root / path).write_bytes(encode_png(puzzle.picture(k)))
                records.append(
                    {
                        "task": task,
                        "images": [f"./{path}" for path in paths],
                        "question": puzzle.question,
                        "answer": [round(v, 3) for v in puzzle.box],  # unit xyxy with three digits, as published
                        "additional_info": puzzle.info,
                        "need_format": task not in ("group_grounding", "object_tracking"),
                    }
                )
                progress.update()
    (root / "MIG-Bench/MIG_data.json").write_text(json.dumps(records, indent=0))
    return frozenset(hashes)


def training_samples(part: str, seed: int, count: int, excluded: frozenset[str]) -> Iterator[LoadedSample]:
    """`count` samples of a part in order of their index. Two processes make them.

    Args:
        part: "sft" or "rl_pool".
        seed: seed of the training data.
        count: number of samples.
        excluded: hashes of scenes that no sample may have.
    """
    taken = 0
    # A fork would inherit the locks of this process's threads, and could wait for one for ever.
    context = multiprocessing.get_context("forkserver")
    with process_pool(2, mp_context=context, initializer=end_with_parent) as pool:
        start = 0
        # A round makes the samples that are still missing. Excluded ones are made up for in the next round.
        while taken < count:
            indices = range(start, start + count - taken)
            start = indices.stop
            for sample, images, hashes in pool.map(partial(training_puzzle, part, seed), indices, chunksize=64):
                if not hashes & excluded:
                    taken += 1
                    yield LoadedSample(sample, images)


def build_nano(
    root: str, seed: int, train_samples: int, eval_per_task: int, validation_per_task: int, pool_samples: int
) -> None:
    """Write the synthetic dataset: all folders of PARTS in `root`.

    Folders of these names are REMOVED first, because an interrupted run may have left them. The caller,
    experiments/generate_synthetic.py, makes sure that they hold nothing else.

    Args:
        root: folder of the dataset.
        seed: seed of the training data. The benchmark and the validation questions do not depend on it.
        train_samples: samples for CoT-SFT.
        eval_per_task: questions of the benchmark for each of the ten tasks.
        validation_per_task: validation questions for each task.
        pool_samples: prompts in the RL pool.
    """
    folder = Path(root)
    for name in PARTS:
        shutil.rmtree(folder / name, ignore_errors=True)
    # 1. The questions for evaluation. Their scenes are excluded from training.
    excluded = write_benchmark(folder, eval_per_task)
    excluded |= write_benchmark(folder / VALIDATION, validation_per_task, VALIDATION)
    # 2. The training data as shards.
    for part, count in (("sft", train_samples), ("rl_pool", pool_samples)):
        with ShardWriter(folder / "shards" / part) as writer, Counted(count, part, "sample") as progress:
            for loaded in training_samples(part, seed, count, excluded):
                writer.add(loaded)
                progress.update()
