"""Every kind of page in a real browser, on a desk and on a phone: nothing outside its card, no clipped tick, AA."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.benchmarks import mig_bench
from datamodules.metrics.drawing import PREVIEW_TEXTS
from datamodules.metrics.predictions import Reply
from datamodules.metrics.result_files import write_evaluation
from datamodules.metrics.scoring import score_replies
from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer
from experiments import compare
from experiments.inspect_shards import inspect
from experiments.reports import ablation_report, pipeline_report, sweep_plots, sweep_summary
from experiments.reports.ablation_summary import Comparison
from experiments.reports.predictions.browse_answers import write_page
from experiments.runs.command_line.run_facts import describe_machine
from experiments.runs.results import Results, make_stage, write_results
from lightning_modules.metrics.summary import summarise
from tests.experiments.phase_results import cell, summary, write_mig_bench
from tests.experiments.reports import test_ablation_report as ablation
from tests.experiments.reports import test_sweep_summary as sweep
from tests.experiments.runs.test_metrics_csv import attempt
from tests.experiments.test_compare import logged_group, write_experiment
from tests.experiments.test_inspect_shards import write_shards
from tests.page_faults import page_faults

LONG = "a_task_whose_name_is_longer_than_any_column_of_a_phone_is_wide"
TASKS = ("common_object", "object_tracking", "diff", LONG)


def write_previews(phase: Path) -> None:
    folder = phase / "previews/step_000159"
    folder.mkdir(parents=True)
    texts = []
    for number in range(3):
        Image.new("RGB", (640, 300 + 700 * number), "grey").save(folder / f"diff_{number}.png")
        text = {"task": "diff", "id": f"mig/{number}", "question": "Find it. " * 40, "result": "IoU 0.52"}
        texts.append(text | {"file": f"diff_{number}.png", "answer": '{"bbox_2d": [14,35,39,61]}' + "x" * 300})
    (folder / PREVIEW_TEXTS).write_text(json.dumps(texts))


def write_report(folder: Path) -> Path:
    """An experiment with curves of all sizes, intervals, previews, a command that is long, and a benchmark more."""
    columns = {task: cell(20.0 + number) for number, task in enumerate(TASKS)}
    stages = [make_stage(name, summary(avg, columns=columns), 60) for name, avg in (("base", 2.0), ("grpo", 36.0))]
    home = folder / "nano"
    write_results(home / "results.json", Results("nano", 1, "abc123", tuple(stages)))
    names = ["train/loss", "reward/total", "reward/a_reward_with_a_long_name", "train/learning_rate", "grpo/kl"]
    rows = [",".join([*names, "step"])]
    for step in range(160):
        values = [7 * math.exp(-step / 40), 0.02 * step, 0.5, 1e-6 * (1 + step), 1e-9 * step]
        rows.append(",".join(map(str, [*values, step])))
    attempt(home / "grpo", 0, "\n".join(rows) + "\n")
    attempt(home / "cot_sft", 0, "train/loss,train/token_accuracy,step\n3.25,0.93,79\n")
    write_mig_bench(home / "grpo", summary(36.0, columns=columns, official=official()))
    started = {"command": "python -m experiments.train --config " + "long/" * 60, "machine": describe_machine()}
    (home / "grpo/started.json").write_text(json.dumps(started | {"commit": "abc123"}))
    (home / "grpo/config.yaml").write_text("model: {class_path: x, init_args: {model: models/tiny, lora: {rank: 4}}}")
    write_previews(home / "grpo")
    return pipeline_report.write_report(home)


def official() -> dict[str, Any]:
    return {
        kind: {name: cell(1.0) for name in (*TASKS, "avg", "in_domain", "out_of_domain")}
        for kind in ("columns", "averages")
    }


def write_evaluated(folder: Path) -> Path:
    result = summary(36.0, official=official(), rule={"source": "§4.1"}, box_format="absolute_pixels")
    result["official"]["rule"] = {"reader": "mig_bench"}
    write_evaluation(folder / "eval/m/mig_bench", (), result)
    return pipeline_report.write_report(folder / "eval/m")


def write_compared(folder: Path) -> Path:
    write_shards(folder / "shards", *[BoxAnswer(0, (0.2, 0.2, 0.6, 0.6), "dog")] * 3)
    runs = [write_experiment(folder, "tiny" + "-with-a-long-name" * 3, (10.0, 30.0), 0, 0.001)]
    runs.append(write_experiment(folder, "tiny-seed1", (12.0, 36.0), 1, 0.01))
    groups = [logged_group(number) | {"id": f"s{number % 3}"} for number in range(40)]
    (runs[0] / "grpo/rollouts.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    return compare.compare(runs, folder / "compare")


def write_samples(folder: Path) -> Path:
    boxes = BoxesAnswer((BoxAnswer(0, (0.1, 0.1, 0.4, 0.5), LONG), BoxAnswer(1, (0.2, 0.2, 0.9, 0.9), "b")))
    data = write_shards(folder / "own", BoxAnswer(0, (0.9, 0.9, 1.0, 1.0), LONG), boxes, images=2)
    return inspect([str(data)], folder / "inspect.html")


def write_ablations(folder: Path) -> Path:
    folders = {}
    for seed in (0, 1):
        folders[seed] = folder / f"seed{seed}"
        for number, name in enumerate(ablation.STARTS):
            ablation.add_stage(folders[seed], name, 5 + 3 * number + seed)
    ablation_report.write(folder / "home", folders, ablation.STARTS, [Comparison("grpo", "sft", at_least=9.04)])
    return folder / "home/ablations.html"


def write_sweep(folder: Path) -> Path:
    pytest.importorskip("plotly")
    plan = sweep.read_plan(sweep.write(folder, name="nano-sweep", parameters=sweep.PARAMETERS))
    trials = sweep.made_up_trials(plan)
    sweep.summarise(plan, folder, trials)
    values = sweep_summary.page_values(folder, plan)
    assert sweep_plots.write_plots(folder / "sweep.html", plan, sweep.told(plan, trials), **values) is None
    return folder / "sweep.html"


def write_answers(folder: Path, bench: Path, name: str, shift: int) -> Path:
    """An evaluation of the tiny MIG-Bench whose boxes are moved by `shift` pixels."""
    benchmark, replies = mig_bench.load(bench), {}
    for sample in benchmark.samples:
        sizes = tuple(ImageSizes((56, 56), (56, 56)) for _ in sample.images)
        box = [round(56 * edge) + shift for edge in sample.answer.box]
        replies[sample.id] = Reply(render_answer(box, "it", "Because. " * 30), sizes, 40)
    predictions = score_replies(benchmark, benchmark.samples, replies, BoxFormat.ABSOLUTE_PIXELS)
    result = {"benchmark": "mig_bench", "model": name, "data_root": str(bench.parent), "key": "k", "limit": None}
    result |= {"generation": "greedy", "extractor": None, "dropped": {}}
    result |= summarise(predictions, benchmark.rule, benchmark.official, benchmark.averages)
    write_evaluation(folder / name / "benchmarks/mig_bench", predictions, result)
    return folder / name


PAGES: dict[str, Callable[[Path], Path]] = {
    "report": write_report,
    "report of an evaluation": write_evaluated,
    "compare": write_compared,
    "samples": write_samples,
    "ablations": write_ablations,
    "sweep": write_sweep,
}


def open_all(page: Any) -> None:
    """Open what is folded, and wait for what is loaded late."""
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.wait_for_function("[...document.images].every((image) => image.complete)")


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_has_no_fault_on_a_desk_and_on_a_phone(browser_page, tmp_path: Path, kind: str) -> None:
    browser_page.set_default_timeout(180_000)  # plotly takes long on a busy machine
    browser_page.goto(PAGES[kind](tmp_path).as_uri())
    if kind == "compare":
        browser_page.locator("#browser").scroll_into_view_if_needed()
        browser_page.wait_for_function("document.querySelectorAll('.group').length > 0")
    open_all(browser_page)
    assert page_faults(browser_page) == []


def test_the_page_of_answers_has_no_fault_either(browser_page, tmp_path: Path, tiny_world: Path) -> None:
    runs = [write_answers(tmp_path, tiny_world / "MIG-Bench", name, shift) for name, shift in (("a", 0), ("b", 30))]
    browser_page.goto(write_page(runs, tmp_path / "answers.html").as_uri())
    open_all(browser_page)
    assert browser_page.locator(".group img").count() == 8
    assert page_faults(browser_page) == []


TICKS = (
    '<figure class="chart" data-chart="lines" style="position: relative; width: 300px; height: 200px">'
    '<div class="plot" style="width: 200px; height: 150px"></div><div class="x-ticks"></div>'
    '<div class="y-ticks" style="position: absolute; left: -9px; top: 5px"><span class="tick">0.0006</span></div>'
    "</figure>"
)
BAD = {
    "outside its card": '<section><div style="margin-left: 300px; width: 1300px">wide</div></section>',
    "contrast": '<p style="color: #aaa">pale</p>',
    "text of 8px": '<p style="font-size: 8px">small</p>',
    "without alt": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "without a label": "<input>",
    "a link to nothing": '<a href="#absent">x</a>',
    "clipped tick": TICKS,
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_found(browser_page, tmp_path: Path, fault: str) -> None:
    (tmp_path / "bad.html").write_text(f"<!doctype html><meta charset=utf-8><body>{BAD[fault]}")
    browser_page.goto((tmp_path / "bad.html").as_uri())
    assert any(fault in found for found in page_faults(browser_page))


def test_a_chart_tells_its_values_to_pointer_keys_and_screen_readers(browser_page, tmp_path: Path) -> None:
    browser_page.goto(write_report(tmp_path).as_uri())
    chart = browser_page.locator("figure.chart", has_text="Reward").first
    readout, cursor = chart.locator(".readout"), chart.get_by_role("slider")
    assert readout.inner_text().startswith("step 159: reward/total 3.18, reward/a_reward_with_a_long_name 0.5")
    cursor.focus()
    for key, step in (("Home", 0), ("ArrowRight", 1), ("PageUp", 17), ("ArrowLeft", 16), ("End", 159)):
        browser_page.keyboard.press(key)
        assert readout.inner_text().startswith(f"step {step}: reward/total {0.02 * step:g},"), key
        assert cursor.get_attribute("aria-valuenow") == str(step)
    chart.locator(".plot").hover(position={"x": 1, "y": 20})
    assert readout.inner_text().startswith("step 0: reward/total 0,")
    assert "lowest" in chart.get_by_role("img").get_attribute("aria-label")
