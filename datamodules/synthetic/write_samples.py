"""Write the nano world to disk: shards for CoT-SFT and RL, and a MIG-Bench in the real benchmark's own files.

    root/shards/sft, root/shards/rl_pool                 WebDataset shards of Samples (datamodules/streaming/shards.py)
    root/MIG-Bench/MIG_data.json, root/MIG-Bench/images  as thunlp/Michael4933 publish MIG-Bench
    root/validation/MIG-Bench/...                        other questions of the same kind: settings are chosen on these

Puzzle i of a part is a pure function of (seed, part, i). Neither set of questions depends on the seed, and no scene of
them is ever trained on: a training puzzle that shares one is dropped and replaced.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.persistence.processes import process_pool
from datamodules.samples.sample import BoxAnswer, BoxPart, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shards import ShardWriter
from datamodules.synthetic.puzzles import Puzzle, box_text
from datamodules.synthetic.question_wordings import BOX, reworded
from datamodules.synthetic.single_image import GROUNDING, single_scene
from datamodules.synthetic.tasks import make_puzzle
from datamodules.synthetic.thinking_texts import short_thinking, thorough_thinking
from datamodules.synthetic.world import draw_scene, encode_png

# Shares of the training parts, in the spirit of the paper's Table 1: common object and referring lead, a few
# single-image questions keep what the base model can.
MIXTURE = {"common_object": 0.33, "refer_grounding": 0.24, "diff": 0.19, "region": 0.14, "single": 0.1}
# The RL pool also needs prompts that are always and never solved, as real data has; else there is nothing to reject.
POOL_DIFFICULTY = {"normal": 0.7, "easy": 0.12, "hard": 0.18}
# Share of the training samples with short thinking, whatever the question; the others have thorough thinking. The
# rationales of a teacher are not equally good either, and GRPO has to find out which kind leads to the right box.
SHORT_THINKING_SHARE = 0.6
# Around the box of a thing that a single-image question points at; those of the second line mark it in the picture too.
POINTING = (("Which object is at ", "? Name it and locate it."), ("Name the object at ", " and give its bounding box."))
MARKING = (("What is in the red bounding box ", "? Locate it."), ("Name and locate the object marked in red ", "."))
BENCHMARK, VALIDATION = "MIG-Bench", "validation"
PARTS = ("shards", BENCHMARK, VALIDATION)  # the folders that a build makes
IMAGE_FOLDERS = {"common_object": "common", "diff": "static_diff"}  # the others are named like their task


def training_puzzle(part: str, seed: int, index: int) -> tuple[Sample, tuple[bytes, ...], frozenset[str]]:
    """Sample `index` of a training part ("sft" or "rl_pool"), its PNG files, and the hashes of its scenes."""
    rng = random.Random(f"{part}:{seed}:{index}")
    task = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    difficulty = "normal"
    if part == "rl_pool":
        difficulty = rng.choices(tuple(POOL_DIFFICULTY), tuple(POOL_DIFFICULTY.values()))[0]
    name = f"nano/{part}/{seed}/{index}"
    if task == "single":
        sample, images, hashes = _single(rng, name)
    else:
        puzzle = make_puzzle(rng, task, difficulty)
        images = tuple(encode_png(puzzle.picture(k)) for k in range(len(puzzle.scenes)))
        question, wording = reworded(rng, puzzle)
        sample = to_sample(replace(puzzle, question=question), name, difficulty, wording)
        hashes = puzzle.content_hashes()
    if rng.random() < SHORT_THINKING_SHARE:
        sample = replace(sample, thinking=short_thinking(sample.answer.image))
    return sample, images, hashes


def to_sample(puzzle: Puzzle, name: str, difficulty: str, wording: int = 0) -> Sample:
    count = len(puzzle.scenes)
    return Sample(
        id=name,
        source="nano",
        task=puzzle.task,
        images=tuple(f"{name}/{k}.png" for k in range(count)),
        messages=(*(ImagePart(k) for k in range(count)), *_question(puzzle)),
        answer=BoxAnswer(puzzle.target, puzzle.box, puzzle.label),
        thinking=puzzle.thinking(wording),
        extra={"difficulty": difficulty},
    )


def _question(puzzle: Puzzle) -> tuple[TextPart | BoxPart, ...]:
    before, mark, after = puzzle.question.partition(BOX)
    if not mark:
        return (TextPart(puzzle.question),)
    (thing,) = puzzle.scenes[0].things
    return TextPart(before), BoxPart(0, thing.box, box_text(thing.box)), TextPart(after)


def _single(rng: random.Random, name: str) -> tuple[Sample, tuple[bytes, ...], frozenset[str]]:
    """Single-image grounding with a thinking text, so that post-training does not unlearn it.

    Half of the questions name the thing; half give its box, some of these with a red frame around it, and ask for its
    name.
    """
    scene = replace(single_scene(rng), frame=None)
    thing = rng.choice(scene.things)
    kind = thing.kind.name
    if rng.random() < 0.5:
        question = (TextPart(rng.choice(GROUNDING).format(kind)),)
        thinking = f"The question asks for the {kind}. Find it in image 1."
    else:
        wording = rng.randrange(len(POINTING + MARKING))
        before, after = (POINTING + MARKING)[wording]
        question = (TextPart(before), BoxPart(0, thing.box, box_text(thing.box)), TextPart(after))
        thinking = thorough_thinking(("The marked object",), kind, 0, wording)
        if (before, after) in MARKING:
            scene = scene.with_frame(thing.box)
    sample = Sample(
        id=name,
        source="nano",
        task="single",
        images=(f"{name}/0.png",),
        messages=(ImagePart(0), *question),
        answer=BoxAnswer(0, thing.box, kind),
        thinking=thinking,
        extra={"difficulty": "normal"},
    )
    return sample, (encode_png(draw_scene(scene)),), frozenset({scene.content_hash()})


def benchmark_puzzle(task: str, index: int, split: str = BENCHMARK) -> Puzzle:
    return make_puzzle(random.Random(f"{split}:{task}:{index}"), task)


def write_benchmark(root: Path, per_task: int, split: str = BENCHMARK) -> frozenset[str]:
    """MIG_data.json and its pictures; returns the hashes of all scenes in it."""
    records, hashes = [], set()
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
                    "answer": [round(v, 3) for v in puzzle.box],
                    "additional_info": puzzle.info,
                    "need_format": task not in ("group_grounding", "object_tracking"),
                }
            )
    (root / "MIG-Bench/MIG_data.json").write_text(json.dumps(records, indent=0))
    return frozenset(hashes)


def training_samples(part: str, seed: int, count: int, excluded: frozenset[str]) -> Iterator[LoadedSample]:
    """`count` samples of a part in order of their index, none with an excluded scene; made by two processes."""
    taken = 0
    with process_pool(2) as pool:
        start = 0
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
    """Write the folders of PARTS in `root` anew. They are REMOVED first, as what an interrupted run left there.

    experiments/generate_synthetic.py makes sure that nothing else lies there.
    """
    folder = Path(root)
    for name in PARTS:
        shutil.rmtree(folder / name, ignore_errors=True)
    excluded = write_benchmark(folder, eval_per_task)
    excluded |= write_benchmark(folder / VALIDATION, validation_per_task, VALIDATION)
    for part, count in (("sft", train_samples), ("rl_pool", pool_samples)):
        with ShardWriter(folder / "shards" / part) as writer:
            for loaded in tqdm(training_samples(part, seed, count, excluded), total=count, desc=part, unit="sample"):
                writer.add(loaded)
