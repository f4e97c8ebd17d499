"""`make eval` from the command line with a tiny model: processes, limits, rescoring, tables."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datamodules.checkpoints.model_folder import ModelError
from datamodules.encoding.messages import PromptStyle
from datamodules.persistence import processes as process_module
from datamodules.persistence.files import StorageError, storage_error, write_json
from datamodules.persistence.processes import ProcessLost
from datamodules.persistence.source_code import source_code
from datamodules.samples.boxes import BoxFormat
from datamodules.synthetic.benchmark_replicas import write
from experiments import evaluate, print_tables
from experiments.evaluation import ask_processes, rescore
from experiments.evaluation.ask_processes import Job, ask_all
from experiments.evaluation.choose_predictor import PolicySettings
from experiments.evaluation.evaluation_settings import MOVED, Evaluation
from experiments.runs import preflight
from lightning_modules.predictors.base import Decoding
from tests.chat_server import ChatServer, http_response, question_text


@pytest.fixture
def small_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: (folder, writer, 2) for name, (folder, writer, _) in write.REPLICAS.items()}
    monkeypatch.setattr(write, "REPLICAS", small)


def run(model: Path, root: Path, *args: str) -> Path:
    """Run the entry point; its output folder."""
    output = root / "outputs" / "eval" / "tiny"
    fixed = ["--model", str(model), "--data_root", str(root / "data"), "--output", str(output), "--replicas=true"]
    evaluate.main([*fixed, "--decoding.max_new_tokens=4", "--decoding.prompts_per_batch=3", *args])
    return output


def files(folder: Path) -> tuple[str, dict]:
    result = json.loads((folder / "result.json").read_text())
    del result["data_root"]
    return (folder / "predictions.jsonl").read_text(), result


def test_the_whole_way_to_the_tables(tiny_model_dir: Path, tmp_path: Path, small_replicas, capsys) -> None:
    output = run(tiny_model_dir, tmp_path, "--bench=lisa,revos,ref_l4,blink")
    result = json.loads((output / "blink/result.json").read_text())
    assert result["n"] == 14 and result["limit"] is None and result["official"]["rule"]["reader"] == "blink"
    assert "Jigsaw" in capsys.readouterr().out
    run(tiny_model_dir, tmp_path, "--bench=blink", "--limit=1")
    assert json.loads((output / "blink-limit1/result.json").read_text())["n"] == 7
    assert json.loads((output / "blink/result.json").read_text()) == result

    print_tables.main(["--outputs", str(tmp_path / "outputs")])
    text = (tmp_path / "outputs/tables/tables.md").read_text()
    assert text.count(f"measured: {tiny_model_dir} ({tmp_path / 'data'})") == 2  # Tables 4 and 6
    assert "Table 6" in capsys.readouterr().out

    rescore.main(["--predictions", str(output / "lisa"), "--threshold=0", "--inclusive=true"])
    everything = json.loads((output / "lisa/rescored.json").read_text())
    assert everything["averages"]["avg"]["score"] == 100.0 and everything["rule"]["threshold"] == 0.0
    rescore.main(["--predictions", str(output / "lisa")])
    again, first = (json.loads((output / "lisa" / name).read_text()) for name in ("rescored.json", "result.json"))
    assert again == first


def test_the_models_own_settings_have_results_of_their_own(
    tiny_model_dir: Path, tmp_path: Path, small_replicas
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}))
    output = run(model, tmp_path, "--bench=blink")
    before = files(output / "blink")
    run(model, tmp_path, "--bench=blink", "--decoding.generation=model")
    assert files(output / "blink") == before
    texts, result = files(output / "blink-model-generation")
    assert (before[1]["generation"], result["generation"]) == ("greedy", "model") and result["key"] != before[1]["key"]
    assert texts != before[0]
    print_tables.main(["--outputs", str(tmp_path / "outputs")])
    text = (tmp_path / "outputs/tables/tables.md").read_text()
    label = f"measured: {model} ({tmp_path / 'data'})"
    assert f"{label} |" in text and f"{label}, the model's own generation settings |" in text


def test_answers_of_other_source_files_are_asked_about(
    tiny_model_dir: Path, tmp_path: Path, small_replicas, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    output = run(tiny_model_dir, tmp_path, "--bench=blink")
    first = files(output / "blink")
    capsys.readouterr()
    run(tiny_model_dir, tmp_path, "--bench=blink")
    assert files(output / "blink") == first, "the same code finds its answers again"

    edited = source_code(("experiments.evaluate",)) | {"datamodules/samples/choice_text.py": "edited"}
    monkeypatch.setattr(evaluate, "source_code", lambda entries: edited)
    asked = r"(?s)finished.*changed since: datamodules/samples/choice_text\.py[^/]*KEEP=1.*REDO=1"
    with pytest.raises(SystemExit, match=asked) as caught:
        run(tiny_model_dir, tmp_path, "--bench=blink")
    assert str(caught.value).count("\n") <= 4
    assert files(output / "blink") == first, "nothing is moved before that is said"
    run(tiny_model_dir, tmp_path, "--bench=blink", "--keep")
    run(tiny_model_dir, tmp_path, "--bench=blink")  # is not asked again
    assert [path.name for path in output.glob("answers.*")] == []
    run(tiny_model_dir, tmp_path, "--bench=blink", "--redo")
    assert len(list(output.glob("answers.*"))) == 1 and files(output / "blink") == first


def test_a_mode_that_wandb_does_not_have_is_told_before_the_model_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(preflight.SettingsError, match="WANDB_MODE='ofline' must be online, offline or disabled"):
        evaluate.evaluate(Evaluation(str(tmp_path), str(tmp_path), bench="lisa"))


def test_an_evaluation_that_was_stopped_before_its_first_answer_can_be_made_again(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation.json", {"code": {"experiments/evaluate.py": "other"}})
    evaluate._settle_answers(tmp_path, "redo", [])
    assert json.loads((tmp_path / "evaluation.json").read_text())["code"] == source_code(("experiments.evaluate",))


def test_an_error_of_the_user_in_one_of_several_processes_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> Iterator[ask_processes.Asked]:
        yield ask_processes.Asked("blink", 1)
        raise full

    full = storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "outputs/answers/rank1.jsonl")
    monkeypatch.setattr(ask_processes, "ask_rank", fail)
    monkeypatch.setattr(ask_processes, "end_with_parent", lambda: None)
    monkeypatch.setattr(ask_processes.signal, "signal", lambda *_: None)
    messages: queue.Queue = queue.Queue()
    threads = torch.get_num_threads()
    try:
        ask_processes._work(None, 1, 2, messages)
    finally:
        torch.set_num_threads(threads)
    assert messages.get() == ask_processes.Asked("blink", 1)
    told = pickle.loads(pickle.dumps(messages.get()))  # as it reaches the first process
    assert isinstance(told, StorageError) and str(told) == str(full)


def test_every_missing_file_is_named_before_weights_are_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(preflight.SettingsError, match=r"(?s)ref_l4: .*ref-l4-val.*lisa: .*val"):
        evaluate.evaluate(Evaluation(str(tiny_model_dir), str(tmp_path), bench="ref_l4,lisa"))
    (tmp_path / "data/BLINK").mkdir(parents=True)
    with pytest.raises(SystemExit, match="BLINK was not made here"):
        run(tiny_model_dir, tmp_path, "--bench=blink")
    with pytest.raises(SystemExit, match=r"bench='blnk' must be all or some of .*blink"):
        run(tiny_model_dir, tmp_path, "--bench=blnk")
    with pytest.raises(SystemExit, match="processes=0"):
        run(tiny_model_dir, tmp_path, "--processes=0")


def test_a_served_models_lost_question_is_counted_and_asked_again(tmp_path: Path, small_replicas, capsys) -> None:
    silent = {"blink": 1}  # questions of a benchmark that get no answer

    def reply(request: dict) -> str | bytes:
        text = question_text(request)
        if "Which colour" not in text and (text in lost or len(lost) < silent["blink"]):
            lost.add(text)
            return http_response(500, b"{}")
        return "A"

    lost: set[str] = set()
    with ChatServer(reply) as server:
        patience = ("--endpoint.attempts=1", "--endpoint.concurrency=1")
        served = ("--bench=blink", f"--endpoint.base_url={server.base_url}", "--form.model_family=internvl", *patience)
        output = run(Path("some-model"), tmp_path, *served)
        result = json.loads((output / "blink/result.json").read_text())
        assert result["n"] == 14 and result["failures"] == {"unanswered": 1}
        assert "unanswered 1" in capsys.readouterr().out
        lost.clear()
        silent["blink"] = 0
        run(Path("some-model"), tmp_path, *served)
        assert json.loads((output / "blink/result.json").read_text())["failures"] == {}
        silent["blink"] = 99
        with pytest.raises(SystemExit, match="blink: 8 questions got no answer"):
            run(Path("another"), tmp_path, *served)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_model_dir: Path, tmp_path: Path, small_replicas) -> None:
    how = ("--bench=blink,mmiu", "--decoding.prompts_per_batch=1")  # chunks of four questions
    one = run(tiny_model_dir, tmp_path / "one", *how)
    two = run(tiny_model_dir, tmp_path / "two", *how, "--processes=2")
    for name in ("blink", "mmiu"):
        assert files(one / name) == files(two / name)
        (folder,) = (two / "answers").glob(f"{name}-*")
        ids = [json.loads(line)["id"] for file in folder.glob("rank*.jsonl") for line in file.read_text().splitlines()]
        assert len(ids) == len(set(ids)) == json.loads((two / name / "result.json").read_text())["n"]
        assert all((folder / f"rank{rank}.jsonl").stat().st_size for rank in range(2))


@pytest.mark.parametrize(
    ("signum", "why"), [(signal.SIGSTOP, r"was stopped \(SIGSTOP\)"), (signal.SIGKILL, "was killed by signal 9")]
)
def test_a_process_that_is_stopped_or_killed_ends_the_evaluation(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch, signum, why
) -> None:
    monkeypatch.setattr(process_module, "STOPPED_SECONDS", 2.0)

    def disturb() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.05)
        os.kill(workers[0].pid, signum)

    threading.Thread(target=disturb).start()
    prompts = {"box_format": BoxFormat.ABSOLUTE_PIXELS, "style": PromptStyle.THINK, "max_prompt_tokens": 2048}
    settings = PolicySettings(str(tiny_model_dir), prompts, Decoding(), "float32", "cpu")
    job = Job(settings, (), str(tmp_path), str(tmp_path), None)  # without questions, the other process just ends
    with pytest.raises(ProcessLost, match=rf"process \d of 2 {why}"):
        list(ask_all(job, {}, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ({}, RuntimeError, r"(?s)process \d of 2 failed:.*TypeError"),
        ({"box_format": "absolute_pixels", "style": "think", "max_prompt_tokens": 10}, ModelError, "no folder .*none"),
    ],
)
def test_a_failing_process_ends_the_evaluation_with_its_error(tmp_path: Path, prompts, error, words: str) -> None:
    settings = PolicySettings(str(tmp_path / "none"), prompts, Decoding(), "float32", "cpu")
    with pytest.raises(error, match=words):
        list(ask_all(Job(settings, ("lisa",), str(tmp_path), str(tmp_path), None), {"lisa": 1}, 2))


def test_every_old_name_is_answered_with_the_new_one(tmp_path: Path) -> None:
    config = tmp_path / "old.yaml"
    config.write_text("model: m\nannotations: a.json\nimage_root: data\nstyle: think\nform: {box_format: unit}\n")
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--config", str(config), "--generation=model", "--max_prompt_tokens", "10", "--limits.x=1"])
    text = str(caught.value)
    for name in ("annotations", "image_root", "style", "generation", "max_prompt_tokens"):
        assert f"{name}: write " in text and MOVED[name] in text
    assert "box_format" not in text and "x:" not in text, "these stand where they belong"
    for old, new in (("--twins=true", "replicas"), ("--limit_per_task=3", "limit")):
        with pytest.raises(SystemExit, match=f"has been renamed. Write {new} instead"):
            evaluate.main(["--model=m", f"--data_root={tmp_path}", old])
