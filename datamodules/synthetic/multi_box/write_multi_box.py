"""Write the synthetic questions with several boxes as shards.

    root/shards/sft, root/shards/rl_pool   training samples of the trained tasks
    root/shards/in_domain                  other questions of these tasks, for evaluation
    root/shards/out_of_domain              questions of tasks that are never trained

The questions for evaluation do not depend on the seed, and training never sees a scene of theirs.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from datamodules.persistence.progress_lines import Counted
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_writer import ShardWriter
from datamodules.synthetic.multi_box.multi_box_tasks import NOT_TRAINED, TRAINED, MultiBoxPuzzle
from datamodules.synthetic.world import draw_scene, encode_png

SOURCE = "nano-multi-box"
HELD_OUT = {"in_domain": TRAINED, "out_of_domain": NOT_TRAINED}


def held_out_puzzle(task: str, index: int) -> MultiBoxPuzzle:
    """Question `index` of a task, for evaluation."""
    return (TRAINED | NOT_TRAINED)[task](random.Random(f"held_out:{task}:{index}"))


def training_puzzle(part: str, seed: int, index: int) -> MultiBoxPuzzle:
    """Puzzle `index` of "sft" or "rl_pool"."""
    rng = random.Random(f"{SOURCE}:{part}:{seed}:{index}")
    return rng.choice(tuple(TRAINED.values()))(rng)


def _loaded(name: str, puzzle: MultiBoxPuzzle) -> LoadedSample:
    images = tuple(f"{name}/{k}.png" for k in range(len(puzzle.scenes)))
    boxes = tuple(BoxAnswer(image, thing.box, thing.kind.name) for image, thing in puzzle.answers)
    parts = (*map(ImagePart, range(len(images))), TextPart(puzzle.question))
    sample = Sample(name, SOURCE, puzzle.task, images, parts, BoxesAnswer(boxes), puzzle.thinking())
    return LoadedSample(sample, tuple(encode_png(draw_scene(scene)) for scene in puzzle.scenes))


def training_samples(part: str, seed: int, count: int, excluded: frozenset[str]) -> Iterator[LoadedSample]:
    """`count` samples of a part in order of their index, without those that have an excluded scene.

    Args:
        part: "sft" or "rl_pool".
        seed: seed of the training data.
        count: number of samples.
        excluded: hashes of scenes that no sample may have.
    """
    index = taken = 0
    while taken < count:
        puzzle = training_puzzle(part, seed, index)
        if not puzzle.content_hashes() & excluded:
            taken += 1
            yield _loaded(f"{SOURCE}/{part}/{seed}/{index}", puzzle)
        index += 1


def build_multi_box(root: str, seed: int, train_samples: int, eval_per_task: int, pool_samples: int) -> None:
    """Write the shards. The folder `root`/shards is REMOVED first, because an interrupted run may have left it.

    Args:
        root: folder of the dataset.
        seed: seed of the training data.
        train_samples: samples for CoT-SFT.
        eval_per_task: questions for evaluation of each of the five tasks.
        pool_samples: prompts in the RL pool.
    """
    shards = Path(root) / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    # 1. The questions for evaluation. Their scenes are excluded from training.
    excluded: frozenset[str] = frozenset()
    for part, tasks in HELD_OUT.items():
        total = len(tasks) * eval_per_task
        with ShardWriter(shards / part) as writer, Counted(total, part, "question") as progress:
            for task in tasks:
                for index in range(eval_per_task):
                    puzzle = held_out_puzzle(task, index)
                    excluded |= puzzle.content_hashes()
                    writer.add(_loaded(f"{SOURCE}/{part}/{task}/{index}", puzzle))
                    progress.update()
    # 2. The training data.
    for part, count in (("sft", train_samples), ("rl_pool", pool_samples)):
        with ShardWriter(shards / part) as writer, Counted(count, part, "sample") as progress:
            for loaded in training_samples(part, seed, count, excluded):
                writer.add(loaded)
                progress.update()
