"""CoT data from a teacher: `python -m experiments.synthesize --config experiments/configs/nano/synthesize.yaml`.

Every question of the shards is sent to the teacher several times. A question is kept if all responses are correct, and
the thinking of one response becomes its rationale (`experiments/synthesis/rationale_filter.py` has the rule). The
output folder has

    shards/           the kept samples with thinking, for CoT-SFT
    journal.jsonl     every response, written when it arrives; a resumed run continues after the last one
    outcomes.jsonl    every answered question: number of correct responses, and the chosen one or why it was dropped
    synthesis.json, report.md   counts, tokens, cost and the histogram of difficulty
    server/           the log of the local server, if one was started

A run with another threshold or limit uses the existing responses. Other prompts, sampling or another teacher are
refused, unless --redo renames the old folder. If the questions themselves have changed, it is renamed at once. If
source files of the project have changed since, the command asks for --keep or --redo.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datamodules.checkpoints.model_folder import PROMPT_FORM, ModelError, check_name
from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.model_families import find_model_family
from datamodules.encoding.prompt_form import form_as_trained, read_prompt_form
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.persistence import folder_lock
from datamodules.persistence.files import Journal, fingerprint, read_journal, read_json, write_atomic, write_json
from datamodules.persistence.problems import Problems
from datamodules.persistence.source_code import source_code
from datamodules.samples.boxes import image_sizes_from_json
from datamodules.samples.sample import SampleError
from datamodules.streaming.manifest import MANIFEST
from datamodules.streaming.path_fingerprint import path_fingerprint
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_sources import source_list
from experiments.runs import preflight, run_identity
from experiments.runs.changes import MadeOf, choice_of, spell_out
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.synthesis.rationale_filter import (
    Verdict,
    format_report,
    group_responses,
    judge,
    summarise,
    write_rationales,
)
from experiments.synthesis.teacher import Prices, Sampling, Session, Teacher, missing_responses
from lightning_modules.serving.generation_rules import server_fields
from lightning_modules.serving.openai_client import EndpointSettings
from lightning_modules.serving.transformers_server import local_server

KEEPS_BOTH = "To keep both, give the new responses another folder: --output FOLDER."


def synthesize(
    questions: str | list[str],
    output: str,
    endpoint: EndpointSettings,
    model_family: str = "auto",
    before_image: str | None = None,
    as_trained: bool = True,
    min_pixels: int = 56 * 56,
    max_pixels: int = 16384 * 28 * 28,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_sample_pixels: int = MAX_SAMPLE_PIXELS,
    sampling: Sampling | None = None,
    threshold: float = 0.5,
    limit: int | None = None,
    prices: Prices | None = None,
    device: str = "auto",
    verify_shards: bool = True,
    redo: bool = False,
    keep: bool = False,
    check_without: list[str] | None = None,
) -> None:
    """Ask a teacher for rationales and write the kept samples as shards.

    Args:
        questions: shard folders of samples with one true box; their own thinking is not shown to the teacher
        output: folder for the shards and the journal
        endpoint: the teacher. Without base_url, model is a folder or Hub name, and a local server is started for it,
            which answers one request at a time
        model_family: the box format and prompt of the teacher (datamodules/encoding/model_families.py); auto finds it
            by the name
        before_image: label before each image in place of the model family's, such as "Picture {}: "
        as_trained: for a teacher that was trained here, use the prompt_form.json in its folder; this overrides
            model_family, before_image and max_pixels
        min_pixels: images with fewer pixels are enlarged
        max_pixels: images with more pixels are shrunk; for a teacher that writes boxes in pixels, it must not be above
            the limit of its server
        max_image_pixels: a stored image with more pixels is refused (decompression bomb)
        max_sample_pixels: a question whose stored images together have more pixels is refused
        sampling: number of responses to each question, temperature, length and seed
        threshold: a response is correct if its IoU is above this
        limit: use only this number of questions, for a first test
        prices: prices of tokens, for the cost
        device: device of the local server: auto, cpu, cuda:0, ...
        verify_shards: compare the sha256 of each shard with its manifest when the shard is first read
        redo: rename the folder of responses that another version of the code has collected, and ask again
        keep: continue with the responses that another version of the code has collected
        check_without: only check the settings, and read nothing from these paths, which are still to be made
    """
    # 1. Check the settings; report all problems before anything is started.
    sampling, prices = sampling or Sampling(), prices or Prices()
    folders = source_list(questions)
    problems = _problems(folders, endpoint, threshold, limit, check_without or ())
    pixels = (min_pixels, max_pixels, max_image_pixels, max_sample_pixels)
    form = _form(model_family, endpoint.model, problems, as_trained, before_image, *pixels)
    if check_without is not None:
        return
    # 2. The key: everything that the responses depend on.
    responses = _made_of(folders, endpoint, form, sampling)
    home = Path(output)
    with folder_lock.locked(home):
        is_ours = run_identity.is_recorded(home)
        run_identity.claim(home, responses, choice=choice_of(redo, keep), cure=KEEPS_BOTH)
        reader = ShardReader(folders, verify_shards)
        count = min(reader.count, limit or reader.count)
        result_key = fingerprint(responses.key, threshold, count, asdict(prices))
        if _is_finished(home, result_key):
            print(f"{home} is already finished with these settings", flush=True)
            return
        # 3. Request all responses that are missing in the journal.
        journal = Journal(home / "journal.jsonl", responses.key, is_ours)
        session = Session()
        if missing_responses(journal.records, count, sampling.num_responses):  # otherwise no server is started
            with _reachable(endpoint, home / "server", device) as settings:
                session = Teacher(reader, settings, form, sampling, journal, prices).run(count)
        # 4. Choose the rationales and write the shards. Without synthesis.json, the result counts as unfinished.
        records = read_journal(journal.path, responses.key)
        (home / "synthesis.json").unlink(missing_ok=True)
        verdicts = _judge_all(records, count, reader, form, threshold, sampling)
        tasks = write_rationales(home, reader, verdicts, endpoint.model)
        # 5. Write the summary, last.
        summary = summarise(verdicts, tasks, records, count, sampling.num_responses)
        summary["failed"] = session.failed
        summary["cost"] = round(prices.cost(summary["prompt_tokens"], summary["completion_tokens"]), 4)
        summary |= {"teacher": endpoint.model, "threshold": threshold, "sampling": asdict(sampling)}
        report = format_report(summary, f"CoT synthesis by {endpoint.model}")
        write_atomic(home / "report.md", report)
        write_json(home / "synthesis.json", {"key": result_key} | summary)  # it marks the result as complete
        print(report, flush=True)
    print(_session_text(session), flush=True)


def _made_of(folders: list[str], endpoint: EndpointSettings, form: RequestForm, sampling: Sampling) -> MadeOf:
    """The settings, questions and code that the responses depend on."""
    request_fields = server_fields(endpoint) | endpoint.extra_body
    weights = path_fingerprint(endpoint.model)
    teacher = [endpoint.model, request_fields, weights]
    contents = [path_fingerprint(folder) for folder in folders]
    key = fingerprint(contents, teacher, form.facts(), asdict(sampling))
    known = {"endpoint": {"model": endpoint.model, "weights": weights, "extra_body": request_fields}}
    known |= {"form": form.facts(), "sampling": asdict(sampling)}
    inputs = {"questions": [(str(folder), content) for folder, content in zip(folders, contents, strict=True)]}
    return MadeOf(key, known, inputs, source_code(("experiments.synthesize",)))


def _is_finished(home: Path, key: str) -> bool:
    """Whether the result is complete, with an answer to every question."""
    found = read_json(home / "synthesis.json")
    return found.get("key") == key and not found.get("failed") and (home / "shards" / MANIFEST).is_file()


@contextmanager
def _reachable(endpoint: EndpointSettings, work: Path, device: str) -> Iterator[EndpointSettings]:
    """The endpoint with the address of a server; a local server is started if it has none."""
    if endpoint.base_url is not None:
        yield endpoint
        return
    print(f"starting a local server of {endpoint.model}", flush=True)
    with local_server(endpoint.model, work, device) as server:
        # One request at a time: the server processes only one at a time anyway, and its seeds are effective only
        # without parallel requests.
        yield replace(endpoint, base_url=server.base_url, model=server.model, concurrency=1, sampling_fields="openai")


def _judge_all(
    records: list[dict[str, Any]],
    count: int,
    reader: ShardReader,
    form: RequestForm,
    threshold: float,
    sampling: Sampling,
) -> dict[int, Verdict]:
    """The decisions about all questions that have all their responses: {number: decision}."""
    verdicts = {}
    for number, responses in group_responses(records, count).items():
        if len(responses) < sampling.num_responses:
            continue
        sample, texts = reader.read(number).sample, [response["text"] for response in responses]
        image_sizes = image_sizes_from_json(responses[0]["sizes"])
        verdicts[number] = judge(sample, texts, image_sizes, form.model_family.box_format, threshold, sampling.seed)
    return verdicts


def _problems(
    folders: list[str], endpoint: EndpointSettings, threshold: float, limit: int | None, absent: Collection[str]
) -> Problems:
    """The problems of the settings and of the shards; those in `absent` are still to be made."""
    problems = Problems()
    for folder in folders:
        problems += preflight.shard_problems(str(folder), "questions", absent)
    problems.require(0 <= threshold < 1, "must be in [0, 1)", threshold=threshold)
    problems.require(limit is None or limit >= 1, "must be at least 1", limit=limit)
    if own := sorted({"temperature", "seed"} & endpoint.extra_body.keys()):
        problems.append(f"endpoint.extra_body: {', '.join(own)} belong to sampling, such as sampling.temperature")
    if not endpoint.model:
        problems.append("endpoint.model='' must name the teacher")
    elif endpoint.base_url is None and not preflight.is_within(endpoint.model, absent):
        try:
            check_name(endpoint.model)
        except ModelError as error:
            problems.append(f"endpoint.{error}. A teacher behind a server needs endpoint.base_url")
    return problems


def _form(model_family: str, model: str, problems: list[str], as_trained: bool, *more: Any) -> RequestForm:
    """The form of the requests. Raises SettingsError for its own problem and for the `problems` found before."""
    try:
        trained = read_prompt_form(model) if as_trained and Path(model).is_dir() else None
        family = find_model_family("qwen2_5_vl" if trained else model_family, model)
        form = RequestForm(family, "think", *more)
        if trained and trained["style"] != form.style:
            raise ValueError(
                f"endpoint.model={model!r} was trained with style={trained['style']!r} ({PROMPT_FORM} in its folder):"
                " it writes no thinking; take a model of CoT-SFT or GRPO, or say --as_trained=false"
            )
        form = form_as_trained(form, trained, model, "--as_trained") if trained else form
    except ValueError as error:
        preflight.raise_all([*problems, str(error)])
    preflight.raise_all(problems)
    return form


def _session_text(session: Session) -> str:
    """The counts of this process, for the user."""
    counts = ", ".join(f"{kind} {number}" for kind, number in sorted(session.faults.items()))
    text = f"in this run: {session.requests} responses, failed attempts that were repeated: {counts or 'none'}"
    if session.failed:
        first = ": ".join(next(iter(session.failed.items())))
        text += f"\n{len(session.failed)} questions got no answer; the same command asks them again. First: {first}"
    return text


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make synthesize`."""
    try:
        run_cli(synthesize, spell_out(args))
    except SampleError as error:  # a question was readable when it was sent, but no longer is
        sys.exit(f"{error}. The responses are kept: repair the shards, and the same command continues with them")


if __name__ == "__main__":
    main()
