"""`make compare`: two small experiments with a log of 3,000 groups become a page, which a real browser opens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from datamodules.samples.answer_text import render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.streaming.shard_writer import ShardWriter
from experiments import compare
from experiments.reports.compare_page import stage_rows
from experiments.reports.drawing.templates import script_json
from experiments.reports.find_runs import config_differences, find_runs, flatten
from experiments.reports.rollout_pages import GROUPS_PER_CHUNK, thin
from experiments.runs.results import Results, make_stage, write_results
from lightning_modules.rl.rollout_log import RolloutLog
from tests.datamodules.encoding.tiny_processor import make_sample
from tests.experiments.phase_results import summary, write_mig_bench
from tests.experiments.runs.test_metrics_csv import attempt

NUM_GROUPS, NUM_SAMPLES = 3000, 8
TASKS = ("diff", "region", "reasoning")
HOSTILE = (
    "</script><script>alert('script')</script>",
    "<img src=x onerror=alert('image')>",
    "<think><b>bold</b> \u2028 & <svg onload=alert('svg')></think><answer>```json\n"
    '{"bbox_2d": [14, 14, 42, 56], "label": "</script><img src=x onerror=alert(1)>"}\n```</answer>',
)


def logged_group(number: int) -> dict:
    """Group `number` of the run: two to an update, a third all equal, the first with hostile completions."""
    equal = number % 3 == 0
    fair = '<think>It is there.</think><answer>```json\n{"bbox_2d": [0, 0, 28, 28], "label": "dog"}\n```</answer>'
    texts = list(HOSTILE) if number == 0 else [fair, f"group {number}: no box", ""]
    totals = [0.5, 0.5, 0.5] if equal else [1.5, number / NUM_GROUPS, 0.0]
    return {
        "update": number // 2,
        "batch": number // 2,
        "id": f"pool/{number % NUM_SAMPLES}" if number else HOSTILE[1],
        "task": TASKS[number % len(TASKS)],
        "answer": {"image": 1, "box": [0.25, 0.25, 0.75, 1.0], "label": "dog"},
        "sizes": [[56, 56, 56, 56], [84, 56, 84, 56]],
        "texts": texts,
        "rewards": [{"total": t, "accuracy": t / 2, "short": 0.25, "failure": "no_json"} for t in totals],
        "advantages": [0.0] * 3 if equal else [1.0, 0.0, -1.0],
        ("equal" if number % 2 else "zero_advantage"): equal,  # its name in logs of earlier versions
    }


def write_experiment(root: Path, name: str, averages: tuple[float, ...], seed: int, beta: float) -> Path:
    """base and grpo, evaluated; grpo with settings, curves and a shard folder that it was trained from."""
    folder = root / name
    stages = [make_stage(phase, summary(avg), 1) for phase, avg in zip(("base", "grpo"), averages, strict=True)]
    write_results(folder / "results.json", Results(name, seed, "abc123", tuple(stages)))
    for stage in stages:
        write_mig_bench(folder / stage.name, summary(stage.mig_bench["avg"]))
    attempt(folder / "grpo", 0, "reward/total,grpo/kl,step\n0.5,0.1,0\n0.75,0.2,1\n")
    arguments = {"model": "models/tiny", "loss": {"kl_beta": beta}, "rollout": {"log": "rollouts.jsonl"}}
    settings = {
        "seed_everything": seed,
        "experiment": name,
        "model": {"class_path": "lightning_modules.grpo.GRPO", "init_args": arguments},
        "data": {"box_format": "absolute_pixels", "shards": str(root / "shards")},
        "trainer": {"callbacks": [{"class_path": "callbacks.throughput.Throughput", "init_args": {"every": seed}}]},
    }
    (folder / "grpo" / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


@pytest.fixture
def experiments(tmp_path: Path) -> list[Path]:
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(NUM_SAMPLES):
            writer.add(make_sample(f"pool/{number}"))
    first = write_experiment(tmp_path, "tiny", (10.0, 30.0), 0, 0.001)
    second = write_experiment(tmp_path, "tiny-seed1", (12.0, 36.0), 1, 0.01)
    log = RolloutLog(first / "grpo" / "rollouts.jsonl")
    log.append(logged_group(number) for number in range(NUM_GROUPS))
    return [first, second]


def test_the_stages_have_mean_and_spread_over_seeds(experiments: list[Path]) -> None:
    rows = stage_rows(find_runs(experiments))
    assert [row[:6] for row in rows[1:]] == [
        ["tiny", "base", "2", "11.00 ± 1.41", "", ""],
        ["tiny", "grpo", "2", "33.00 ± 4.24", "+22.00 ± 2.83", "base"],
    ]


def test_a_gain_is_over_the_stage_that_a_row_was_trained_from(experiments: list[Path]) -> None:
    folder = experiments[0]
    for name, start, average in (("sft", "models/tiny", 40.0), ("full", str(folder / "grpo" / "merged"), 42.0)):
        write_mig_bench(folder / name, summary(average))
        (folder / name / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"model": start}}}))
    write_mig_bench(folder / "foreign", summary(50.0))
    other = {"model": {"init_args": {"model": "outputs/other/grpo/merged"}}}
    (folder / "foreign" / "config.yaml").write_text(yaml.safe_dump(other))
    gains = {row[1]: tuple(row[4:6]) for row in stage_rows(find_runs([folder]))[1:]}
    assert gains["sft"] == ("+30.00", "base") and gains["full"] == ("+12.00", "grpo") and gains["foreign"] == ("", "")


def test_experiments_of_one_name_in_two_places_are_not_seeds_of_one(experiments: list[Path], tmp_path: Path) -> None:
    again = write_experiment(tmp_path / "later", "tiny", (10.0, 50.0), 0, 0.001)
    rows = stage_rows(find_runs([experiments[0], again]))
    assert [row[:4] for row in rows[1:]] == [
        [f"{tmp_path.name}/tiny", "base", "1", "10.00"],
        [f"{tmp_path.name}/tiny", "grpo", "1", "30.00"],
        ["later/tiny", "base", "1", "10.00"],
        ["later/tiny", "grpo", "1", "50.00"],
    ]


def test_a_phase_that_was_begun_anew_has_not_the_numbers_of_the_one_before(experiments: list[Path]) -> None:
    grpo = experiments[0] / "grpo"
    (
        grpo / "benchmarks/mig_bench/result.json"
    ).unlink()  # it went with the folder that was set aside; results.json still has the stage
    assert find_runs([grpo])[0].mig_bench is None
    write_mig_bench(grpo, summary(33.0))
    assert find_runs([grpo])[0].mig_bench["avg"] == 33.0
    (grpo / "benchmarks/mig_bench/result.json").rename(grpo / "mig_bench.json")
    with pytest.raises(ValueError, match=r"grpo/mig_bench\.json was written by an earlier version"):
        find_runs([grpo])


def test_settings_that_differ_are_listed_and_no_others(experiments: list[Path]) -> None:
    rows = config_differences(find_runs(experiments))["grpo"]
    assert rows == [
        ["field", "tiny/grpo", "tiny-seed1/grpo"],
        ["seed_everything", "0", "1"],
        ["model.init_args.loss.kl_beta", "0.001", "0.01"],
        ["trainer.callbacks.Throughput.every", "0", "1"],
    ]


def test_lists_of_plain_values_stay_whole() -> None:
    assert flatten({"a": [1, 2], "b": [{"x": 1}], "c": []}) == {"a": [1, 2], "b.0.x": 1, "c": []}


def test_two_callbacks_of_one_class_are_both_there() -> None:
    callbacks = [{"class_path": "callbacks.mig_bench.MIGBench", "init_args": {"limit": limit}} for limit in (5, 7)]
    assert flatten({"callbacks": callbacks}) == {"callbacks.MIGBench.limit": 5, "callbacks.MIGBench.2.limit": 7}


def test_one_phase_folder_is_a_run_too(experiments: list[Path]) -> None:
    (run,) = find_runs([experiments[1] / "grpo"])
    assert (run.label, run.family.name, run.seed, run.commit) == ("tiny-seed1/grpo", "tiny", 1, "abc123")
    assert run.mig_bench["avg"] == 36.0 and run.curves["grpo/kl"] == [(0, 0.1), (1, 0.2)] and run.groups == []


def test_what_is_cut_is_said(experiments: list[Path], tmp_path: Path, capsys) -> None:
    page = compare.compare(experiments, tmp_path / "page", max_groups=7, max_pictures=5)
    text = page.read_text()
    assert "7 of 3,000 groups are here" in text and "Pictures are here for 2 of" in text
    assert len(list((tmp_path / "page" / "rollouts" / "1" / "pictures").iterdir())) == 4
    assert "7 of 3,000 groups, 4 pictures" in capsys.readouterr().out


def test_faults_are_short_errors(tmp_path: Path, experiments: list[Path]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    for arguments, message in (
        (["--runs", str(tmp_path / "nowhere")], "nowhere"),
        (["--runs", str(experiments[0]), "--output", str(tmp_path / "mine")], "not of a comparison"),
        (["--runs", str(experiments[0]), "--max_groups", "-1"], "max_groups=-1"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare.main(arguments)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 10, 11])
def test_thinning_keeps_order_and_ends(limit: int) -> None:
    kept = thin(range(10), limit)
    assert len(kept) == len(set(kept)) == min(limit, 10) and kept == sorted(kept)
    assert limit < 2 or (kept[0], kept[-1]) == (0, 9)


def test_no_string_can_end_a_script() -> None:
    text = script_json(list(HOSTILE))
    assert "<" not in text and text.isascii() and json.loads(text) == list(HOSTILE)


def test_a_browser_pages_through_thousands_and_loads_what_it_shows(
    browser_page, experiments: list[Path], tmp_path: Path
) -> None:
    page = browser_page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition("/page/")[2]))
    page.goto(compare.compare(experiments, tmp_path / "page").as_uri())

    def chunks() -> list[int]:
        return [int(number) for url in asked for number in re.findall(r"chunk-(\d+)\.js", url)]

    def cards() -> list[str]:
        page.wait_for_function("document.querySelectorAll('.group').length > 0")
        page.wait_for_timeout(100)
        return page.locator(".group h3").all_inner_texts()

    # Stages, tasks, curves
    assert "33.00 ± 4.24" in page.locator("#pipeline").inner_text()
    page.select_option("#delta-to", label="tiny-seed1/grpo")
    assert page.locator("#deltas .total td").all_inner_texts()[:4] == ["AVG", "10.00", "36.00", "+26.00"]
    visible = page.locator("div[data-metric]:visible")
    assert [figure.get_attribute("data-metric") for figure in visible.all()] == ["reward/total", "grpo/kl"]
    page.locator("#metrics summary").click()
    page.get_by_role("checkbox", name="grpo/kl").uncheck()
    assert visible.count() == 1
    page.get_by_role("checkbox", name="tiny/grpo").uncheck()
    assert visible.first.locator("g[data-curve]:visible").count() == 1

    # The first groups: one chunk of sixty, pictures, boxes, hostile text as text
    page.locator("#browser").scroll_into_view_if_needed()
    assert len(cards()) == 5 and chunks() == [0]
    assert page.locator("#count").inner_text() == "3,000 of 3,000 groups"
    first = page.locator(".group").first
    assert HOSTILE[1] in first.locator("h3").inner_text() and "all rewards equal" in first.locator("h3").inner_text()
    said = first.locator(".completions").inner_text()
    assert "</script><script>alert('script')</script>" in said and "<b>bold</b>" in said and "onerror=alert(1)" in said
    assert first.locator("rect.predicted").count() == 1, "one completion has a box"
    assert first.locator("rect.predicted").get_attribute("width")[:5] == "33.33"  # 28 of 84 pixels
    second = page.locator(".group").nth(1)
    page.wait_for_function("[...document.images].length >= 2 && [...document.images].every((i) => i.naturalWidth > 0)")
    assert second.locator("img").count() == 2 and "Find the dog." in second.inner_text()
    assert second.locator(".score .gain").first.inner_text() == "advantage +1.00"
    assert "short 0.25" in second.locator(".score").first.inner_text(), "every reward by its name"
    second.locator("li").first.hover()
    assert second.locator("rect.chosen").count() == 1

    # The last page
    page.fill("#page", "600")
    page.locator("#page").press("Enter")
    page.wait_for_function("document.querySelector('.group').innerText.includes('update 1497,')")
    assert chunks() == [0, NUM_GROUPS // GROUPS_PER_CHUNK - 1] and page.locator("#next").is_disabled()

    # Filters: task and equal, id, updates; a page's groups may lie in several chunks
    page.select_option("#task", label="region")
    assert page.locator("#count").inner_text() == "1,000 of 3,000 groups"
    assert all(text.startswith("region") for text in cards())
    page.select_option("#zero_advantage", "1")
    page.wait_for_function("document.querySelectorAll('.group').length === 0")  # a group of this task is never equal
    page.select_option("#task", "")
    page.fill("#first", "700")
    page.fill("#last", "701")
    page.wait_for_function("document.querySelectorAll('.group').length === 1")
    assert [text for text in cards() if "all rewards equal" not in text or "update 70" not in text] == []
    assert page.locator("#count").inner_text() == "1 of 3,000 groups"
    page.select_option("#zero_advantage", "")
    page.fill("#name", "pool/3")
    page.wait_for_function("document.querySelectorAll('.group').length === 1")
    assert "pool/3" in cards()[0] and set(chunks()) == {0, 59, 28}
    page.fill("#name", "")
    page.fill("#first", "")
    page.fill("#last", "")
    page.select_option("#order", "high")
    page.wait_for_function("document.querySelector('.group').innerText.includes('update 1499,')")
    scripts = [url for url in asked if url.endswith(".js")]
    assert len(scripts) == len(set(scripts)) < 9, "nothing is loaded twice, and little at all"


def test_a_group_of_several_boxes_has_all_of_them_with_their_images(experiments: list[Path], tmp_path: Path) -> None:
    grpo = experiments[1] / "grpo"
    settings = yaml.safe_load((grpo / "config.yaml").read_text())
    settings["data"]["answer_form"] = "named_image"
    (grpo / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    true = [{"image": k, "box": [0.0, 0.0, 0.5, 0.5], "label": f"dog {k}"} for k in range(2)]
    boxes = [ParsedBox((0, 0, 28, 28), "a", 1), ParsedBox((0, 0, 42, 28), "b", 2), ParsedBox((0, 0, 9, 9), "c", 7)]
    texts = {"texts": [render_boxes(boxes, "t"), render_boxes(boxes[1:2], "t"), ""]}
    RolloutLog(grpo / "rollouts.jsonl").append([logged_group(1) | {"answer": {"boxes": true}} | texts])
    compare.compare([experiments[1]], tmp_path / "page")
    (chunk,) = (tmp_path / "page" / "rollouts").rglob("chunk-*.js")
    (group,) = json.loads(chunk.read_text().split(", ", 1)[1].rstrip(");\n"))
    assert group["truths"] == [[0, 0.0, 0.0, 0.5, 0.5], [1, 0.0, 0.0, 0.5, 0.5]]
    assert group["labels"] == ["dog 0", "dog 1"]
    first, second, third = group["completions"]
    assert first["boxes"] == group["truths"] and first["iou"] == pytest.approx(2 / 3), "the third names no image"
    assert second["boxes"] == group["truths"][1:] and second["iou"] == 0.5 and third["boxes"] == []


@pytest.mark.parametrize("name", ["box_format", "shards"])
def test_rollouts_of_another_version_are_told_with_file_and_field(
    experiments: list[Path], tmp_path: Path, name: str
) -> None:
    file = experiments[0] / "grpo" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    del settings["data"][name]
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=rf"grpo/config.yaml was written by another version .* no field data\.{name}"):
        compare.compare([experiments[0]], tmp_path / "page")


def test_runs_that_were_asked_other_questions_are_no_seeds_of_one_row(experiments: list[Path]) -> None:
    """Ids of questions are positions in a file, so they do not tell which questions were asked."""
    write_mig_bench(experiments[1] / "grpo", summary(36.0, data_root="data/nano/validation"))
    rows = stage_rows(find_runs(experiments))
    assert [row[:6] for row in rows[1:]] == [
        ["tiny", "base (d)", "2", "11.00 ± 1.41", "", ""],
        ["tiny", "grpo (d)", "1", "30.00", "+20.00", "base"],
        ["tiny", "grpo (data/nano/validation)", "1", "36.00", "", ""],
    ]
    page = compare.compare(experiments, experiments[0].parent / "page", max_groups=7, max_pictures=5)
    assert "tiny-seed1/grpo (data/nano/validation)" in page.read_text()
