"""Evaluate a model on the paper's benchmarks, on MC-Bench, or on any folder of shards.

    python -m experiments.evaluate --config experiments/configs/nano/eval.yaml --model M --bench all
    … --model M --bench mig_bench,data/kites/val
    … --model gpt-4o --endpoint.base_url https://…/v1

    <output>/answers/<benchmark>-<key>/rank0.jsonl   every raw answer; used to resume and as a cache
    <output>/<benchmark>/predictions.jsonl           every answer with its score, and all data for scoring
    <output>/<benchmark>/result.json                 columns, averages, intervals (datamodules/metrics/result_files.py)

With a limit, the last two are in <output>/<benchmark>-limit<k>/. With decoding.generation=model, they are in
<output>/<benchmark>-model-generation/. `experiments.evaluation.rescore` scores them again.

If the command is killed and started again, it continues after the last chunk of answers. If the project's source files
have changed since then, it asks the user: --keep uses the old answers, --redo moves them away and asks the model again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Benchmark, limit_columns
from datamodules.benchmarks.registry import benchmark_names, load_benchmark
from datamodules.benchmarks.shard_folders import is_shards
from datamodules.metrics.drawing import Drawn, draw_previews
from datamodules.metrics.extraction import EXTRACTED_READERS, with_extractor
from datamodules.metrics.predictions import Prediction
from datamodules.metrics.result_files import (
    RESULT,
    VERSION,
    format_result,
    result_folder,
    result_metrics,
    write_evaluation,
)
from datamodules.metrics.scoring import score_replies
from datamodules.persistence import folder_lock
from datamodules.persistence.files import fingerprint, read_json, write_json
from datamodules.persistence.source_code import source_code
from datamodules.samples.sample import Sample
from datamodules.samples.scores import true_boxes
from datamodules.synthetic.benchmark_replicas.write import REPLICAS, write_replica
from experiments.evaluation.ask_processes import Ended, Job, ask_all
from experiments.evaluation.choose_predictor import PredictorSettings, choose_predictor
from experiments.evaluation.evaluation_settings import MOVED, PHASE_FOLDER, Evaluation
from experiments.evaluation.extracting import extract_letters, extractor_problems
from experiments.runs import wandb_runs
from experiments.runs.changes import Choice, choice_of, decide, is_stale, kept, question, spell_out
from experiments.runs.command_line.run_facts import run_facts
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.preflight import is_within, raise_all
from experiments.runs.renamed_settings import refuse_moved
from experiments.runs.results import EVALUATION
from experiments.runs.tracking.lineage import log_evaluations
from lightning_modules.metrics.summary import summarise
from lightning_modules.predictors.ask import answers_folder, questions_key, read_answers
from lightning_modules.predictors.extractor import Extractor

FACTS = ("data_root", "key", "extractor")  # fields of a result that are logged to W&B


def evaluate(asked: Evaluation, words: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate a model on the paper's benchmarks and on shards; returns the results by name, {} for a mere check.

    Args:
        asked: the settings.
        words: the command line, for the record of the evaluation; None means that of this process.
    """
    # 1. Check every setting and file, before any weights are read.
    choice = choice_of(asked.redo, asked.keep)
    settings, benchmarks = _check(asked)
    if settings is None or asked.check_without is not None:
        return {}
    for name, benchmark in benchmarks.items():
        notes = "".join(f"; {count} {reason}" for reason, count in benchmark.dropped.items() if count)
        print(f"{name}: {len(benchmark.samples)} questions{notes}", flush=True)
    home = Path(asked.output or default_output(settings.model, served=asked.endpoint is not None))
    with folder_lock.locked(home):
        _settle_answers(home, choice, words)
        extractor = None if asked.extractor is None else Extractor(asked.extractor, home / "answers")
        if extractor is not None:
            extractor.check_first()
        # 2. Ask, and score each benchmark as soon as it has all answers.
        scored = _ScoredBenchmarks(asked, settings.model, home, extractor)
        job = Job(settings, tuple(benchmarks), asked.data_root, str(home), asked.limit)
        totals = {name: len(limit_columns(found.samples, asked.limit)) for name, found in benchmarks.items()}
        for ended in ask_all(job, totals, 1 if asked.endpoint else asked.processes):
            scored.add(benchmarks[ended.name], ended)
    # 3. Log the results of complete benchmarks to the W&B run of the phase, or to a new run for the model.
    if scored.logged:
        folder = home.parent if home.name == PHASE_FOLDER else home
        values = {name: value for result in scored.logged for name, value in result_metrics(result).items()}
        facts = {"predictor": asdict(settings)}
        facts |= {result["benchmark"]: {name: result[name] for name in FACTS} for result in scored.logged}
        key = fingerprint([result["key"] for result in scored.logged])
        wandb_runs.log_evaluation(folder, key, values, facts, scored.drawn, partial(_log_lineage, scored, folder))
    print(f"wrote {home}")
    return scored.results


def _check(asked: Evaluation) -> tuple[PredictorSettings | None, dict[str, Benchmark]]:
    """Check and return the predictor's settings and the benchmarks, without those that are still to be made.

    Raises SettingsError with all problems of the settings, of the model's files and of the benchmarks' files.
    """
    problems = [f"processes={asked.processes} must be at least 1"] if asked.processes < 1 else []
    problems += [f"limit={asked.limit} must be at least 1"] if asked.limit is not None and asked.limit < 1 else []
    # Each check adds its problems and the next check follows, so that the user sees all problems at once.
    try:
        wandb_runs.choose_wandb_mode()
    except ValueError as error:
        problems.append(str(error))
    names: list[str] = []
    settings: PredictorSettings | None = None
    absent = asked.check_without or ()
    try:
        names = benchmark_names(asked.bench)
        problems += extractor_problems(asked.extractor, names)
    except ValueError as error:
        problems.append(str(error))
    try:
        settings = None if is_within(asked.model, absent) else choose_predictor(asked.model, asked)
    except (OSError, ValueError) as error:
        problems.append(str(error))

    # Then no replica is written, so missing benchmarks are not reported.
    if asked.replicas and (problems or asked.check_without is not None):
        names = [name for name in names if name not in REPLICAS]
    names = [name for name in names if not is_within(name if is_shards(name) else asked.data_root, absent)]
    benchmarks, missing = load_benchmarks(names, asked.data_root, asked.replicas)
    raise_all(problems + missing)
    return settings, benchmarks


def load_benchmarks(names: Sequence[str], data_root: str, replicas: bool) -> tuple[dict[str, Benchmark], list[str]]:
    """Read the benchmarks; returns them by name, and the problems of unreadable ones.

    With `replicas`, missing benchmarks are written first.
    """
    found: dict[str, Benchmark] = {}
    problems = []
    for name in names:
        try:
            if replicas and name in REPLICAS:
                write_replica(name, data_root)
            benchmark = load_benchmark(name, data_root)
            if benchmark.name in {other.name for other in found.values()}:
                raise ValueError(f"the results of two folders would lie in {benchmark.name}/: evaluate one at a time")
            found[name] = benchmark
        except FileNotFoundError as error:
            cure = "data_root is the folder of the benchmarks, and `make shards` makes the nano default's"
            what = f"there is no {error.filename}" if error.filename else str(error)
            problems.append(f"{name}: {what}; {cure}")
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return found, problems


def _settle_answers(home: Path, choice: Choice | None, words: Sequence[str] | None) -> None:
    """Record the code, the command line and the machine of this evaluation in `home`.

    Answers from other code are kept or moved away, as the user has chosen.

    The folders in answers/ have the keys of their answers in their names, so one record of code is enough for `home`.
    Raises CodeChanged if there are answers from other code and the user has made no choice.
    """
    answers, code = home / "answers", source_code(("experiments.evaluate",))
    record = read_json(home / EVALUATION)
    stale = (record or any(answers.glob("*/*.jsonl"))) and is_stale(record, code, choice)
    is_done = any(home.glob(f"*/{RESULT}"))
    decision = decide(stale, choice, partial(question, f"the evaluation in {home}", is_done, record, code))
    if decision == "keep":
        record = kept(record, code)
        print(f"the answers in {home} are kept, although other source files have asked for them", flush=True)
    elif decision == "redo":
        record = {}
        if answers.exists():  # an evaluation that was stopped before its first question has none
            # A random name, so that it never equals the name of an older copy.
            old = answers.with_name(f"answers.{secrets.token_hex(4)}")
            answers.replace(old)
            print(f"{answers} is moved to {old}", flush=True)
    write_json(
        home / EVALUATION, {"key": "benchmarks", "code": code} | record | run_facts("experiments.evaluate", words)
    )


def _log_lineage(scored: _ScoredBenchmarks, folder: Path, run: Any) -> None:
    log_evaluations(run, folder, {path.name: path for path in scored.written}, scored.model)


class _ScoredBenchmarks:
    """Scores, writes and prints the benchmarks one by one.

    `logged` has the results of complete benchmarks, `written` their folders, `drawn` pictures of some answers.
    """

    def __init__(self, asked: Evaluation, model: str, home: Path, extractor: Extractor | None) -> None:
        self.asked, self.model, self.home, self.extractor = asked, model, home, extractor
        self.results: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.written: list[Path] = []
        self.drawn: list[Drawn] = []

    def add(self, benchmark: Benchmark, ended: Ended) -> None:
        """Score, summarise and write a benchmark that has all answers."""
        asked, rules = self.asked, (benchmark.rule, benchmark.official)
        data_root = ended.name if is_shards(ended.name) else asked.data_root
        result = {"benchmark": benchmark.name, "model": self.model, "data_root": data_root, "key": ended.key}
        result |= {
            "questions": questions_key(benchmark),
            "limit": asked.limit,
            "generation": asked.decoding.generation,
            "extractor": None,
        }
        # Score each answer by both rules. A language model may do the last step of the official parser.
        samples = limit_columns(benchmark.samples, asked.limit)
        replies = read_answers(answers_folder(self.home, benchmark.name, ended.key), ended.key)
        predictions = score_replies(benchmark, samples, replies, ended.box_format, ended.answer_form)
        if self.extractor is not None and benchmark.official.reader in EXTRACTED_READERS:
            predictions, result["extractor"] = extract_letters(self.extractor, benchmark, samples, predictions)
            rules = (benchmark.rule, with_extractor(benchmark.official, self.extractor.settings.model))
        # Summarise: columns, averages, intervals.
        result |= {"dropped": dict(benchmark.dropped)} | summarise(predictions, *rules, benchmark.averages)
        # Write.
        plain = self.home / result_folder(benchmark.name, asked.limit, asked.decoding.generation)
        folder = self._spare(plain, ended.key)
        write_evaluation(folder, predictions, result)
        print("\n" + format_result(result), flush=True)
        self.results[benchmark.name] = result
        # A part of a benchmark, or a result with other settings, must not be logged to the curves of the run.
        if asked.limit is None and folder == plain:
            self.logged.append(result)
            self.written.append(folder)
            self.drawn += self._draw(benchmark, samples, predictions)

    def _spare(self, folder: Path, key: str) -> Path:
        """`folder`, or another one beside it if `folder` is in a phase and has a finished result with other settings.

        So results that a pipeline or a report reads are not overwritten, unless --output names the folder.
        """
        found = read_json(folder / RESULT)
        if self.asked.output or self.home.name != PHASE_FOLDER or found.get("version") != VERSION:
            return folder
        if found["key"] == key:
            return folder
        spare = folder.with_name(f"{folder.name}-{key}")
        print(f"{folder} holds a result with other settings or inputs: this one goes to {spare}", flush=True)
        return spare

    def _draw(self, benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Drawn]:
        """Draw one answer of each column, if the answers are boxes."""
        known = {found.id: found for found in predictions}
        chosen = limit_columns([sample for sample in samples if true_boxes(sample.answer)], 1)
        found = [known[sample.id] for sample in chosen]
        return draw_previews(chosen, found, benchmark.load, self.asked.limits.max_image_pixels)


def default_output(model: str, served: bool = False) -> str:
    """The default output folder. For a merged model, it is inside the phase. A served model never shares it."""
    if Path(model).name == "merged" and not served:
        return str(Path(model).parent / PHASE_FOLDER)
    name = model.strip("./").replace("/", "--")
    return str(Path("outputs") / "eval" / (f"{name}--served" if served else name))


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make eval`."""
    refuse_moved(args, MOVED)
    words = spell_out(args)
    evaluate(run_cli(Evaluation, words), words)


if __name__ == "__main__":
    main()
