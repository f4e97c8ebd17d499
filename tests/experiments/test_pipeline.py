from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from datamodules.encoding.messages import PromptStyle
from datamodules.persistence.files import read_json
from experiments import evaluate, pipeline, train
from experiments.runs import subprocess_steps
from experiments.runs.results import read_results
from experiments.runs.subprocess_steps import Step, run_step
from tests.experiments.conftest import ROOT, Workbench


def counting_step(folder: Path, text: str = "first") -> Step:
    """A step that appends one letter to a file at each run, and depends on another file."""
    folder.mkdir(exist_ok=True)
    (folder / "input.txt").write_text(text)
    command = ("timeit", "-n1", "-r1", f"open({str(folder / 'runs')!r}, 'a').write('x')")
    return Step("step", folder / "done.json", command, (str(folder / "input.txt"),))


def test_a_step_runs_once_for_the_same_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "phase"
    first = run_step(counting_step(folder))
    assert run_step(counting_step(folder)) == first
    assert (folder / "runs").read_text() == "x"
    run_step(counting_step(folder, "second"))
    assert (folder / "runs").read_text() == "xx"


def test_a_result_that_another_has_replaced_is_not_believed(tmp_path: Path) -> None:
    step = counting_step(tmp_path / "phase")
    step = replace(step, result=tmp_path / "phase" / "result.json")
    step.result.write_text(json.dumps({"key": "the step's"}))
    run_step(step)
    run_step(step)
    assert (tmp_path / "phase" / "runs").read_text() == "x"
    step.result.write_text(json.dumps({"key": "another's"}))
    run_step(step)
    assert (tmp_path / "phase" / "runs").read_text() == "xx"


def test_the_time_of_killed_attempts_is_counted(tmp_path: Path) -> None:
    step = counting_step(tmp_path / "phase")
    (tmp_path / "phase" / "done.json").write_text(json.dumps({"key": step.key(), "done": False, "seconds": 100.0}))
    assert run_step(step) >= 100
    assert (tmp_path / "phase" / "runs").read_text() == "x", "not done: it ran again"


def test_a_step_with_faulty_settings_leaves_what_was_finished_with_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess_steps, "CLOCK_SECONDS", 0.02)  # it reads its settings for longer than that
    step = counting_step(tmp_path / "phase")
    first = run_step(step)
    with pytest.raises(SystemExit, match="step ended with exit code 1"):
        run_step(replace(step, command=("timeit", "-n1", "-r1", "1/0")))
    assert run_step(step) == first, "the time it took is not forgotten"
    assert (tmp_path / "phase" / "runs").read_text() == "x"


def test_a_failing_step_ends_the_pipeline_and_is_not_done(tmp_path: Path) -> None:
    step = Step("broken", tmp_path / "done.json", ("timeit", "-n1", "-r1", "1/0"), ())
    with pytest.raises(SystemExit, match="broken ended with exit code 1"):
        run_step(step)
    assert not read_json(tmp_path / "done.json").get("done")


def test_sigterm_is_passed_on_and_ends_the_pipeline(tmp_path: Path) -> None:
    leave = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
    child = f"import signal, sys, time; {leave}; print('up'); time.sleep(60)"
    code = (
        "import sys; from experiments.runs.subprocess_steps import run_process\n"
        f"sys.exit(run_process([sys.executable, '-u', '-c', {child!r}], lambda: None))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, "a step that saved and left with 0 was stopped all the same"
        assert time.monotonic() - start < 50
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_overrides_for_an_unknown_stage_are_named(workbench: Workbench) -> None:
    with pytest.raises(SystemExit, match="'grpoo'"):
        pipeline.run("tiny", str(workbench.model), "eval.yaml", {"grpo": "x.yaml"}, overrides={"grpoo": "--a=1"})


def test_no_training_phase_takes_the_name_of_the_first_rung(workbench: Workbench) -> None:
    with pytest.raises(SystemExit, match="'base'"):
        pipeline.run("tiny", str(workbench.model), "eval.yaml", {"base": "x.yaml"}, outputs=str(workbench.outputs))


def test_files_that_are_not_there_and_a_seed_out_of_range_are_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        pipeline.run("tiny", "model", "no_eval.yaml", {"grpo": "no_grpo.yaml"}, "no_world.yaml", outputs=str(tmp_path))
    assert all(name in str(caught.value) for name in ("no_eval.yaml", "stages.grpo='no_grpo.yaml'", "no_world.yaml"))
    (tmp_path / "a.yaml").write_text("{}")
    settings = {"experiment": "tiny", "model": "m", "evaluation": str(tmp_path / "a.yaml"), "stages": {}}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(settings | {"outputs": str(tmp_path / "outputs")}))
    for seed in ("-1", str(2**32)):
        with pytest.raises(SystemExit, match=f"seed={seed} must be in 0 to"):
            pipeline.main(["--config", str(tmp_path / "b.yaml"), f"--seed={seed}"])
    assert not (tmp_path / "outputs").exists()


def evaluation(workbench: Workbench) -> dict:
    """Settings of experiments.evaluate."""
    paths = {"model": str(workbench.model), "output": "unused"} | workbench.benchmark
    return paths | {"decoding": {"max_new_tokens": 4, "batch_prompts": 2}, "device": "cpu"}


def test_evaluation_writes_answers_and_summary_and_goes_on_from_them(workbench: Workbench, capsys) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    folder = workbench.outputs / "base"
    evaluate.main(["--config", config, "--output", str(folder)])
    summary = read_json(folder / "mig_bench.json")
    assert summary["n"] == 4 and set(summary["tasks"]) == {"diff", "reasoning"}
    answers = (folder / "predictions.jsonl").read_text()
    assert len(answers.splitlines()) == 4
    (folder / "predictions.jsonl").write_text("".join(answers.splitlines(keepends=True)[:2]))
    evaluate.main(["--config", config, "--output", str(folder)])
    assert (folder / "predictions.jsonl").read_text() == answers
    assert read_json(folder / "mig_bench.json") == summary


def test_answers_that_other_code_has_asked_for_are_asked_about(workbench: Workbench, capsys, monkeypatch) -> None:
    code = {"lightning_modules/rollouts/native/decoder.py": "1"}
    monkeypatch.setattr(evaluate, "source_code", lambda modules: dict(code))
    folder = workbench.outputs / "base"
    arguments = ["--config", workbench.write_yaml("eval", evaluation(workbench)), "--output", str(folder)]
    evaluate.main(arguments)
    answers = folder / "predictions.jsonl"
    answers.write_text(answers.read_text().replace('"id"', '"id" '))  # a mark on what is there
    marked = answers.read_text()
    code["lightning_modules/rollouts/native/decoder.py"] = "2"
    with pytest.raises(SystemExit, match=r"is finished.*\n.*lightning_modules/rollouts/native/decoder\.py\nKEEP=1"):
        evaluate.main(arguments)
    for choice in (["--keep"], []):
        evaluate.main([*arguments, *choice])
        assert answers.read_text() == marked
    evaluate.main([*arguments, "--redo"])
    assert len(answers.read_text().splitlines()) == 4 and answers.read_text() != marked
    assert (folder / "predictions.before.jsonl").read_text() == marked
    (folder / "evaluation.json").unlink()  # as an earlier version left it
    with pytest.raises(SystemExit, match="an earlier version of the project"):
        evaluate.main(arguments)


def test_a_quick_look_leaves_a_finished_evaluation_alone(workbench: Workbench, capsys) -> None:
    phase = workbench.outputs / "tiny" / "grpo"
    phase.mkdir(parents=True)
    (phase / "merged").symlink_to(workbench.model)
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    config = workbench.write_yaml("eval", settings)
    evaluate.main(["--config", config])
    files = [phase / "mig_bench.json", phase / "predictions.jsonl"]
    finished = [file.read_text() for file in files]
    evaluate.main(["--config", config, "--limit_per_task=1"])
    assert [file.read_text() for file in files] == finished
    (other,) = phase.glob("mig_bench-*")
    assert read_json(other / "mig_bench.json")["n"] == 2 and str(other) in capsys.readouterr().out
    evaluate.main(["--config", config, "--limit_per_task=1", "--output", str(phase)])
    assert read_json(phase / "mig_bench.json")["n"] == 2, "a folder that is asked for by name is replaced"


def test_an_evaluation_by_the_models_own_settings_is_another_and_named(workbench: Workbench, capsys) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    folder = workbench.outputs / "base"
    evaluate.main(["--config", config, "--output", str(folder)])
    greedy = read_json(folder / "mig_bench.json")
    evaluate.main(["--config", config, "--output", str(folder), "--generation=model"])
    own = read_json(folder / "mig_bench.json")
    assert (greedy["generation"], own["generation"]) == ("greedy", "model") and greedy["key"] != own["key"]
    assert "the model's own generation settings" in capsys.readouterr().out


def test_an_evaluation_from_before_decoding_was_stated_is_made_again(workbench: Workbench) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    whole = pipeline.Pipeline(workbench.outputs, 0, str(workbench.model), config, {}, {})
    step = whole.evaluation_of("base")
    step.marker.parent.mkdir(parents=True)
    step.result.write_text(json.dumps({"key": "k"}))
    how = step.command.index("--generation")
    assert step.command[how + 1] == "greedy"
    before = replace(step, command=step.command[:how] + step.command[how + 2 :])
    done = {"done": True, "result_key": "k", "seconds": 1.0, "code": before.code()}
    step.marker.write_text(json.dumps(done | {"key": before.key()}))
    assert before.seconds_if_done() == 1.0 and step.seconds_if_done() is None
    overrides = {"evaluation": "--generation model"}
    other = pipeline.Pipeline(workbench.outputs, 0, str(workbench.model), config, {}, overrides)
    assert other.evaluation_of("base").key() != step.key()


def test_an_evaluation_is_logged_to_the_phases_own_run(workbench: Workbench, logged: list[dict]) -> None:
    train.main(["--config", workbench.training("cot_sft")])
    phase = workbench.outputs / "tiny" / "cot_sft"
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    config = workbench.write_yaml("eval", settings)
    evaluate.main(["--config", config])
    *training, evaluated = logged
    summary = read_json(phase / "mig_bench.json")
    assert evaluated["mig_bench/avg"] == summary["avg"] and evaluated["mig_bench/diff"] == summary["tasks"]["diff"]
    assert evaluated["trainer/global_step"] == training[-1]["trainer/global_step"] + 1 == 2
    for name in ("id", "group", "job_type"):
        assert evaluated[name] == training[-1][name]
    assert len(list((phase / "wandb").glob(f"offline-run-*-{evaluated['id']}*"))) == 2
    evaluate.main(["--config", config, "--limit_per_task=1"])
    assert logged[-1] is evaluated, "a quick look is not the phase's result"


def test_a_model_without_a_phase_gets_a_run_of_its_own(workbench: Workbench, logged: list[dict]) -> None:
    folder = workbench.outputs / "tiny" / "base"
    config = workbench.write_yaml("eval", evaluation(workbench) | {"output": str(folder)})
    for more in ([], [], ["--style=answer"]):
        evaluate.main(["--config", config, *more])
    first, again, other = logged
    assert (first["group"], first["job_type"]) == ("tiny", "base")
    assert first["id"] == again["id"] != other["id"], "another evaluation is another run"


def test_a_phase_trained_without_wandb_stays_without(workbench: Workbench, logged: list[dict]) -> None:
    train.main(["--config", workbench.training("cot_sft"), "--trainer.logger=false"])
    phase = workbench.outputs / "tiny" / "cot_sft"
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    evaluate.main(["--config", workbench.write_yaml("eval", settings)])
    assert read_json(phase / "mig_bench.json")["n"] == 4 and not logged


@pytest.mark.parametrize(
    ("name", "more", "style", "labels"),
    [
        ("merged", [], PromptStyle.ANSWER, True),
        ("merged", ["--as_trained=false"], PromptStyle.THINK, False),
        ("other", [], PromptStyle.THINK, False),
    ],
)
def test_a_phases_model_is_asked_as_it_was_trained(
    workbench: Workbench, monkeypatch, capsys, name: str, more: list[str], style: PromptStyle, labels: bool
) -> None:
    phase = workbench.outputs / "tiny" / "sft"
    phase.mkdir(parents=True)
    (phase / name).symlink_to(workbench.model)
    data = {"box_format": "absolute_pixels", "style": "answer", "max_resized_pixels": 20_000, "label_images": True}
    (phase / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    asked = []

    def keep_encoder(policy, encoder, *_: object) -> str:
        asked.append(encoder)
        return "key"

    monkeypatch.setattr(evaluate, "evaluation_key", keep_encoder)
    settings = evaluation(workbench) | {"model": str(phase / name), "output": str(workbench.outputs / "apart")}
    evaluate.main(["--config", workbench.write_yaml("eval", settings), *more])
    (encoder,) = asked
    assert (encoder.style, encoder.label_images) == (style, labels)
    assert encoder.max_resized_pixels == (20_000 if labels else None)
    assert ("style=answer" in capsys.readouterr().out) == labels


def test_evaluation_names_every_wrong_path_before_weights_are_read(workbench: Workbench) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--config", config, "--model=./no/model", "--annotations=no.json", "--image_root=/no"])
    assert all(name in str(caught.value) for name in ("./no/model", "no.json", "/no"))


def test_each_model_has_an_output_folder_of_its_own() -> None:
    assert evaluate.default_output("outputs/nano/grpo/merged") == "outputs/nano/grpo"
    assert evaluate.default_output("models/nano-base") == "outputs/mig_bench/models--nano-base"
    assert evaluate.default_output("Qwen/A") != evaluate.default_output("Qwen/B")


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_runs_only_once(workbench: Workbench, capfd) -> None:
    stages = {"cot_sft": workbench.training("cot_sft"), "grpo": workbench.training("grpo")}
    settings = {"experiment": "tiny", "model": str(workbench.model), "outputs": str(workbench.outputs)}
    settings["evaluation"] = workbench.write_yaml("eval", evaluation(workbench))
    config = workbench.write_yaml("pipeline", settings | {"stages": stages})

    pipeline.main(["--config", config, "--seed=3", "--overrides.grpo=--model.beta=0.01"])
    folder = workbench.outputs / "tiny-seed3"
    found = read_results(folder / "results.json")
    assert (found.experiment, found.seed) == ("tiny-seed3", 3)
    assert [stage.name for stage in found.stages] == ["base", "cot_sft", "grpo"]
    assert all(stage.seconds > 0 and stage.mig_bench["n"] == 4 for stage in found.stages)
    assert "grpo" in (folder / "report.html").read_text()
    resolved = (folder / "grpo" / "config.yaml").read_text()
    for line in ("beta: 0.01", f"model: {folder}/cot_sft/merged", "seed_everything: 3"):
        assert line in resolved

    capfd.readouterr()
    pipeline.main(["--config", config, "--seed=3", "--overrides.grpo=--model.beta=0.01"])
    assert capfd.readouterr().out.count("done before") == 5
    assert read_results(folder / "results.json") == found
