"""Evaluate a model on MIG-Bench.

    python -m experiments.evaluate --config experiments/configs/nano/eval.yaml --model M --output outputs/nano/base

It writes predictions.jsonl, every answer with its score, and mig_bench.json, the summary, into the output folder, and
logs the summary to the W&B run of that phase.
Killed and started again, it goes on after the last batch of answers. Where the source files of the project have changed
since these answers were given, it asks: --keep takes them, --redo sets them aside and asks the model anew.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from callbacks.evaluation import EvaluationSettings
from callbacks.mig_bench import evaluation_key, limit_tasks, summary_metrics
from callbacks.previews import draw_previews
from datamodules.benchmarks.mig_bench import load_images, load_mig_bench
from datamodules.checkpoints.model_folder import ModelError
from datamodules.encoding.messages import PromptStyle
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.metrics.mig_scoring import format_table, summarise
from datamodules.persistence.files import read_journal, read_json, write_json
from datamodules.persistence.processes import ProcessLost
from datamodules.persistence.source_code import source_code
from datamodules.samples.boxes import BoxFormat, BoxFormatName
from experiments.evaluation.ask_processes import share_cores
from experiments.evaluation.shares import Asking, OtherProcesses, answer_all, set_answers_aside
from experiments.runs import preflight, run_identity, wandb_runs
from experiments.runs.changes import RECORD, CodeChanged, choice_of, settle_answers, spell_out
from experiments.runs.commands import command
from lightning_modules.serving.generation_rules import Generation, note


def evaluate(
    model: str,
    annotations: str,
    image_root: str,
    output: str | None = None,
    box_format: BoxFormatName = "absolute_pixels",
    style: Literal["think", "answer", "plain", "official"] = "think",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    decoding: EvaluationSettings | None = None,
    limit_per_task: int | None = None,
    max_prompt_tokens: int = 16_384,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_sample_pixels: int = MAX_SAMPLE_PIXELS,
    max_resized_pixels: int | None = None,
    label_images: bool = False,
    as_trained: bool = True,
    processes: int = 1,
    generation: Generation = "greedy",
    redo: bool = False,
    keep: bool = False,
) -> None:
    """Evaluate a model on MIG-Bench.

    Args:
        model: folder or Hub name of a Qwen2.5-VL, without an adapter (merge first)
        annotations: MIG_data.json
        image_root: folder that holds MIG-Bench/
        output: folder for predictions.jsonl and mig_bench.json, which are replaced there; null: that of the phase which
            the merged model lies in, for another model outputs/mig_bench/<model>, and nothing finished is replaced
        box_format: how the model writes boxes
        style: how questions are put; plain and official for models that were not trained here
        dtype: of the weights
        device: auto, cpu, cuda, cuda:1, ...
        decoding: length of an answer, questions at a time
        limit_per_task: first look on so many questions of each task
        max_prompt_tokens: a longer prompt counts as wrong
        max_image_pixels: a larger image counts as wrong (decompression bombs)
        max_sample_pixels: a question with more pixels in all its images together counts as wrong
        max_resized_pixels: images are shrunk to so many pixels, where that is less than the processor's own limit
        label_images: write "Picture k: " before image k
        as_trained: put questions to a phase's merged model as that phase did, whatever box format, style,
            max_resized_pixels and label_images say; false: as these say
        processes: so many share the questions, each with a GPU of its own, or with its part of the CPU's cores
        generation: greedy: the likeliest token, without penalties; model: as the model's generation_config.json says,
            one question at a time (lightning_modules/serving/generation_rules.py)
        redo: ask again the questions that other source files of the project have asked
        keep: take answers that other source files of the project have got
    """
    home, choice = Path(output or default_output(model)), choice_of(redo, keep)
    faults = [f"processes={processes} must be at least 1"] if processes < 1 else []
    preflight.raise_all(faults + preflight.model_faults(model) + preflight.benchmark_faults(annotations, image_root))
    decoding = decoding or EvaluationSettings()
    form = {"box_format": box_format, "style": style}
    form |= {"max_resized_pixels": max_resized_pixels, "label_images": label_images}
    form |= run_identity.trained_form(model, form) if as_trained else {}
    form |= {"box_format": BoxFormat(form["box_format"]), "style": PromptStyle(form["style"])}
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_image_pixels": max_image_pixels}
    limits |= {"max_sample_pixels": max_sample_pixels}
    asking = Asking(model, dtype, device, form | limits, image_root, decoding, generation)
    every_sample, dirty = load_mig_bench(annotations, image_root)
    if dirty:
        print(dirty, flush=True)
    samples = limit_tasks(every_sample, limit_per_task)
    with OtherProcesses(processes - 1) as others, run_identity.locked(home / "predictions.jsonl"):
        share_cores(processes)
        policy, encoder = asking.policy(rank=0), asking.encoder()
        key = evaluation_key(policy, encoder, annotations, image_root, samples, decoding, generation)
        folder = home if output else spare_folder(home, key)
        settle_answers(
            folder / RECORD,
            key,
            source_code(("experiments.evaluate",)),
            choice,
            is_there=lambda: bool(read_journal(folder / "predictions.jsonl", key)),
            is_done=lambda: read_json(folder / "mig_bench.json").get("key") == key,
            set_aside=lambda: set_answers_aside(folder),
        )
        found = answer_all(asking, policy, encoder, samples, folder, key, others)
        summary = summarise(found)
        facts = {"key": key, "model": model, "limit_per_task": limit_per_task, "generation": generation}
        write_json(folder / "mig_bench.json", facts | summary)
    print(f"{format_table(summary)}{note(generation)}", flush=True)
    if folder == home:
        settings = {"model": model, "annotations": annotations, "dtype": dtype, "generation": generation}
        settings |= form | limits | asdict(decoding)
        by_id = {prediction.id: prediction for prediction in found}
        drawn = limit_tasks(samples, 1)
        load = partial(load_images, image_root=image_root)
        rows = draw_previews(drawn, [by_id[sample.id] for sample in drawn], load, max_image_pixels)
        wandb_runs.log_evaluation(folder, key, summary_metrics(summary, "mig_bench"), settings, rows)


def default_output(model: str) -> str:
    """A folder of the model's own: evaluating one model never overwrites another's answers."""
    if Path(model).name == "merged":
        return str(Path(model).parent)
    return str(Path("outputs") / "mig_bench" / model.strip("./").replace("/", "--"))


def spare_folder(home: Path, key: str) -> Path:
    """`home`, or a folder in it for this key where `home` holds the finished evaluation of another.

    So a quick look on a few questions leaves the numbers that a pipeline or a report reads as they are.
    """
    if read_json(home / "mig_bench.json").get("key") in (None, key):
        return home
    folder = home / f"mig_bench-{key}"
    print(f"{home} holds an evaluation with other settings or inputs: this one goes to {folder}", flush=True)
    return folder


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make eval`."""
    try:
        auto_cli(evaluate, as_positional=False, args=spell_out(args))
    except (preflight.SettingsError, run_identity.OtherVersion, ModelError, CodeChanged, ProcessLost) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
