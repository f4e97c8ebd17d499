"""W&B's sweep format: supported distributions, every problem by name, and the same command line as W&B's own agent."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import yaml

from experiments.runs.command_line.run_words import complete_words
from experiments.sweeps.plan import EarlyStop, read_early_stop, read_parameter, read_plan

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "experiments" / "configs"
SWEEPS = ("nano/sweep.yaml", "paper/sweep_7b.yaml")
PLAN = {
    "name": "tiny-sweep",
    "method": "random",
    "metric": {"name": "mig_bench_val/avg", "goal": "maximize"},
    "run_cap": 3,
    "parameters": {"model.init_args.loss.kl_beta": {"values": [0.0, 0.1]}},
    "command": ["${interpreter}", "-m", "experiments.train", "--config=a.yaml", "--config", "b.yaml", "${args}"],
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "sweep.yaml"
    settings = {key: value for key, value in (PLAN | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"value": 3}, [3]),
        ({"value": None}, [None]),
        ({"value": [1, 2]}, [[1, 2]]),
        ({"distribution": "constant", "value": "x"}, ["x"]),
        ({"values": [0.0, 0.5, "a", True, None]}, [0.0, 0.5, "a", True, None]),
        ({"min": 2, "max": 5}, [2, 3, 4, 5]),
        ({"distribution": "q_uniform", "min": 0.25, "max": 0.75, "q": 0.25}, [0.25, 0.5, 0.75]),
        ({"distribution": "q_uniform", "min": 0.6, "max": 0.9, "q": 0.1}, [0.6, 0.7, 0.8, 0.9]),
        ({"distribution": "q_uniform", "min": 2, "max": 6, "q": 2}, [2, 4, 6]),
        ({"min": 0.0, "max": 2.0}, []),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}, []),
    ],
)
def test_values_are_counted_where_they_can_be(fields: dict, values: list) -> None:
    found = read_parameter("p", fields).grid()
    assert found == values and list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"distribution": "beta", "a": 1}, "distribution='beta' is not supported; these are: constant, .*q_uniform"),
        ({"distribution": "normal", "mu": 0.0, "sigma": 1.0}, "distribution='normal' is not supported"),
        ({"distribution": "log_uniform", "min": -4, "max": 0}, "distribution='log_uniform' is not supported"),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 4, "q": 2}, "'q_log_uniform_values' is not"),
        ({"distribution": "q_uniform", "min": 1, "max": 3}, r"missing \['q'\]"),
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, r"unknown \['probabilities'\]"),
        ({"min": "1e-4", "max": 1.0}, r"min='1e-4' is no number .*1\.0e-4"),
        ({"distribution": "uniform", "min": 1.0}, r"missing \['max'\]"),
        ({"min": 0.0, "max": 1.0, "step": 2}, r"unknown \['step'\]"),
        ({"min": 1.0, "max": 0.0}, "min=1.0 is not below max=0.0"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min=0 must be greater than 0"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "whole numbers"),
        ({"distribution": "q_uniform", "min": 0, "max": 2, "q": 0}, "q=0 must be greater than 0"),
        ({"distribution": "q_uniform", "min": 0.3, "max": 0.5, "q": 0.25}, r"min=0\.3 and max=0\.5 multiples of it"),
        ({"values": [1, [2, 3]]}, r"\[\[2, 3\]\] are not numbers"),
        ({"values": []}, r"values=\[\]"),
        ({"parameters": {"x": {"value": 1}}}, "nested"),
        (0.5, "0.5: give value, values, or min and max"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_field(fields: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^parameters\.some\.flag.*{words}"):
        read_parameter("some.flag", fields)


def test_all_problems_of_a_sweep_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        name="../up",
        method="hyperopt",
        metric={"name": "x", "goal": "up", "target": 3},
        parameters={"a": {"values": []}, "b": {"min": 3, "max": 1}},
        command=["python", "other.py", "${args_json}"],
        run_cap=0,
        early_terminate={"type": "median"},
        scheduler={"engine": "ax"},
    )
    with pytest.raises(ValueError) as caught:
        read_plan(path)
    text = str(caught.value)
    wrong = ("'../up'", "'hyperopt'", "target", "parameters.a", "parameters.b", "other.py", "run_cap=0", "median")
    for word in (*wrong, "scheduler is no key"):
        assert word in text, word


def test_a_macro_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\$\{args_json\} is none of"):
        read_plan(write(tmp_path, command=[*PLAN["command"], "${args_json}"]))


@pytest.mark.parametrize("word", ["--phase=${envvar:PHASE}", "--x=${args}"])
def test_a_macro_inside_a_word_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        read_plan(write(tmp_path, command=[*PLAN["command"], word]))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_sweep_that_would_lie_outside_a_folder_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must be a plain folder name"):
        read_plan(write(tmp_path, name=name))


def test_what_is_no_mapping_is_a_short_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parameters=\[1, 2\] names none"):
        read_plan(write(tmp_path, parameters=[1, 2]))
    (tmp_path / "sweep.yaml").write_text("name: [a\nmethod: {")
    with pytest.raises(ValueError, match="is no YAML"):
        read_plan(tmp_path / "sweep.yaml")


def test_a_grid_is_of_values_that_can_be_counted(tmp_path: Path) -> None:
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.5}}
    plan = read_plan(write(tmp_path, method="grid", parameters=parameters | {"c": {"min": 4, "max": 5}}))
    assert plan.grid_size() == 3 * 3 * 2
    with pytest.raises(ValueError, match=r"parameters\.d: method grid needs"):
        read_plan(write(tmp_path, method="grid", parameters={"d": {"min": 0.0, "max": 1.0}}))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"min_iter": 2}, EarlyStop(2, 3)),
        ({"min_iter": 1, "eta": 2}, EarlyStop(1, 2)),
    ],
)
def test_hyperband_has_the_bands_that_wandb_gives_it(fields: dict, expected: EarlyStop) -> None:
    assert read_early_stop({"type": "hyperband"} | fields) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": "envelope"}, "'envelope'.*type: hyperband, min_iter and eta"),
        ({"type": "hyperband"}, "min_iter=None"),
        ({"type": "hyperband", "max_iter": 27, "s": 2}, "max_iter.*supported are"),
        ({"type": "hyperband", "min_iter": 1, "eta": 2.5}, "eta=2.5"),
        ({"type": "hyperband", "min_iter": 0}, "min_iter=0"),
        ({"type": "hyperband", "min_iter": 1, "strict": False}, "strict.*supported are"),
    ],
)
def test_an_early_stop_that_cannot_be_kept_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"early_terminate.*{words}"):
        read_early_stop(fields)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_trial_gets_the_command_line_that_wandb_s_agent_makes(name: str) -> None:
    from wandb.sdk.launch.sweeps import utils

    plan = read_plan(CONFIGS / name)
    values = {p.name: (p.grid() or [p.low])[0] for p in plan.parameters}
    settings = yaml.safe_load((CONFIGS / name).read_text())
    macros = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [settings["program"]]}
    expected: list[str] = []
    for word in utils.create_sweep_command(copy.copy(settings["command"])):
        expected += macros[word[2:-1]] if word.startswith("${") else [word]
    assert plan.arguments(values, sys.executable) == expected


def test_the_configurations_of_a_command_are_found(tmp_path: Path) -> None:
    assert read_plan(write(tmp_path)).configs == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_shipped_trial_starts_from_the_model_of_its_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep is an experiment of its own, and the CoT-SFT model is another experiment's."""
    monkeypatch.chdir(ROOT)
    plan = read_plan(CONFIGS / name)
    model = yaml.safe_load((ROOT / plan.configs[0]).read_text())["model"]["init_args"]["model"]
    given = [word for word in complete_words(plan.example()) if word.startswith("--model.init_args.model=")]
    assert given == [f"--model.init_args.model={model}"]
