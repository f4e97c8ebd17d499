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
from experiments.evaluation.choose_predictor import make_predictor
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


def test_ctrl_c_waits_for_the_step_also_while_its_clock_is_written(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(subprocess_steps, "CLOCK_SECONDS", 0.05)
    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 1:
            raise KeyboardInterrupt

    code = subprocess_steps.run_process([sys.executable, "-c", "import time; time.sleep(0.5); print('saved')"], tick)
    assert code == 128 + signal.SIGTERM and "the step saves what it has" in capsys.readouterr().out
    assert len(ticks) > 1, "it has waited"


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
    paths = {"model": str(workbench.model), "output": "unused", "data_root": str(workbench.root)}
    return paths | {"decoding": {"max_new_tokens": 4, "prompts_per_batch": 2}, "device": "cpu"}


def journal(folder: Path) -> Path:
    (file,) = folder.glob("answers/mig_bench-*/rank0.jsonl")
    return file


def test_evaluation_writes_answers_and_summary_and_goes_on_from_them(workbench: Workbench, capsys) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    folder = workbench.outputs / "base" / "benchmarks"
    evaluate.main(["--config", config, "--output", str(folder)])
    result = read_json(folder / "mig_bench/result.json")
    assert result["n"] == 4 and set(result["columns"]) == {"diff", "reasoning"} and result["version"] == 2
    answers = journal(folder).read_text()
    assert len(answers.splitlines()) == 4
    journal(folder).write_text("".join(answers.splitlines(keepends=True)[:2]) + '{"id": "mig_be')  # killed
    evaluate.main(["--config", config, "--output", str(folder)])
    assert sorted(set(journal(folder).read_text().splitlines())) == sorted(answers.splitlines())
    assert read_json(folder / "mig_bench/result.json") == result


def test_answers_that_other_code_has_asked_for_are_asked_about(workbench: Workbench, capsys, monkeypatch) -> None:
    code = {"lightning_modules/rollouts/native/decoder.py": "1"}
    monkeypatch.setattr(evaluate, "source_code", lambda modules: dict(code))
    folder = workbench.outputs / "base" / "benchmarks"
    arguments = ["--config", workbench.write_yaml("eval", evaluation(workbench)), "--output", str(folder)]
    evaluate.main(arguments)
    answers = journal(folder)
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
    (old,) = folder.glob("answers.*/mig_bench-*/rank0.jsonl")
    assert old.read_text() == marked
    (folder / "evaluation.json").unlink()  # as an earlier version left it
    with pytest.raises(SystemExit, match="an earlier version of the project"):
        evaluate.main(arguments)


def test_other_settings_and_a_quick_look_leave_a_finished_evaluation_alone(workbench: Workbench, capsys) -> None:
    phase = workbench.outputs / "tiny" / "grpo"
    phase.mkdir(parents=True)
    (phase / "merged").symlink_to(workbench.model)
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    config = workbench.write_yaml("eval", settings)
    evaluate.main(["--config", config])
    home = phase / "benchmarks"
    files = [home / "mig_bench" / name for name in ("result.json", "predictions.jsonl")]
    finished = [file.read_text() for file in files]
    evaluate.main(["--config", config, "--limit=1"])
    assert read_json(home / "mig_bench-limit1/result.json")["n"] == 2
    capsys.readouterr()
    evaluate.main(["--config", config, "--decoding.max_new_tokens=3"])
    assert [file.read_text() for file in files] == finished
    key = read_json(next(home.glob("mig_bench-????????????????/result.json")))["key"]
    assert f"this one goes to {home / f'mig_bench-{key}'}" in capsys.readouterr().out
    evaluate.main(["--config", config, "--decoding.max_new_tokens=3", "--output", str(home)])
    assert read_json(files[0])["key"] == key, "a folder that is asked for by name is replaced"


def test_an_evaluation_by_the_models_own_settings_is_another_and_named(workbench: Workbench, capsys) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    folder = workbench.outputs / "base"
    evaluate.main(["--config", config, "--output", str(folder)])
    greedy = read_json(folder / "mig_bench/result.json")
    evaluate.main(["--config", config, "--output", str(folder), "--decoding.generation=model"])
    own = read_json(folder / "mig_bench-model-generation/result.json")
    assert (greedy["generation"], own["generation"]) == ("greedy", "model") and greedy["key"] != own["key"]
    assert "the model's own generation settings" in capsys.readouterr().out


def make_pipeline(workbench: Workbench, config: str, more: str = "") -> pipeline.Pipeline:
    overrides = {"evaluation": more} if more else {}
    return pipeline.Pipeline(workbench.outputs, 0, str(workbench.model), config, {}, overrides)


@pytest.mark.parametrize(
    ("more", "folder"),
    [
        ("", "mig_bench"),
        ("--decoding.generation model", "mig_bench-model-generation"),
        ("--limit 1 --device cpu", "mig_bench-limit1"),
    ],
)
def test_a_pipeline_finds_the_result_wherever_its_overrides_put_it(
    workbench: Workbench, more: str, folder: str
) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    step = make_pipeline(workbench, config, more).evaluation_of("base")
    step.marker.parent.mkdir(parents=True)
    evaluate.main(list(step.command[1:]))
    assert step.result == workbench.outputs / "base/benchmarks" / folder / "result.json" and step.result.is_file()
    stage = make_pipeline(workbench, config, more)._found("base", 1.0)
    assert stage.mig_bench["n"] == (2 if "limit" in folder else 4) and stage.mig_bench["tasks"].keys() == {
        "diff", "reasoning",
    }  # fmt: skip


def test_wrong_settings_of_the_evaluation_end_a_pipeline_before_anything_runs(workbench: Workbench) -> None:
    old = evaluation(workbench) | {"annotations": "a.json", "limit_per_task": 3}
    with pytest.raises(SystemExit, match=r"(?s)annotations: write data_root.*limit_per_task: write limit"):
        make_pipeline(workbench, workbench.write_yaml("eval", old))
    config = workbench.write_yaml("eval", evaluation(workbench))
    with pytest.raises(SystemExit, match=r"decoding\.length"):
        make_pipeline(workbench, config, "--decoding.length=3")


def test_an_evaluation_is_logged_to_the_phases_own_run(workbench: Workbench, logged: list[dict]) -> None:
    train.main(["--config", workbench.training("cot_sft")])
    phase = workbench.outputs / "tiny" / "cot_sft"
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    config = workbench.write_yaml("eval", settings)
    evaluate.main(["--config", config])
    *training, evaluated = logged
    result = read_json(phase / "benchmarks/mig_bench/result.json")
    assert evaluated["mig_bench/avg"] == result["averages"]["avg"]["score"]
    assert evaluated["mig_bench/diff"] == result["columns"]["diff"]["score"]
    assert evaluated["mig_bench/format_rate"] == result["format_rate"] and len(evaluated["previews"].data) == 2
    assert evaluated["trainer/global_step"] == training[-1]["trainer/global_step"] + 1 == 2
    for name in ("id", "group", "job_type"):
        assert evaluated[name] == training[-1][name]
    assert len(list((phase / "wandb").glob(f"offline-run-*-{evaluated['id']}*"))) == 2
    evaluate.main(["--config", config, "--limit=1"])
    evaluate.main(["--config", config, "--decoding.max_new_tokens=3"])
    assert logged[-1] is evaluated, "a quick look is not the phase's result, nor is one with other settings"


def test_a_model_without_a_phase_gets_a_run_of_its_own(workbench: Workbench, logged: list[dict]) -> None:
    folder = workbench.outputs / "tiny" / "base" / "benchmarks"
    config = workbench.write_yaml("eval", evaluation(workbench) | {"output": str(folder)})
    for more in ([], [], ["--form.style=answer"]):
        evaluate.main(["--config", config, *more])
    first, again, other = logged
    assert (first["group"], first["job_type"]) == ("tiny", "base")
    assert first["id"] == again["id"] != other["id"], "another evaluation is another run"


def test_a_phase_trained_without_wandb_stays_without(workbench: Workbench, logged: list[dict]) -> None:
    train.main(["--config", workbench.training("cot_sft"), "--trainer.logger=false"])
    phase = workbench.outputs / "tiny" / "cot_sft"
    settings = evaluation(workbench) | {"model": str(phase / "merged"), "output": None}
    evaluate.main(["--config", workbench.write_yaml("eval", settings)])
    assert read_json(phase / "benchmarks/mig_bench/result.json")["n"] == 4 and not logged


@pytest.mark.parametrize(
    ("name", "more", "style", "labels"),
    [
        ("merged", [], PromptStyle.ANSWER, True),
        ("merged", ["--form.as_trained=false"], PromptStyle.THINK, False),
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
    monkeypatch.setattr(evaluate, "ask_all", lambda job, *_: asked.append(job.settings) or ())
    settings = evaluation(workbench) | {"model": str(phase / name), "output": str(workbench.outputs / "apart")}
    evaluate.main(["--config", workbench.write_yaml("eval", settings), *more])
    encoder = make_predictor(*asked).encoder
    assert (encoder.style, encoder.label_images) == (style, labels)
    assert encoder.max_resized_pixels == (20_000 if labels else None)
    assert ("style=answer" in capsys.readouterr().out) == labels


def test_evaluation_names_every_wrong_path_before_weights_are_read(workbench: Workbench) -> None:
    config = workbench.write_yaml("eval", evaluation(workbench))
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--config", config, "--model=./no/model", "--data_root=/no", "--bench=mig_bench,lisa"])
    assert all(name in str(caught.value) for name in ("./no/model", "/no/MIG-Bench/MIG_data.json", "lisa: "))
    assert str(caught.value).count("\n") <= 4


def test_each_model_has_an_output_folder_of_its_own() -> None:
    assert evaluate.default_output("outputs/nano/grpo/merged") == "outputs/nano/grpo/benchmarks"
    assert evaluate.default_output("models/nano-base") == "outputs/eval/models--nano-base"
    assert evaluate.default_output("Qwen/A") != evaluate.default_output("Qwen/B")


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_runs_only_once(workbench: Workbench, capfd) -> None:
    stages = {"cot_sft": workbench.training("cot_sft"), "grpo": workbench.training("grpo")}
    settings = {"experiment": "tiny", "model": str(workbench.model), "outputs": str(workbench.outputs)}
    settings["evaluation"] = workbench.write_yaml("eval", evaluation(workbench))
    config = workbench.write_yaml("pipeline", settings | {"stages": stages})

    pipeline.main(["--config", config, "--seed=3", "--overrides.grpo=--model.loss.kl_beta=0.01"])
    folder = workbench.outputs / "tiny-seed3"
    found = read_results(folder / "results.json")
    assert (found.experiment, found.seed) == ("tiny-seed3", 3)
    assert [stage.name for stage in found.stages] == ["base", "cot_sft", "grpo"]
    assert all(stage.seconds > 0 and stage.mig_bench["n"] == 4 for stage in found.stages)
    assert "grpo" in (folder / "report.html").read_text()
    resolved = (folder / "grpo" / "config.yaml").read_text()
    for line in ("kl_beta: 0.01", f"model: {folder}/cot_sft/merged", "seed_everything: 3"):
        assert line in resolved
    for stage in found.stages[1:]:
        card = (folder / stage.name / "merged" / "README.md").read_text()
        assert f"| avg | {stage.mig_bench['avg']:.2f} |" in card

    capfd.readouterr()
    pipeline.main(["--config", config, "--seed=3", "--overrides.grpo=--model.loss.kl_beta=0.01"])
    assert capfd.readouterr().out.count("done before") == 5
    assert read_results(folder / "results.json") == found
