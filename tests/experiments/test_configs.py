"""Every shipped configuration parses and instantiates, and the paper's hold the paper's values."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import auto_parser

from callbacks.checkpoints import WholeCheckpoints, WindowCheckpoint
from callbacks.rejection_sampling import RejectionSampling
from datamodules.encoding.messages import PromptStyle
from datamodules.importers.registry import SOURCES
from experiments import (
    ablations,
    generate_synthetic,
    import_shards,
    pipeline,
    synthesize,
)
from experiments.evaluation.evaluation_settings import Evaluation
from experiments.generate_synthetic import dataset_configs
from experiments.runs.command_line import train_cli
from experiments.sweep import num_trials
from experiments.sweeps.plan import read_plan
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.grpo import GRPO
from lightning_modules.models.qwen_vl import QwenVL
from tests.tutorials import marked_blocks

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
TRAINING = (
    "nano/cot_sft.yaml",
    "nano/sft.yaml",
    "nano/grpo.yaml",
    "nano/multi_box/cot_sft.yaml",
    "nano/multi_box/grpo.yaml",
    "paper/cot_sft_3b.yaml",
    "paper/cot_sft_7b.yaml",
    "paper/sft_3b.yaml",
    "paper/sft_7b.yaml",
    "paper/grpo_3b.yaml",
    "paper/grpo_7b.yaml",
)
OTHERS = {
    "nano/ablations.yaml": ablations.run,
    "nano/long_ablations.yaml": ablations.run,
    "nano/lengths.yaml": ablations.run,
    "nano/levers.yaml": ablations.run,
    "nano/objectives.yaml": ablations.run,
    "paper/ablations_7b.yaml": ablations.run,
    "nano/eval.yaml": Evaluation,
    "nano/validation.yaml": Evaluation,
    "nano/shards.yaml": generate_synthetic.build,
    "nano/long_shards.yaml": generate_synthetic.build,
    "nano/pipeline.yaml": pipeline.run,
    "nano/long.yaml": pipeline.run,
    "nano/smoke.yaml": pipeline.run,
    "nano/smoke_shards.yaml": generate_synthetic.build,
    "nano/multi_box/shards.yaml": generate_synthetic.build,
    "nano/multi_box/eval.yaml": Evaluation,
    "paper/cot_mixture.yaml": import_shards.run,
    "nano/synthesize.yaml": synthesize.synthesize,
    "paper/synthesize_72b.yaml": synthesize.synthesize,
    "paper/eval_3b.yaml": Evaluation,
    "paper/eval_7b.yaml": Evaluation,
    "paper/pipeline_3b.yaml": pipeline.run,
    "paper/pipeline_7b.yaml": pipeline.run,
}
# A sweep, and what its trials change in a training configuration: (that one, the changes).
SWEEPS = {
    "nano/sweep.yaml": ("nano/grpo.yaml", "nano/sweep_trial.yaml"),
    "paper/sweep_7b.yaml": ("paper/grpo_7b.yaml", "paper/sweep_trial_7b.yaml"),
}
# A second --config for GRPO, and what it changes.
OBJECTIVES = {
    "grpo": {},
    "dr_grpo": {"advantage.scale": "none", "loss.reduction": "dr_grpo"},
    "dapo": {"loss.reduction": "token", "loss.clip_high": 0.28},
    "gspo": {"loss.ratio": "sequence", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4, "update.minibatches": 4},
    "cispo": {
        "loss.objective": "cispo",
        "loss.reduction": "token",
        "loss.clip_low": None,
        "loss.clip_high": 4.0,
        "update.minibatches": 4,
    },
    "sapo": {"loss.objective": "sapo", "loss.clip_low": None, "loss.clip_high": None, "update.minibatches": 4},
    "kl_unbiased": {"loss.kl_unbiased": True},
    "kl_in_reward": {"loss.kl_in": "reward", "loss.kl_estimator": "k1", "advantage.scale": "none"},
    "entropy_target": {"loss.entropy.target": 0.2, "loss.entropy.highest": 0.1},
    "moving_reference": {
        "loss.kl_beta": 0.02,
        "loss.kl_schedule.kind": "cosine",
        "loss.kl_schedule.final": 0.002,
        "loss.reference_every": 100,
    },
    "sampler_sequence_mask": {"update.importance_mode": "sequence_mask", "update.importance_cap": 3.0},
}
# A second --config for GRPO, and the accuracy reward that it puts in the place of the IoU.
REWARDS = {"iou_above": "IoUAbove", "giou": "GIoU"}
# Qwen2.5-VL as published, cut to what decides shapes.
SHAPES = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
PARAMETERS = {"3b": 3.75e9, "7b": 8.29e9}  # of the whole model


class Parsed(train_cli.TrainCLI):
    """The CLI up to instantiation, without the folder, the files and the checks of a run."""

    def before_instantiate_classes(self) -> None:
        pass


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["train"])

    def parse_config(name: str, *more: str) -> Parsed:
        here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
        return Parsed(["--config", str(CONFIGS / name), *more, *here])

    return parse_config


def qwen_config(size: str) -> dict:
    """config.json of Qwen2.5-VL-3B or 7B."""
    text = {"vocab_size": 151936 if size == "3b" else 152064, "num_key_value_heads": 2 if size == "3b" else 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": size == "3b",
        "text_config": SHAPES[size]
        | text
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": size == "3b",
        },
        "vision_config": vision
        | {"out_hidden_size": SHAPES[size]["hidden_size"], "fullatt_block_indexes": [7, 15, 23, 31]},
    }


def test_the_lists_here_name_every_configuration() -> None:
    sweeps = {*SWEEPS, *(changes for _, changes in SWEEPS.values())}
    fragments = {"nano/objectives_run.yaml", "nano/lengths_run.yaml", "nano/grpo_lora.yaml"}
    fragments |= {f"objectives/{name}.yaml" for name in OBJECTIVES} | {f"rewards/{name}.yaml" for name in REWARDS}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == {
        *TRAINING,
        *OTHERS,
        *sweeps,
        *fragments,
    }


@pytest.mark.parametrize("name", TRAINING)
def test_training_configurations_instantiate(parse, name: str) -> None:
    cli = parse(name)
    stem = Path(name).stem
    assert cli.config.phase == stem.removesuffix("_3b").removesuffix("_7b")
    is_grpo = cli.config.phase == "grpo"
    assert isinstance(cli.model, GRPO if is_grpo else CoTSFT)
    assert isinstance(cli.trainer.strategy.checkpoint_io, WholeCheckpoints)
    assert isinstance(cli.trainer.checkpoint_callback, WindowCheckpoint)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    # Several boxes: prompts that are never wholly right teach too, by their graded rewards.
    rejects = is_grpo and name != "nano/multi_box/grpo.yaml"
    assert ("RejectionSampling" in names) == rejects
    if rejects:  # hours of sampling come after the callbacks that find a wrong path in the first second
        others = [names.index(name) for name in ("Previews", "MIGBench") if name in names]
        assert names.index("RejectionSampling") > max(others, default=0)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_try_settings_that_exist_on_questions_that_are_not_the_benchmark(parse, name: str) -> None:
    plan, (config, changes) = read_plan(CONFIGS / name), SWEEPS[name]
    assert plan.configs == [f"experiments/configs/{config}", f"experiments/configs/{changes}"]
    assert plan.metric == "mig_bench_val/avg" and plan.maximize
    assert plan.early and num_trials(plan, None) == plan.run_cap
    edges = ({p.name: (p.grid() or [p.low, p.high])[end] for p in plan.parameters} for end in (0, -1))
    for values in edges:
        flags = [f"--{key}={value}" for key, value in values.items()]
        cli = parse(config, "--config", str(CONFIGS / changes), *flags)
        assert {key: reduce(getitem, key.split("."), cli.settings()) for key in values} == values
        callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
        bench = callbacks["MIGBench"]
        assert "/validation/" in bench.annotations and bench.after
        # Early stopping needs a value at its first band that is not the last.
        assert cli.trainer.max_steps // bench.every_n_steps > plan.early.first  # counted from 1
        assert callbacks["RejectionSampling"].shared and "MergeAdapter" not in callbacks
        plain = next(c for c in parse(config).trainer.callbacks if type(c).__name__ == "RejectionSampling")
        assert callbacks["RejectionSampling"].settings == plain.settings, "the same choice as outside the sweep"


def parse_settings(function: Callable[..., None], path: Path) -> None:
    """Parse a YAML as the function's command does; unknown fields, nested ones too, and wrong types end the program."""
    auto_parser(function, as_positional=False).parse_args(["--config", str(path)])


@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations_fit_their_function(name: str) -> None:
    parse_settings(OTHERS[name], CONFIGS / name)
    settings = yaml.safe_load((CONFIGS / name).read_text())
    datasets = dataset_configs(settings.get("synthetic_dataset"))
    for path in (settings.get("evaluation"), *datasets, *settings.get("stages", {}).values()):
        assert path is None or (ROOT / path).is_file(), path


def test_the_paper_mixture_has_the_counts_of_its_table_1() -> None:
    settings = yaml.safe_load((CONFIGS / "paper/cot_mixture.yaml").read_text())
    counts: Counter[str] = Counter()
    for part in settings["parts"]:
        counts[part["name"] if part["source"] == "mgrounding" else part["source"]] += part["count"]
        default = SOURCES[part["source"]].DEFAULT_SUBSETS
        drawn = {pattern for pattern in part["subsets"] if not pattern.startswith("!")}
        assert part["source"] == "mgrounding" or drawn <= set(default), "training splits alone"
    counts["odinw and v3det"] = counts.pop("odinw") + counts.pop("v3det")
    paper = {"common_object": 22_000, "refer_grounding": 24_000, "region": 5_000, "diff": 3_000}
    assert dict(counts) == paper | {"refcoco": 1_000, "odinw and v3det": 1_000}


def test_synthesis_has_the_papers_values() -> None:
    settings = yaml.safe_load((CONFIGS / "paper/synthesize_72b.yaml").read_text())
    assert settings["endpoint"]["model"] == "Qwen/Qwen2.5-VL-72B-Instruct" and settings["threshold"] == 0.5
    assert settings["sampling"]["num_responses"] == 4 and settings["sampling"]["max_tokens"] == 1024


@pytest.mark.parametrize(
    "wrong", [{"decoding": {"max_tokens": 3}}, {"form": {"style": "thinking"}}, {"limits": {"pixels": 3}}]
)
def test_a_wrong_field_does_not_fit(wrong: dict, tmp_path: Path, capsys) -> None:
    settings = yaml.safe_load((CONFIGS / "nano/eval.yaml").read_text())
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings | wrong))
    with pytest.raises(SystemExit):
        parse_settings(Evaluation, tmp_path / "eval.yaml")
    assert next(iter(wrong)) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano/pipeline.yaml", "paper/pipeline_3b.yaml", "paper/pipeline_7b.yaml"])
def test_a_pipelines_parts_agree(name: str) -> None:
    settings = yaml.safe_load((CONFIGS / name).read_text())
    evaluation = yaml.safe_load((ROOT / settings["evaluation"]).read_text())
    phases = [yaml.safe_load((ROOT / path).read_text()) for path in settings["stages"].values()]
    for phase in phases:
        assert phase["experiment"] == settings["experiment"]
        for field in ("box_format", "style", "label_images", "max_resized_pixels"):
            asked = {"style": "think"} if evaluation["form"]["style"] == "auto" else {}  # what auto means for a policy
            assert phase["data"].get(field) == (evaluation["form"] | asked).get(field), field
    assert phases[0]["model"]["init_args"]["model"] == settings["model"] == evaluation["model"]
    merged = f"outputs/{settings['experiment']}/cot_sft/merged"
    assert phases[1]["model"]["init_args"]["model"] == merged, "make grpo goes on from what make sft leaves"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("nano/ablations.yaml", "nano/pipeline.yaml"),
        ("nano/long_ablations.yaml", "nano/long.yaml"),
        ("paper/ablations_7b.yaml", "paper/pipeline_7b.yaml"),
    ],
)
def test_an_ablation_has_the_pipelines_stages_as_rows(name: str, whole: str) -> None:
    rows, stages = (yaml.safe_load((CONFIGS / file).read_text()) for file in (name, whole))
    for field in ("experiment", "model", "synthetic_dataset", "evaluation"):
        assert rows[field] == stages[field], field
    before = "base"
    for stage, config in stages["stages"].items():
        given = stages.get("overrides", {}).get(stage)
        row = {"start": before, "config": config} | ({"overrides": given} if given else {})
        assert rows["rows"][stage] == row, "the steps' keys would differ"
        before = stage
    fields = {"config", "start", "overrides", "without"}
    assert all(row.keys() <= fields and (ROOT / row["config"]).is_file() for row in rows["rows"].values())


def test_grpo_without_a_cold_start_is_worth_as_many_batches_as_the_full_row() -> None:
    rows = yaml.safe_load((CONFIGS / "nano/ablations.yaml").read_text())["rows"]
    full = yaml.safe_load((ROOT / rows["grpo"]["config"]).read_text())
    limits = f"--trainer.max_epochs=1 --trainer.limit_train_batches={full['trainer']['max_steps']}"
    assert rows["grpo_without_cold_start"]["overrides"] == limits


def test_the_ablation_that_a_page_shows_has_rows_that_train_what_it_says(parse, tmp_path: Path) -> None:
    (block,) = marked_blocks(ROOT / "docs/ablations.md")
    path = tmp_path / block.file
    path.parent.mkdir()
    path.write_text(block.text)
    parse_settings(ablations.run, path)
    settings = yaml.safe_load(block.text)
    rows = {name: ablations.Row(**row) for name, row in settings["rows"].items()}
    ablations.check_rows(rows, [ablations.Comparison(**each) for each in settings["comparisons"]], [], None)
    betas = {}
    for name in ("grpo", "weak_kl"):
        overrides = shlex.split(rows[name].overrides)
        betas[name] = parse(str(ROOT / rows[name].config), *overrides).model.loss_settings.kl_beta
    assert betas["weak_kl"] == 0.001 != betas["grpo"]
    data = [settings["synthetic_dataset"], settings["evaluation"], settings["model"]]
    assert all((ROOT / name).exists() for name in data)


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize(
    ("phase", "learning_rate", "total_batch", "style"),
    [("cot_sft", 1e-4, 32, PromptStyle.THINK), ("sft", 2e-6, 64, PromptStyle.ANSWER)],
)
def test_sft_has_the_papers_values(parse, size: str, phase: str, learning_rate, total_batch: int, style) -> None:
    settings = yaml.safe_load((CONFIGS / f"paper/{phase}_{size}.yaml").read_text())
    cli = parse(f"paper/{phase}_{size}.yaml")
    model, data = cli.model, cli.datamodule
    assert model.learning_rate == learning_rate and model.warmup_fraction == 0
    assert data.batch_size * model.accumulate * settings["trainer"]["devices"] == total_batch
    assert data.encoder.max_completion_tokens == 1024 and data.encoder.style is style and data.encoder.with_target
    assert model.lora is not None and model.freeze_vision
    assert model.model == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_grpo_has_the_papers_values(parse, size: str) -> None:
    cli = parse(f"paper/grpo_{size}.yaml")
    model = cli.model
    rollout, loss = model.rollout_settings, model.loss_settings
    assert (model.learning_rate, rollout.group_size, rollout.temperature) == (5e-5, 8, 0.7)
    assert (cli.datamodule.batch_size, model.accumulate, rollout.max_new_tokens) == (2, 4, 1024)
    assert (loss.kl_beta, loss.clip_low, loss.clip_high, loss.reduction) == (0.001, 0.2, 0.2, "completion")
    assert model.rewards.weights == {"accuracy": 1.0, "format": 0.5}
    assert model.freeze_vision and model.updates_per_window == 1
    rejection = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RejectionSampling))
    assert rejection.settings.temperature == rollout.temperature
    assert rejection.settings.max_new_tokens == rollout.max_new_tokens


def test_one_setting_of_a_group_is_changed_and_the_others_stay(parse) -> None:
    plain = parse("nano/grpo.yaml").model
    flags = ["--model.loss.kl_beta=0.5", "--model.reward_weights.format=0.0", "--model.update.minibatches=2"]
    flags += ["--model.rollout.temperature=0.3", "--model.init_args.rollout.vllm.patience=7"]
    flags += ["--model.advantage.scale=none", "--model.loss.entropy.target=0.3", "--model.loss.kl_schedule.kind=linear"]
    model = parse("nano/grpo.yaml", *flags).model
    vllm = replace(plain.rollout_settings.vllm, patience=7)
    assert model.rollout_settings == replace(plain.rollout_settings, temperature=0.3, vllm=vllm)
    loss = plain.loss_settings
    changes = {"entropy": replace(loss.entropy, target=0.3), "kl_schedule": replace(loss.kl_schedule, kind="linear")}
    assert model.loss_settings == replace(loss, kl_beta=0.5, **changes)
    assert model.advantage_settings.scale == "none"
    assert model.update_settings == replace(plain.update_settings, minibatches=2)
    assert model.rewards.weights == {"accuracy": 1.0, "format": 0.0}


def test_a_single_callback_without_a_list_is_a_list_in_the_settings(parse) -> None:
    callbacks = parse("nano/cot_sft.yaml", "--trainer.callbacks=callbacks.throughput.Throughput").settings()["trainer"]
    assert [callback["class_path"] for callback in callbacks["callbacks"]] == ["callbacks.throughput.Throughput"]


@pytest.mark.parametrize("config", ["nano/grpo.yaml", "paper/grpo_7b.yaml"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fragment_changes_its_settings_alone(parse, config: str, name: str) -> None:
    plain = parse(config).settings()["model"]["init_args"]
    cli = parse(config, "--config", str(CONFIGS / f"objectives/{name}.yaml"))
    changed = cli.settings()["model"]["init_args"]

    def flat(settings: dict, before: str = "") -> dict:
        parts = [flat(v, f"{before}{k}.") if isinstance(v, dict) else {f"{before}{k}": v} for k, v in settings.items()]
        return {k: v for part in parts for k, v in part.items()}

    before, after = flat(plain), flat(changed)
    differing = {key: after[key] for key in after if after[key] != before[key]}
    expected = {key: value for key, value in OBJECTIVES[name].items() if before[key] != value}
    assert before.keys() == after.keys() and differing == expected
    assert isinstance(cli.model, GRPO) and cli.model.loss_settings.kl_beta == after["loss.kl_beta"]


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_the_fragment_of_grpo_undoes_another_one(parse, name: str) -> None:
    after = ["--model.loss.dual_clip=9", "--config", str(CONFIGS / "objectives/grpo.yaml")]
    undone = parse("nano/grpo.yaml", "--config", str(CONFIGS / f"objectives/{name}.yaml"), *after)
    assert undone.settings() == parse("nano/grpo.yaml").settings()


@pytest.mark.parametrize("config", ["nano/grpo.yaml", "paper/grpo_7b.yaml"])
@pytest.mark.parametrize("name", REWARDS)
def test_a_fragment_changes_the_accuracy_reward_alone(parse, config: str, name: str) -> None:
    plain = parse(config).settings()["model"]["init_args"]
    changed = parse(config, "--config", str(CONFIGS / f"rewards/{name}.yaml")).settings()["model"]["init_args"]
    (accuracy, *others), (before, *others_before) = changed.pop("rewards"), plain.pop("rewards")
    assert accuracy["class_path"] == f"lightning_modules.rl.rewards.box_rewards.{REWARDS[name]}"
    assert all(accuracy[field] == before[field] for field in ("name", "weight"))
    assert others == others_before and changed == plain


def test_a_vllm_server_can_sample_with_the_lora_settings_of_the_nano_default(parse) -> None:
    servers = "--model.rollout.engine=vllm"
    with pytest.raises(SystemExit, match="lora=None"):
        parse("nano/grpo.yaml", servers)
    model = parse("nano/grpo.yaml", "--config", str(CONFIGS / "nano/grpo_lora.yaml"), servers).model
    assert model.lora.rank == 32 and model.rollout_settings.engine == "vllm"


def test_rows_of_objectives_differ_in_objective_or_reward_alone(parse, tmp_path: Path) -> None:
    """At least six objectives and two rewards, from one cold start, on the prompts of one choice."""
    settings = yaml.safe_load((CONFIGS / "nano/objectives.yaml").read_text())
    objectives, rewards, trainers = {}, {}, set()
    for name, row in settings["rows"].items():
        if row["start"] == "cot_sft":
            cli = parse(ablations.row_config(name, ablations.Row(**row), tmp_path), *row.get("overrides", "").split())
            objectives[name] = (cli.model.advantage_settings, cli.model.loss_settings, cli.model.update_settings)
            rewards[name] = [(type(term.reward).__name__, term.weight) for term in cli.model.rewards.terms]
            trainer = cli.settings()["trainer"]
            rollouts = trainer["max_steps"] // cli.model.updates_per_window
            trainers.add((rollouts, json.dumps(trainer["callbacks"], sort_keys=True, default=str)))
    minibatches = {name: update.minibatches for name, (_, _, update) in objectives.items()}
    assert minibatches == dict.fromkeys(objectives, 4) | {"on_policy": 1}, "objectives_run.yaml is over the fragments"
    others = {name for name in rewards if rewards[name] != rewards["grpo"]}
    assert {rewards[name][0] for name in others} == {("IoUAbove", 1.0), ("GIoU", 1.0)} and len(others) == 2
    assert {objectives[name] for name in others} == {objectives["grpo"]}
    assert len(objectives) - len(others) == len(set(objectives.values())) >= 8 and len(trainers) == 1
    assert {c["row"] for c in settings["comparisons"] if c["over"] == "grpo"} == objectives.keys() - {"grpo"}


@pytest.mark.parametrize("name", [name for name in TRAINING if name.startswith("paper/")])
def test_paper_policies_are_built_on_the_meta_device(parse, tmp_path: Path, name: str) -> None:
    size = name.removesuffix(".yaml")[-2:]
    (tmp_path / "config.json").write_text(json.dumps(qwen_config(size)))
    module = parse(name).model
    with torch.device("meta"):
        policy = QwenVL(str(tmp_path), module.lora, module.dtype_name, module.freeze_vision, module.with_reference)
    assert all(parameter.is_meta for parameter in policy.parameters())
    trained = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key and "visual" not in key for key in trained)
    assert len(trained) == 2 * 7 * SHAPES[size]["num_hidden_layers"]
    frozen = sum(p.numel() for key, p in policy.named_parameters() if key not in trained)
    assert frozen == pytest.approx(PARAMETERS[size], rel=0.01)
