from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from datamodules.metrics.result_files import write_evaluation
from experiments.reports import pipeline_report
from experiments.runs import run_identity
from experiments.runs.results import Results, make_stage, read_results, write_results
from tests.experiments.phase_results import summary, write_mig_bench
from tests.experiments.runs.test_metrics_csv import attempt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stages = [make_stage(name, summary(avg), 60) for name, avg in (("base", 11.0), ("cot_sft", 26.5), ("grpo", 32.25))]
    write_results(tmp_path / "results.json", Results("nano <x>", 1, "abc123", tuple(stages)))
    attempt(tmp_path / "grpo", 0, "reward/total,reward/short,reward/short/std,step\n0.5,0.1,0.3,0\n0.75,0.2,0.3,1\n")
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    for step in ("step_000010", "step_000020"):
        (tmp_path / "grpo" / "previews" / step).mkdir(parents=True)
        (tmp_path / "grpo" / "previews" / step / f"{step}_example.png").write_bytes(image.getvalue())
    return tmp_path


def test_the_page_holds_the_stages_curves_and_pictures(folder: Path) -> None:
    page = pipeline_report.write_report(folder).read_text()
    for text in ("26.50", "+15.50", "32.25", "+5.75", "abc123", "nano &lt;x&gt;", "data:image/png;base64,", "Reward"):
        assert text in page
    assert "<svg" in page and "no_box" in page
    assert "reward/short" in page and "reward/short/std" not in page, "every reward by its name"
    assert "step_000020_example" in page and "step_000010_example" not in page


def test_the_page_tells_the_commit_of_the_training_from_the_last_commands(folder: Path) -> None:
    run_identity.claim(folder / "grpo", "key", commit="def456")
    assert "Last command at commit abc123; trained: grpo at def456." in pipeline_report.render_report(folder)


def test_a_stage_has_a_gain_only_over_the_stage_of_its_own_experiment_that_it_was_trained_from(folder: Path) -> None:
    def rows(model: str) -> dict[str, list[str]]:
        settings = {"experiment": "nano", "model": {"init_args": {"model": model}}}
        (folder / "grpo/config.yaml").write_text(yaml.safe_dump(settings))
        results = read_results(folder / "results.json")
        found = pipeline_report.stage_rows(results, pipeline_report.stage_starts(folder, results))
        return {row[0]: row[2:4] for row in found}

    assert rows("outputs/nano/cot_sft/merged")["grpo"] == ["+5.75", "cot_sft"], "also where the folder was renamed"
    assert rows("models/nano-base")["grpo"] == ["+21.25", "base"]
    assert rows("outputs/other/cot_sft/merged")["grpo"] == ["", ""], "its own cot_sft is another model"
    assert rows("merged")["grpo"] == ["", ""]


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    page = pipeline_report.render_report(folder)
    links = re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page) + re.findall(
        r"url\(|@import|<script src|<link(?! rel=\"icon\" href=\"data:)", page
    )
    assert links == []


def test_the_terminal_table_is_aligned(folder: Path) -> None:
    lines = pipeline_report.stage_text(read_results(folder / "results.json")).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[:3] == ["grpo", "32.25", "+5.75"]


def test_a_half_finished_experiment_is_reported_as_far_as_it_went(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", Results("nano", 0, "abc"))
    assert "Pipeline" in pipeline_report.render_report(tmp_path)


def test_phases_that_were_trained_and_evaluated_alone_are_reported(tmp_path: Path) -> None:
    """What make sft, make grpo and make eval leave, without results.json."""
    home = tmp_path / "outputs/nano"
    attempt(home / "cot_sft", 0, "train/loss,step\n2.0,0\n1.0,1\n")
    (home / "cot_sft/config.yaml").write_text("model: {init_args: {model: models/tiny}}")
    (home / "cot_sft/started.json").write_text('{"command": "python -m experiments.train --config a.yaml"}')
    page = pipeline_report.render_report(home)
    assert "No phase was evaluated" in page and "train/loss" in page and "experiments.train --config a.yaml" in page
    merged = home / "cot_sft/merged"
    attempt(home / "grpo", 0, "reward/total,step\n0.5,0\n")
    (home / "grpo/config.yaml").write_text(f"model: {{init_args: {{model: {merged}}}}}")
    for number, (phase, average) in enumerate((("cot_sft", 20.0), ("grpo", 32.0))):
        write_mig_bench(home / phase, summary(average))
        os.utime(home / phase / "config.yaml", (number, number))
    write_evaluation(home / "grpo/benchmarks/blink-limit2", (), summary(77.7, benchmark="blink", limit=2))
    page = pipeline_report.render_report(home)
    assert "+12.00" in page and "blink-limit2" in page and "77.70" in page
    assert "At most 2 questions of each column were asked." in page


def test_an_evaluation_alone_is_reported_and_the_latest_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs"
    attempt(outputs / "nano/grpo", 0, "reward/total,step\n0.5,0\n")
    write_evaluation(outputs / "eval/models--m/ref_l4", (), summary(12.34, benchmark="ref_l4"))
    (outputs / "eval/models--m/evaluation.json").write_text('{"command": "python -m experiments.evaluate --model m"}')
    os.utime(outputs / "nano/grpo", (1, 1))
    pipeline_report.main(["--outputs", str(outputs)])
    assert f"wrote {outputs / 'eval/models--m/report.html'}" in capsys.readouterr().out
    page = (outputs / "eval/models--m/report.html").read_text()
    assert "12.34" in page and "experiments.evaluate --model m" in page


def test_every_image_of_an_answer_is_shown_with_its_texts(folder: Path) -> None:
    texts = [{"file": "step_000020_example.png", "task": "diff", "id": "mig/7", "question": "Where is <it>?"}]
    step = folder / "grpo/previews/step_000020"
    (step / "previews.json").write_text(json.dumps([texts[0] | {"answer": "here", "result": "IoU 0.52"}]))
    page = pipeline_report.render_report(folder)
    assert "Where is &lt;it&gt;?" in page and "IoU 0.52" in page and "mig/7" in page


def test_official_scores_that_mean_nothing_are_left_out_and_the_page_says_so(folder: Path) -> None:
    official = {kind: summary()[kind] for kind in ("columns", "averages")} | {"rule": {"reader": "mig_bench"}}
    for box_format, is_shown in (("relative_1000", True), ("absolute_pixels", False)):
        write_mig_bench(folder / "grpo", summary(32.25, official=official, box_format=box_format))
        page = pipeline_report.render_report(folder)
        assert ('<th scope="col">official</th>' in page) == is_shown == ("official scores are left out" not in page)


def test_a_missing_experiment_is_a_short_error(tmp_path: Path) -> None:
    (tmp_path / "outputs/other/grpo/benchmarks").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no report: --folder=.*/absent has neither .* There is: .*/outputs/other$"):
        pipeline_report.main(["--folder", str(tmp_path / "outputs/absent")])
    with pytest.raises(SystemExit, match="`make sft` and `make eval` make one"):
        pipeline_report.main(["--outputs", str(tmp_path / "empty")])


def test_a_phase_whose_last_answer_was_cut_short_is_no_obstacle(folder: Path) -> None:
    (folder / "grpo" / "predictions.jsonl").write_text('{"id": "diff/1", "task": "di')
    assert "Pipeline" in pipeline_report.render_report(folder)


def test_a_stage_of_another_version_is_told_with_file_and_field(folder: Path) -> None:
    (folder / "grpo" / "config.yaml").write_text("model: {init_args: {path: models/tiny}}")
    wanted = r"grpo/config.yaml was written by another version of the project: it has no field model.init_args.model"
    with pytest.raises(SystemExit, match=wanted):
        pipeline_report.main(["--folder", str(folder)])
