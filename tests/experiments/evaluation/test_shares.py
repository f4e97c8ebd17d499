from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from callbacks import mig_bench
from callbacks.evaluation import EvaluationSettings
from datamodules.benchmarks.mig_bench import load_mig_bench
from datamodules.persistence import processes as process_module
from datamodules.persistence.files import Journal
from datamodules.persistence.processes import ProcessLost
from experiments import evaluate
from experiments.evaluation.shares import Asking, OtherProcesses, joined_journal
from experiments.runs import preflight
from tests.experiments.conftest import Workbench


def settings(workbench: Workbench, **more: object) -> dict:
    decoding = {"max_new_tokens": 4, "batch_prompts": 2}
    return {"model": str(workbench.model), "device": "cpu", "decoding": decoding} | workbench.benchmark | more


def test_two_processes_answer_as_one_does(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mig_bench, "BATCHES_PER_CALL", 1)  # two windows of two questions
    answers = {}
    for processes in (1, 2):
        folder = workbench.outputs / str(processes)
        config = workbench.write_yaml("eval", settings(workbench, processes=processes, output=str(folder)))
        evaluate.main(["--config", config])
        answers[processes] = (folder / "predictions.jsonl").read_text().splitlines()
        assert not list(folder.glob("predictions-*")), "what others have answered is joined"
    assert len(answers[1]) == 4 and sorted(answers[2]) == sorted(answers[1])
    assert " 0/2 " in capfd.readouterr().err  # the bar of a process that was left two of the four


def test_answers_that_a_kill_left_with_other_processes_are_kept_once(tmp_path: Path) -> None:
    Journal(tmp_path / "predictions.jsonl", "key").append([{"id": "a"}])
    Journal(tmp_path / "predictions-rank1.jsonl", "key").append([{"id": "a"}, {"id": "b"}])  # joined, not yet removed
    Journal(tmp_path / "predictions-rank2.jsonl", "another model's").append([{"id": "c"}])
    joined = joined_journal(tmp_path, "key")
    assert joined.records == [{"id": "a"}, {"id": "b"}]
    assert [json.loads(line) for line in joined.path.read_text().splitlines()] == joined.records
    assert not list(tmp_path.glob("predictions-*"))


def test_a_process_that_fails_is_named(workbench: Workbench, tmp_path: Path) -> None:
    samples, _ = load_mig_bench(*workbench.benchmark.values())
    decoding = EvaluationSettings(max_new_tokens=4)
    asking = Asking(str(tmp_path / "no-model"), "float32", "cpu", {}, str(workbench.root), decoding)
    with OtherProcesses(1) as others:
        others.ask(asking, [samples], tmp_path, "key")
        with pytest.raises(RuntimeError, match="process 1 ended with exit code 1"):
            others.wait()


def test_a_process_that_was_killed_before_it_was_asked_is_named(tmp_path: Path) -> None:
    asking = Asking("model", "float32", "cpu", {}, "images", EvaluationSettings())
    with OtherProcesses(1) as others:
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()
        others.ask(asking, [[]], tmp_path, "key")
        with pytest.raises(RuntimeError, match="process 1 was killed by signal 9"):
            others.wait()


def test_a_process_that_is_stopped_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "STOPPED_SECONDS", 2.0)
    with OtherProcesses(1) as others:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(ProcessLost, match=r"process 1 was stopped \(SIGSTOP\)"):
            others.wait()


def test_a_stopped_process_does_not_hold_up_the_end() -> None:
    with OtherProcesses(1):
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
    assert not worker.is_alive()


def test_fewer_processes_than_one_are_refused(workbench: Workbench) -> None:
    with pytest.raises(preflight.SettingsError, match="processes=0"):
        evaluate.evaluate(**settings(workbench, processes=0))
