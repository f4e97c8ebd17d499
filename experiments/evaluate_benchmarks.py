"""Evaluate a model on the paper's benchmarks.

    python -m experiments.evaluate_benchmarks --config experiments/configs/nano/benchmarks.yaml --model M --bench all
    … --model gpt-4o --endpoint.base_url https://…/v1

    <output>/answers/<benchmark>-<key>/rank0.jsonl   every answer as it came; resuming and the cache
    <output>/<benchmark>/predictions.jsonl           every answer with its score and all that scoring needs
    <output>/<benchmark>/result.json                 columns, averages, intervals (datamodules/metrics/predictions.py)

With a limit the last two lie in <output>/<benchmark>-limit<k>/, with generation=model in
<output>/<benchmark>-model-generation/. `experiments.rescore` scores them again.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from callbacks.evaluation import EvaluationSettings, QuestionsLost, read_answers
from datamodules.benchmarks.base import Benchmark, limit_columns
from datamodules.benchmarks.registry import benchmark_names, load_benchmark
from datamodules.checkpoints.model_folder import ModelError
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.metrics.extraction import EXTRACTED_READERS, with_extractor
from datamodules.metrics.predictions import format_result, write_evaluation
from datamodules.metrics.summary import predict, summarise
from datamodules.persistence.files import fingerprint
from datamodules.persistence.processes import ProcessLost
from datamodules.persistence.source_code import source_code
from datamodules.predictors import Reply
from datamodules.samples.boxes import BoxFormat, BoxFormatName
from datamodules.synthetic.benchmark_replicas.write import TWINS, write_twin
from experiments.evaluation.ask_processes import Job, ask_all
from experiments.evaluation.choose_predictor import ALIASES, ModelOptions, PredictorSettings, choose_predictor
from experiments.evaluation.extracting import extract_letters, extractor_faults, ready_extractor
from experiments.runs import preflight, run_identity, wandb_runs
from experiments.runs.changes import RECORD, Choice, CodeChanged, choice_of, settle_answers, spell_out
from experiments.runs.commands import command
from lightning_modules.predictors.extractor import Extractor
from lightning_modules.serving.generation_rules import Generation
from lightning_modules.serving.openai_client import EndpointMisused, EndpointSettings, EndpointUnavailable


def evaluate_benchmarks(
    model: str,
    data_root: str,
    bench: str = "all",
    output: str | None = None,
    twins: bool = False,
    endpoint: EndpointSettings | None = None,
    model_family: str = "auto",
    box_format: BoxFormatName = "absolute_pixels",
    style: Literal["auto", "think", "answer", "plain", "official", "native"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    decoding: EvaluationSettings | None = None,
    limit: int | None = None,
    processes: int = 1,
    max_prompt_tokens: int = 16_384,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_sample_pixels: int = MAX_SAMPLE_PIXELS,
    max_resized_pixels: int | None = None,
    label_images: bool = False,
    before_image: str | None = None,
    as_trained: bool = True,
    trust_remote_code: bool = False,
    generation: Generation = "greedy",
    extractor: EndpointSettings | None = None,
    redo: bool = False,
    keep: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on the paper's benchmarks; the results by name.

    Args:
        model: folder or Hub name of a Qwen2.5-VL without an adapter (merge first), or of any image-text model that
            transformers loads; nano: models/nano-base. With an endpoint, the server's name of it
        data_root: folder that holds MIG-Bench/, Ref-L4/, ReasonSeg/, ReVOS/, odinw/, BLINK/, MMIU/
        bench: all, or some of mig_bench, ref_l4, lisa, revos, odinw, blink, mmiu with commas between
        output: null: <phase>/benchmarks for the merged model of a phase, else outputs/eval/<model>
        twins: write the benchmarks' nano twins into data_root where they are missing
        endpoint: an OpenAI-compatible server, by base_url; its model is the one above
        model_family: how another model than Qwen2.5-VL is asked for boxes and writes them
            (datamodules/encoding/model_families.py); auto: by model_type and name
        box_format: how a Qwen2.5-VL writes boxes
        style: how questions are put; auto: think, for other models native, which is their model family's own prompt
        dtype: of the weights
        device: auto, cpu, cuda (each process takes its own GPU), cuda:1, ...
        decoding: length of an answer; batches are Qwen2.5-VL's
        limit: ask at most so many questions of each column: split, set, subset or task
        processes: so many share the questions; answers do not depend on it. One asks an endpoint, with the
            endpoint's concurrency
        max_prompt_tokens: a longer prompt of a Qwen2.5-VL counts as wrong
        max_image_pixels: a larger image counts as wrong (decompression bombs)
        max_sample_pixels: a question with more pixels in all its images together counts as wrong
        max_resized_pixels: images are shrunk to so many pixels, where that is less than the processor's own limit
            (for a served Qwen2.5-VL it must be no more than that limit)
        label_images: write "Picture k: " before image k, for a Qwen2.5-VL
        before_image: text before image k for other models instead of the model family's, such as "Picture {}: "
        as_trained: put questions to a phase's merged model as that phase did
        trust_remote_code: run code that comes with a model's weights
        generation: greedy: the likeliest token, without penalties, the same for every model; model: as the model's
            generation_config.json or its server says (lightning_modules/serving/generation_rules.py), in results of
            their own
        extractor: an OpenAI-compatible server, by base_url and model, that says which option an answer of BLINK or MMIU
            picks where the official reader finds no letter; official columns only, replies are kept
        redo: ask again what has been answered by other source files of the project
        keep: take answers that were given by other source files of the project
    """
    choice = choice_of(redo, keep)
    options = ModelOptions(
        box_format=box_format,
        style=style,
        model_family=model_family,
        before_image=before_image,
        label_images=label_images,
        max_prompt_tokens=max_prompt_tokens,
        max_image_pixels=max_image_pixels,
        max_sample_pixels=max_sample_pixels,
        max_resized_pixels=max_resized_pixels,
        as_trained=as_trained,
        dtype=dtype,
        device=device,
        decoding=decoding or EvaluationSettings(),
        trust_remote_code=trust_remote_code,
        generation=generation,
    )
    faults = [f"processes={processes} must be at least 1"] if processes < 1 else []
    try:
        names = benchmark_names(bench)
    except ValueError as error:
        preflight.raise_all([*faults, str(error)])
    settings = _choose_predictor(model, endpoint, options, faults + extractor_faults(extractor, names))
    benchmarks = _load(names, data_root, twins)
    home = Path(output or default_output(settings.model, served=endpoint is not None))
    job = Job(settings, tuple(benchmarks), data_root, str(home / "answers"), limit)
    with run_identity.locked(home):
        _settle_answers(home, choice)
        asked = None if extractor is None else ready_extractor(extractor, home / "answers")
        results = _evaluate(job, benchmarks, home, 1 if endpoint else processes, asked)
    if limit is None:
        _log(home, results)
    print(f"wrote {home}")
    return results


def _settle_answers(home: Path, choice: Choice | None) -> None:
    """Ask, keep or set aside where answers in `home` were given by other source files. Each benchmark's folder in
    answers/ is named by the key of its own answers, so all of `home` has one record of code."""
    answers, code = home / "answers", source_code(("experiments.evaluate_benchmarks",))

    def set_aside() -> None:
        old = answers.with_name(f"answers.{secrets.token_hex(4)}")
        answers.replace(old)
        print(f"{answers} is moved to {old}", flush=True)

    settle_answers(
        home / RECORD,
        "benchmarks",
        code,
        choice,
        is_there=lambda: any(answers.glob("*/*.jsonl")),
        is_done=lambda: any(home.glob("*/result.json")),
        set_aside=set_aside,
    )


def _choose_predictor(
    model: str, endpoint: EndpointSettings | None, options: ModelOptions, faults: list[str]
) -> PredictorSettings:
    """`choose_predictor`; raises SettingsError with its fault and the `faults` that are known already."""
    try:
        settings = choose_predictor(model if endpoint else ALIASES.get(model, model), endpoint, options)
    except ValueError as error:
        faults = [*faults, str(error)]
    preflight.raise_all(faults)
    return settings


def _evaluate(
    job: Job, benchmarks: dict[str, Benchmark], home: Path, processes: int, extractor: Extractor | None
) -> dict[str, dict[str, Any]]:
    """Ask, and score each benchmark as soon as all its answers are there."""
    results: dict[str, dict[str, Any]] = {}
    totals = {name: len(limit_columns(benchmark.samples, job.limit)) for name, benchmark in benchmarks.items()}
    for ended in ask_all(job, totals, processes):
        facts = {"model": job.settings.model, "data_root": job.data_root, "key": ended.key, "limit": job.limit}
        facts["generation"] = job.settings.generation
        replies = read_answers(Path(ended.folder), ended.key)
        results[ended.name] = _finish(benchmarks[ended.name], home, facts, replies, ended.box_format, extractor)
    return results


def _load(names: list[str], data_root: str, twins: bool) -> dict[str, Benchmark]:
    """All benchmarks, before any weights: a missing file should fail in the first seconds, and every one at once."""
    found: dict[str, Benchmark] = {}
    faults = []
    for name in names:
        try:
            if twins and name in TWINS:
                write_twin(name, data_root)
            found[name] = load_benchmark(name, data_root)
        except (OSError, ValueError) as error:
            faults.append(f"{name}: {error}")
    preflight.raise_all(faults)
    for name, benchmark in found.items():
        notes = "".join(f"; {count} {reason}" for reason, count in benchmark.dropped.items() if count)
        print(f"{name}: {len(benchmark.samples)} questions{notes}", flush=True)
    return found


def _finish(
    benchmark: Benchmark,
    home: Path,
    facts: dict[str, Any],
    replies: dict[str, Reply],
    box_format: BoxFormat,
    extractor: Extractor | None,
) -> dict[str, Any]:
    """Score what was answered, write and print it."""
    rules = (benchmark.rule, benchmark.official)
    samples = limit_columns(benchmark.samples, facts["limit"])
    predictions = [predict(sample, replies[sample.id], box_format, *rules) for sample in samples]
    result = {"benchmark": benchmark.name} | facts | {"extractor": None}
    if extractor is not None and benchmark.official.reader in EXTRACTED_READERS:
        predictions, result["extractor"] = extract_letters(extractor, benchmark, samples, predictions)
        rules = (benchmark.rule, with_extractor(benchmark.official, extractor.settings.model))
    result |= {"dropped": dict(benchmark.dropped)} | summarise(predictions, *rules, benchmark.averages)
    write_evaluation(home / result_folder(benchmark.name, facts["limit"], facts["generation"]), predictions, result)
    print("\n" + format_result(result), flush=True)
    return result


def result_folder(name: str, limit: int | None, generation: Generation) -> str:
    """A benchmark's own for each way of asking: none replaces the results of another."""
    how = "" if generation == "greedy" else "-model-generation"
    return name + how + ("" if limit is None else f"-limit{limit}")


def default_output(model: str, served: bool = False) -> str:
    """A folder of the model's own: inside the phase that a merged model lies in. A served one never shares it."""
    if Path(model).name == "merged" and not served:
        return str(Path(model).parent / "benchmarks")
    name = model.strip("./").replace("/", "--")
    return str(Path("outputs") / "eval" / (f"{name}--served" if served else name))


def _log(home: Path, results: dict[str, dict[str, Any]]) -> None:
    """To the W&B run of the phase, or one of the model's own."""
    values = {}
    for name, result in results.items():
        cells = result["columns"] | result["averages"]
        values |= {f"{name}/{column}": cell["score"] for column, cell in cells.items()}
    folder = home.parent if (home.parent / run_identity.CONFIG).is_file() else home
    fields = ("model", "data_root", "key", "generation", "extractor")
    settings = {name: {field: result[field] for field in fields} for name, result in results.items()}
    wandb_runs.log_evaluation(folder, fingerprint([result["key"] for result in results.values()]), values, settings)


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make eval MODEL=… BENCH=…`."""
    try:
        auto_cli(evaluate_benchmarks, as_positional=False, args=spell_out(args))
    except (
        preflight.SettingsError,
        CodeChanged,
        EndpointMisused,
        EndpointUnavailable,
        ModelError,
        ProcessLost,
        QuestionsLost,
    ) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
