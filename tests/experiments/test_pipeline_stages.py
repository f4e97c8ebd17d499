"""What results.json and an ablation's tables list, whenever a run is stopped. The steps' processes are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from datamodules.persistence import folder_lock
from datamodules.persistence.files import fingerprint, read_json, write_json
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments import ablations, pipeline
from experiments.runs import subprocess_steps, wandb_runs
from experiments.runs.changes import CodeChanged
from experiments.runs.command_line import step_checks
from experiments.runs.results import read_results
from tests.experiments.phase_results import summary, write_mig_bench

ROWS = {"sft": "base", "cot_sft": "base", "grpo": "cot_sft", "full": "grpo"}
ALL = ["base", *ROWS]


class Processes:
    """In the place of the steps' processes. One of the stage `broken` ends with an error, at a check if `refuses`."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.refuses = False
        self.ran: list[str] = []
        self.told: list[str] = []  # --keep or --redo, of those that ran
        self.checked: list[str] = []  # the steps whose settings were checked before any step ran

    def __call__(self, command: list[str], tick: Callable[[], object], environment: Mapping[str, str] = {}) -> int:
        if command[2].endswith("step_checks"):
            titles = [title for title, _ in json.loads(command[-1])]
            self.checked += titles
            return int(self.refuses and f"{self.broken}: training" in titles)
        self.told += [word for word in command if word in ("--keep", "--redo")]
        command = [word for word in command if word not in ("--keep", "--redo")]
        flags = dict(zip(command[3::2], command[4::2], strict=True))
        train = command[2] == "experiments.train"
        folder = Path(flags["--outputs"], flags["--experiment"], flags["--phase"]) if train else Path(flags["--output"])
        folder = folder if train else folder.parent
        if folder.name == self.broken:
            return 1
        self.ran.append(f"{folder.parent.name}/{folder.name}")
        if train:
            model = flags["--model.init_args.model"]
            content = fingerprint(folder.name, Path(flags["--config"]).read_text(), path_fingerprint(model))
            write_json(folder / "merged/config.json", content)
        else:
            write_mig_bench(folder, summary(key=path_fingerprint(flags["--model"])))
        return 0


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    stand_ins = Processes()
    monkeypatch.setattr(subprocess_steps, "run_process", stand_ins)
    monkeypatch.setattr(step_checks, "run_process", stand_ins)
    monkeypatch.setattr(wandb_runs, "log_summary", lambda *_: None)
    monkeypatch.setattr(pipeline, "write_model_card", lambda phase: None)  # the stand-ins write no config.yaml
    return stand_ins


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    """What the ablation and the pipeline are both given; the rows' YAMLs lie in `tmp_path`."""
    write_json(tmp_path / "shards/manifest.json", {})
    for name in ROWS:
        write_config(tmp_path, name, 0)
    (tmp_path / "MIG-Bench").mkdir()
    (tmp_path / "MIG-Bench/MIG_data.json").write_text("[]")
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"model": "any", "data_root": str(tmp_path)}))
    write_json(tmp_path / "model/config.json", {})
    paths = {"model": tmp_path / "model", "evaluation": tmp_path / "eval.yaml", "outputs": tmp_path / "outputs"}
    return {"experiment": "tiny"} | {name: str(path) for name, path in paths.items()}


def write_config(root: Path, name: str, version: int) -> str:
    """The YAML of a row; with another version, what was trained with it before is not what it would train."""
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"version": version, "data": {"shards": str(root / "shards")}}))
    return str(path)


def run_rows(settings: Mapping, **more: object) -> None:
    root = Path(settings["outputs"]).parent
    rows = {name: ablations.Row(start, str(root / f"{name}.yaml")) for name, start in ROWS.items()}
    ablations.run(**settings, rows=rows, seeds=[0, 1], **more)


def change_and_break(name: str, processes: Processes, settings: Mapping) -> None:
    """Run all rows; then again with another configuration of this one, whose training fails."""
    run_rows(settings)
    write_config(Path(settings["outputs"]).parent, name, 1)
    processes.broken = name
    with pytest.raises(SystemExit, match=f"{name}: training"):
        run_rows(settings)


def listed(outputs: Path, seed: int) -> list[str]:
    folder = outputs / ("tiny" if seed == 0 else f"tiny-seed{seed}")
    return [stage.name for stage in read_results(folder / "results.json").stages]


def in_tables(outputs: Path, seed: int) -> list[str]:
    rows = read_json(outputs / "tiny-ablations/ablations.json")["rows"]
    return [row["name"] for row in rows if str(seed) in row["seeds"]]


def test_an_ablation_that_is_stopped_lists_what_is_done_at_every_seed(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    change_and_break("sft", processes, settings)
    for seed in (0, 1):
        found = ["base", "cot_sft", "grpo", "full"]
        assert listed(tmp_path / "outputs", seed) == in_tables(tmp_path / "outputs", seed) == found
    processes.broken, processes.ran = None, []
    run_rows(settings)
    assert processes.ran == [f"{folder}/sft" for folder in ("tiny", "tiny-seed1") for _ in range(2)]
    assert listed(tmp_path / "outputs", 1) == in_tables(tmp_path / "outputs", 1) == ALL, "in the order of the rows"


def test_a_row_whose_start_is_to_be_trained_again_is_not_listed(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    change_and_break("cot_sft", processes, settings)
    assert listed(tmp_path / "outputs", 0) == listed(tmp_path / "outputs", 1) == ["base", "sft"]
    run_rows(settings, only=["sft"])
    assert in_tables(tmp_path / "outputs", 0) == ["base", "sft"], "nor where its start is not asked for"


def test_a_row_that_only_its_starts_evaluation_lacks_is_listed(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    run_rows(settings)
    write_mig_bench(tmp_path / "outputs/tiny/cot_sft", summary(key="another's"))
    processes.broken = "cot_sft"
    with pytest.raises(SystemExit, match="cot_sft: MIG-Bench"):
        run_rows(settings)
    assert listed(tmp_path / "outputs", 0) == ["base", "sft", "grpo", "full"]


def test_a_seed_at_which_another_process_works_is_left_to_it(
    processes: Processes, settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_rows(settings)
    write_config(tmp_path, "sft", 1)
    processes.broken = "sft"
    with folder_lock.locked(tmp_path / "outputs/tiny-seed1"), pytest.raises(SystemExit, match="sft: training"):
        run_rows(settings)
    assert "seed 1: another process is working" in capsys.readouterr().out
    assert listed(tmp_path / "outputs", 1) == ALL and "sft" not in listed(tmp_path / "outputs", 0)


def test_a_pipeline_that_is_stopped_lists_what_is_done_behind(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    stages = {name: str(tmp_path / f"{name}.yaml") for name in ("cot_sft", "grpo")}
    pipeline.run(**settings, stages=stages)
    assert listed(tmp_path / "outputs", 0) == ["base", *stages]
    write_mig_bench(tmp_path / "outputs/tiny/cot_sft", summary(key="another's"))
    processes.broken = "cot_sft"
    with pytest.raises(SystemExit, match="cot_sft: MIG-Bench"):
        pipeline.run(**settings, stages=stages)
    assert listed(tmp_path / "outputs", 0) == ["base", "grpo"]
    (tmp_path / "eval.yaml").write_text(
        yaml.safe_dump({"model": "any", "data_root": str(tmp_path), "dtype": "float16"})
    )
    processes.broken = "base"
    with pytest.raises(SystemExit, match="base: MIG-Bench"):
        pipeline.run(**settings, stages=stages)
    assert listed(tmp_path / "outputs", 0) == [], "what was asked otherwise does not count"
    assert (tmp_path / "outputs/tiny/report.html").is_file()


def test_other_image_files_of_the_questions_are_asked_again(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    image = tmp_path / "MIG-Bench/images/region/a.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"123")
    pipeline.run(**settings, stages={})
    pipeline.run(**settings, stages={})
    assert len(processes.ran) == 1
    image.write_bytes(b"1234")
    pipeline.run(**settings, stages={})
    assert len(processes.ran) == 2


def test_a_run_that_finds_nothing_writes_nothing(processes: Processes, settings: dict, tmp_path: Path) -> None:
    processes.broken = "base"
    with pytest.raises(SystemExit, match="base: MIG-Bench"):
        pipeline.run(**settings, stages={})
    assert not (tmp_path / "outputs/tiny/results.json").exists()


def test_what_overrides_name_decides_about_a_result_as_the_stage_itself_does(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    write_json(tmp_path / "other/manifest.json", {})
    (tmp_path / "more.yaml").write_text("version: 1")
    (tmp_path / "asked.yaml").write_text("limit: null")
    words = f"--config {tmp_path / 'more.yaml'} --data.shards {tmp_path / 'other'}"
    more = {"overrides": {"grpo": words, "evaluation": f"--config {tmp_path / 'asked.yaml'}"}}
    stages = {"grpo": str(tmp_path / "grpo.yaml")}

    def ran() -> list[str]:
        processes.ran = []
        pipeline.run(**settings, stages=stages, **more)
        return processes.ran

    trained, all_asked = ["tiny/grpo"], ["tiny/base", "tiny/grpo"]
    assert ran() == [*all_asked, "tiny/grpo"] and ran() == []
    write_json(tmp_path / "shards/manifest.json", {"shards": "of the YAML"})
    assert ran() == [], "nobody reads them"
    write_json(tmp_path / "other/manifest.json", {"shards": "changed"})
    assert ran() == trained
    (tmp_path / "more.yaml").write_text("version: 2")
    assert ran() == [*trained, "tiny/grpo"], "another model is asked again"
    (tmp_path / "asked.yaml").write_text("limit: null\ndtype: float16")
    assert ran() == all_asked


@pytest.mark.parametrize("shards", ["[{0}/shards,{0}/other]", "{{{0}/shards: 1, {0}/other: 2}}"])
def test_a_list_of_shards_in_a_flag_is_read_source_by_source(settings: dict, tmp_path: Path, shards: str) -> None:
    phases = {"grpo": pipeline.Phase("base", str(tmp_path / "grpo.yaml"))}
    overrides = {"grpo": f"--data.shards='{shards.format(tmp_path)}'"}
    made = pipeline.Pipeline(tmp_path / "tiny", 0, settings["model"], settings["evaluation"], phases, overrides)
    assert made.training("grpo").inputs[2:] == (f"{tmp_path}/shards", f"{tmp_path}/other")


@pytest.mark.parametrize(
    "flag",
    ["--model.rewards='[{class_path: near.Near}]'", "--trainer.callbacks+=near.Near", "--model.class_path near.Near"],
)
def test_a_class_that_a_flag_names_is_among_the_code_of_its_step(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "near.py").write_text("class Near: ...")
    phases = {"grpo": pipeline.Phase("base", str(tmp_path / "grpo.yaml"))}
    made = pipeline.Pipeline(tmp_path, 0, settings["model"], settings["evaluation"], phases, {"grpo": flag})
    assert "near.py" in made.training("grpo").code()


@pytest.mark.parametrize(
    ("stage", "words", "fault"),
    [
        ("evaluation", "--model other", "model=other"),
        ("evaluation", "--config {}/whole.yaml", "model=that of the YAML, bench=lisa, without mig_bench"),
        ("evaluation", "--output=elsewhere", "output=elsewhere"),
        ("evaluation", "--bench lisa,blink", "bench=lisa,blink, without mig_bench"),
        ("grpo", "--experiment mine --phase x", "experiment=mine, phase=x"),
        ("grpo", "--config {}/whole.yaml", "experiment=another"),
        ("grpo", "--seed 3", "seed=3"),
    ],
)
def test_overrides_that_replace_what_the_pipeline_gives_are_refused(
    processes: Processes, settings: dict, tmp_path: Path, stage: str, words: str, fault: str
) -> None:
    whole = {
        "evaluation": {"model": "that of the YAML", "bench": "lisa", "data_root": "x"},
        "grpo": {"experiment": "another"},
    }
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole[stage]))
    stages = {"grpo": str(tmp_path / "grpo.yaml")}
    with pytest.raises(SystemExit, match=rf"^overrides\.{stage}: {fault}\. "):
        pipeline.run(**settings, stages=stages, overrides={stage: words.format(tmp_path)})
    assert processes.ran == processes.checked == []
    allowed = {"evaluation": "--bench all --limit=3", "grpo": "--seed_everything 3 --model.init_args.model m"}
    pipeline.Pipeline(tmp_path, 0, settings["model"], settings["evaluation"], {}, {stage: allowed[stage]})


def test_settings_that_no_step_can_read_are_named_without_a_traceback(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    for name, text in {"broken": "a: [", "empty": "", "words": "[1, 2]", "without": "phase: sft"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, fault in {"broken": "line 1: ", "empty": "found None", "words": r"found \[1, 2\]"}.items():
        stages = {"grpo": str(tmp_path / f"{name}.yaml")}
        with pytest.raises(SystemExit, match=rf"stages.grpo='.*{name}.yaml' is no YAML of settings: .*{fault}"):
            pipeline.run(**settings, stages=stages)
    with pytest.raises(SystemExit, match=r"overrides.grpo=\"--a='x\" are no words of a command line: No closing"):
        pipeline.run(**settings, stages={"grpo": str(tmp_path / "grpo.yaml")}, overrides={"grpo": "--a='x"})
    with pytest.raises(SystemExit, match=r"'evaluation'.*so no stage has this name"):
        pipeline.run(**settings, stages={"evaluation": str(tmp_path / "grpo.yaml")}, overrides={"evaluation": "--a=1"})
    pipeline.run(**settings, stages={"grpo": str(tmp_path / "without.yaml")})  # the check of the steps would name it
    row = {"start": "base", "config": str(tmp_path / "without.yaml")}
    with pytest.raises(SystemExit, match=r"rows.sft.changes\[0\]='.*broken.yaml' is no YAML"):
        changes = [str(tmp_path / name) for name in ("broken.yaml", "without.yaml")]
        ablations.run(**settings, rows={"sft": ablations.Row(**row, changes=changes)})
    with pytest.raises(ValueError, match=r"rows.sft: without=\['MIGBench'\], but .*without.yaml has \[\]"):
        ablations.run(**settings, rows={"sft": ablations.Row(**row, without=["MIGBench"])})


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The source files, as all steps are told; a test may change them."""
    files = {"lightning_modules/grpo.py": "1"}
    monkeypatch.setattr(subprocess_steps, "source_code", lambda modules: dict(files) if modules else {})
    return files


def run_pipeline(settings: Mapping, tmp_path: Path, **more: bool) -> None:
    stages = {name: str(tmp_path / f"{name}.yaml") for name in ("cot_sft", "grpo")}
    pipeline.run(**settings, stages=stages, **more)


def test_a_pipeline_asks_once_and_before_anything_runs_where_code_has_changed(
    processes: Processes, settings: dict, tmp_path: Path, code: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    run_pipeline(settings, tmp_path)
    code["lightning_modules/grpo.py"] = "2"
    processes.ran = []
    with pytest.raises(CodeChanged) as asked:
        run_pipeline(settings, tmp_path)
    text = str(asked.value)
    assert "base: MIG-Bench" in text and "grpo: training" in text and "changed since: lightning_modules/grpo.py" in text
    assert "KEEP=1" in text and "REDO=1" in text and len(text.splitlines()) <= 5
    assert processes.ran == [] and listed(tmp_path / "outputs", 0) == ["base", "cot_sft", "grpo"]
    run_pipeline(settings, tmp_path, keep=True)
    run_pipeline(settings, tmp_path)
    assert processes.ran == [], "what is kept is not asked about again"
    capsys.readouterr()
    run_pipeline(settings, tmp_path, redo=True)
    every = ["base", "cot_sft", "cot_sft", "grpo", "grpo"]
    assert processes.ran == [f"tiny/{name}" for name in every] and processes.told == ["--redo"] * 5
    run_pipeline(settings, tmp_path, redo=True)
    assert len(processes.ran) == 5, "made again once, by whatever is killed meanwhile"


def test_a_step_that_an_earlier_version_has_done_is_asked_about(
    processes: Processes, settings: dict, tmp_path: Path, code: dict[str, str]
) -> None:
    run_pipeline(settings, tmp_path)
    for marker in (tmp_path / "outputs/tiny").glob("*/*ed.json"):
        write_json(marker, {name: value for name, value in read_json(marker).items() if name != "code"})
    with pytest.raises(CodeChanged, match="an earlier version of the project"):
        run_pipeline(settings, tmp_path)


def test_an_ablation_asks_about_all_seeds_at_once(
    processes: Processes, settings: dict, tmp_path: Path, code: dict[str, str]
) -> None:
    run_rows(settings)
    code["lightning_modules/rl/rewards.py"] = "new"
    processes.ran = []
    with pytest.raises(CodeChanged, match=r"rewards\.py \(new\)"):
        run_rows(settings)
    run_rows(settings, keep=True)
    run_rows(settings)
    assert processes.ran == [] and listed(tmp_path / "outputs", 1) == ALL


def test_a_yaml_that_asks_for_the_same_keeps_the_time_that_it_took(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    run_pipeline(settings, tmp_path)
    marker = tmp_path / "outputs/tiny/cot_sft/trained.json"
    write_json(marker, read_json(marker) | {"seconds": 1234.5})
    write_json(marker.with_name("done.json"), {"key": "the run's"})  # as its process leaves it, which finds it done
    (tmp_path / "cot_sft.yaml").write_text((tmp_path / "cot_sft.yaml").read_text() + "# a comment\n")
    run_pipeline(settings, tmp_path)
    assert read_json(marker)["seconds"] == 1234.5


def test_a_stage_that_would_be_refused_later_is_refused_before_any_stage_runs(
    processes: Processes, settings: dict, tmp_path: Path
) -> None:
    processes.broken, processes.refuses = "cot_sft", True
    with pytest.raises(SystemExit, match="1"):
        run_rows(settings)
    trainings = [f"{name}: training" for name in ROWS]
    assert processes.checked == ["base: MIG-Bench", *trainings], "once for both seeds"
    assert processes.ran == []
    processes.broken, processes.checked = None, []
    run_rows(settings)
    processes.checked = []
    for name in ("cot_sft", "grpo"):  # as training leaves it
        write_json(tmp_path / f"outputs/tiny/{name}/started.json", {"key": "a"})
    run_rows(settings)
    assert processes.checked == [], "a stage that is done needs no check, which takes seconds"
    processes.ran.clear()
    write_config(tmp_path, "cot_sft", 1)
    processes.broken = "cot_sft"
    with pytest.raises(SystemExit, match="1"):
        run_rows(settings)
    assert set(processes.checked) == {"cot_sft: training"} and processes.ran == []
    processes.broken = None
    run_rows(settings, redo=True)
    assert "tiny/cot_sft" in processes.ran and "tiny/grpo" in processes.ran
