"""Mistakes of a user: each is answered in at most five lines with place, value and cure, and nothing is lost."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from datamodules.checkpoints.model_folder import ModelError, local_folder
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from experiments import (
    ablations,
    compare,
    evaluate,
    generate_synthetic,
    import_shards,
    inspect_shards,
    pipeline,
    sweep,
    synthesize,
    train,
)
from experiments.asking import ask_model, demo
from experiments.evaluation import rescore
from experiments.reports import pipeline_report
from experiments.reports.live import watch
from experiments.reports.predictions import browse_answers
from experiments.runs.command_line import mig
from experiments.runs.overview import run_table
from experiments.runs.sharing import publish
from experiments.runs.usage_errors import explain, suggest
from tests.datamodules.importers.own_data import own_files
from tests.experiments.conftest import REJECTION, Workbench
from tests.outside_make import outside_make

ROOT = Path(__file__).resolve().parents[2]
NANO = "experiments/configs/nano"
Main = Callable[[list[str]], None]
TAKEN: list[socket.socket] = []  # open until the tests end
Prepare = Callable[[Workbench], tuple[Main, list[str]]]


@pytest.fixture(autouse=True)
def one_command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["train"])  # LightningCLI warns when it is given arguments in two ways
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    yield
    while TAKEN:
        TAKEN.pop().close()


def on_nano(main: Main, config: str, *more: str) -> Prepare:
    """A command with a YAML of the nano default."""
    return lambda bench: (main, ["--config", f"{NANO}/{config}.yaml", *more])


def alone(main: Main, *words: str) -> Prepare:
    """A command without a YAML."""
    return lambda bench: (main, list(words))


def on_bench(*more: str) -> Prepare:
    """CoT-SFT of the tiny experiment."""
    return lambda bench: (train.main, ["--config", bench.training("cot_sft"), "--trainer.logger=false", *more])


def apart(*command: str) -> Prepare:
    """A command of the shell; it ends as a command in this process does, with what it printed as the message."""

    def run(arguments: list[str]) -> None:
        ended = subprocess.run(command, cwd=ROOT, env=outside_make(), capture_output=True, text=True, timeout=60)
        assert not ended.stdout
        raise SystemExit(ended.stderr.strip() if ended.returncode else 0)

    return lambda bench: (run, [])


def of_make(variable: str) -> Prepare:
    """`make grpo` with a variable."""

    def prepare(bench: Workbench) -> tuple[Main, list[str]]:
        if shutil.which("make") is None:
            pytest.skip("needs make")
        return apart("make", "-n", "grpo", variable)(bench)

    return prepare


def in_yaml(old: str, new: str) -> Prepare:
    """CoT-SFT by a YAML with a mistake."""

    def prepare(bench: Workbench) -> tuple[Main, list[str]]:
        text = Path(bench.root, "wrong.yaml")
        text.write_text((ROOT / NANO / "cot_sft.yaml").read_text().replace(old, new, 1))
        return train.main, ["--config", str(text)]

    return prepare


def no_yaml(bench: Workbench) -> tuple[Main, list[str]]:
    (bench.root / "bad.yaml").write_text("a: [1, 2\nb: {")
    return train.main, ["--config", str(bench.root / "bad.yaml")]


def in_benchmark(**changes: object) -> Prepare:
    """MIG-Bench whose second question is changed."""

    def prepare(bench: Workbench) -> tuple[Main, list[str]]:
        root = bench.root / "own"
        shutil.copytree(bench.root / "MIG-Bench", root / "MIG-Bench")
        records = json.loads((root / "MIG-Bench/MIG_data.json").read_text())
        records[1] |= changes
        (root / "MIG-Bench/MIG_data.json").write_text(json.dumps(records))
        words = ["--config", f"{NANO}/eval.yaml", f"--model={bench.model}", f"--data_root={root}", "--replicas=false"]
        return evaluate.main, [*words, f"--output={bench.root / 'evaluated'}"]

    return prepare


def after_a_run(*more: str) -> Prepare:
    """Other settings in the folder of a finished run."""

    def prepare(bench: Workbench) -> tuple[Main, list[str]]:
        words = ["--config", bench.training("cot_sft"), "--trainer.logger=false", "--trainer.max_steps=1"]
        train.main(words)
        return train.main, [*words, *more]

    return prepare


def too_few_kept(bench: Workbench) -> tuple[Main, list[str]]:
    return train.main, ["--config", bench.training("grpo", [REJECTION]), "--trainer.logger=false"]


def unsolved(bench: Workbench) -> tuple[Main, list[str]]:
    return import_shards.main, import_words(bench.root, own_files.records("qwen", count=20), range(12))


def import_words(root: Path, records: list[dict], broken: range) -> list[str]:
    for number in broken:
        records[number]["images"][1] = "images/gone.jpg"
    mine = own_files.write_jsonl(root / "mine", records)
    return ["--source=jsonl", f"--root={mine}", f"--out={root / 'imported'}", "--own.box_format=pixels"]


def without_thinking(bench: Workbench) -> tuple[Main, list[str]]:
    settings = yaml.safe_load(Path(bench.training("cot_sft")).read_text())
    settings["data"] |= {"shards": str(bench.root / "plain_shards"), "style": "think"}
    reader = ShardReader([str(bench.root / "shards")])
    with ShardWriter(bench.root / "plain_shards") as writer:
        for number in range(reader.count):
            loaded = reader.read(number)
            object.__setattr__(loaded.sample, "thinking", None)
            writer.add(loaded)
    return train.main, ["--config", bench.write_yaml("plain", settings), "--trainer.logger=false"]


def refused_server(bench: Workbench) -> tuple[Main, list[str]]:
    words = ["--config", f"{NANO}/synthesize.yaml", "--endpoint.base_url=http://127.0.0.1:9/v1", "--endpoint.model=x"]
    return synthesize.main, [*words, f"--questions={bench.root / 'shards'}", f"--output={bench.root / 'syn'}"]


def port_in_use(bench: Workbench) -> tuple[Main, list[str]]:
    taken = socket.create_server(("127.0.0.1", 0))
    TAKEN.append(taken)  # else it is closed at once
    command = [sys.executable, "lightning_modules/serving/vllm_server.py", "--venv", str(bench.root / "venv")]
    return apart(*command, "--model", str(bench.model), "--port", str(taken.getsockname()[1]))(bench)


def linked_model(bench: Workbench) -> tuple[Main, list[str]]:
    return train.main, ["--config", f"{NANO}/grpo.yaml", "--experiment=mine", f"--outputs={bench.outputs}"]


def swept_without(bench: Workbench) -> tuple[Main, list[str]]:
    """`make sweep` with a parameter that does not exist, before what its trials need is made."""
    settings = yaml.safe_load((ROOT / NANO / "sweep.yaml").read_text())
    settings["parameters"] = {"model.init_args.loss.kl_bta": {"values": [0.1]}}
    words = ["--config", bench.write_yaml("sweep", settings), *UNMADE]
    return apart(sys.executable, "-m", "experiments.sweep", *words)(bench)


UNMADE = ("--check_without=[data/nano,outputs/nano/cot_sft]",)
SERVER = (sys.executable, "lightning_modules/serving/vllm_server.py", "--venv", "/nope/venv", "--model")
# A mistake, how to make it, and what the message must have: the setting, the value, and the cure.
MISTAKES: list[tuple[str, Prepare, tuple[str, ...]]] = [
    # names
    (
        "a setting",
        on_nano(train.main, "cot_sft", "--model.learning_rat=0.01"),
        ("--model.learning_rat=0.01", "did you mean model.learning_rate?"),
    ),
    (
        "init_args",
        on_nano(train.main, "grpo", "--model.init_args.looss.kl_beta=1"),
        ("--model.looss.kl_beta=1", "did you mean model.loss.kl_beta?"),
    ),
    (
        "a group's setting",
        on_nano(train.main, "cot_sft", "--model.lora.rnk=4"),
        ("--model.lora.rnk=4", "did you mean model.lora.rank?"),
    ),
    (
        "two settings",
        on_nano(train.main, "cot_sft", "--trainer.max_stps=3", "--data.batch_sise=3"),
        ("--trainer.max_stps=3", "did you mean trainer.max_steps?", "--data.batch_sise=3", "data.batch_size?"),
    ),
    (
        "the experiment",
        on_nano(train.main, "cot_sft", "--expriment", "mine"),
        ("--expriment", "did you mean experiment?"),
    ),
    ("an abbreviation", on_nano(train.main, "cot_sft", "--exper", "mine"), ("--exper", "did you mean experiment?")),
    (
        "an abbreviated setting",
        on_nano(train.main, "cot_sft", "--model.learning_r=1"),
        ("model.learning_r=1", "did you mean model.learning_rate?"),
    ),
    ("eval, a flag", on_nano(evaluate.main, "eval", "--modl", "x"), ("--modl", "did you mean model?")),
    ("eval, abbreviated", on_nano(evaluate.main, "eval", "--mod=x"), ("--mod=x", "did you mean model?")),
    (
        "eval, a group",
        on_nano(evaluate.main, "eval", "--endpoint.base_ur=x"),
        ("endpoint.base_ur=x", "did you mean endpoint.base_url?"),
    ),
    ("sweep", on_nano(sweep.main, "sweep", "--trails", "2"), ("--trails", "did you mean trials?")),
    ("sweep, abbreviated", on_nano(sweep.main, "sweep", "--tria", "2"), ("--tria", "did you mean trials?")),
    ("ablations", on_nano(ablations.main, "ablations", "--sedes=[1]"), ("--sedes", "did you mean seeds?")),
    ("synthesize", on_nano(synthesize.main, "synthesize", "--limits=3"), ("--limits=3", "did you mean limit?")),
    (
        "shards",
        on_nano(generate_synthetic.main, "shards", "--train_smples=3"),
        ("--train_smples=3", "did you mean train_samples?"),
    ),
    ("compare", alone(compare.main, "--rns", "outputs/nano"), ("--rns", "did you mean runs?")),
    ("mig", alone(mig.main, "trian"), ("mig trian", "did you mean train?")),
    ("runs", alone(run_table.main, "--yes"), ("--yes", "--clean")),
    (
        "pipeline, a stage's setting",
        on_nano(pipeline.main, "pipeline", "--trainer.max_steps=3"),
        ("--trainer.max_steps=3", "--overrides.grpo="),
    ),
    ("make ARG=", of_make("ARG=--trainer.max_steps=1"), ("ARG", "ARGS")),
    ("make CONFG=", of_make("CONFG=a.yaml"), ("CONFG", "CONFIG")),
    (
        "the seed of the model alone",
        on_nano(train.main, "cot_sft", "--model.seed=5"),
        ("--model.seed=5", "Give seed_everything instead"),
    ),
    # names in a YAML
    (
        "YAML, a setting",
        in_yaml("learning_rate:", "lerning_rate:"),
        ("wrong.yaml, line 10: ", "lerning_rate=", "did you mean model.learning_rate?"),
    ),
    (
        "YAML, a callback's setting",
        in_yaml("{every_n_steps:", "{evry_n_steps:"),
        ("wrong.yaml, line ", "evry_n_steps=", "WindowCheckpoint", "every_n_steps?"),
    ),
    (
        "YAML, a class",
        in_yaml("merge_adapter.MergeAdapter", "merge_adapter.MrgeAdapter"),
        ("wrong.yaml, line ", "MrgeAdapter", "merge_adapter.MergeAdapter?"),
    ),
    (
        "YAML, the experiment",
        in_yaml("experiment:", "exprmnt:"),
        ("wrong.yaml, line 2: ", "exprmnt=nano", "did you mean experiment?"),
    ),
    (
        "YAML, the seed of the model alone",
        in_yaml("learning_rate:", "seed: 5\n    learning_rate:"),
        ("wrong.yaml, line 10: model.seed=5", "Give seed_everything instead"),
    ),
    ("no such YAML", alone(train.main, "--config", "nope.yaml"), ("nope.yaml", "not exist")),
    ("no arguments", alone(train.main), ("no value for", "experiment", "--config")),
    ("no valid YAML", no_yaml, ("bad.yaml", "line 2")),
    # values
    ("a group", on_nano(train.main, "cot_sft", "--model.lora=abc"), ("model.lora='abc'", "a group of settings")),
    ("a choice", on_nano(train.main, "cot_sft", "--data.style=thnk"), ("data.style='thnk'", "did you mean think?")),
    (
        "a number",
        on_nano(train.main, "cot_sft", "--model.learning_rate=high"),
        ("model.learning_rate='high'", "a number"),
    ),
    (
        "a whole number",
        on_nano(train.main, "cot_sft", "--seed_everything=abc"),
        ("seed_everything='abc'", "a whole number"),
    ),
    ("SEED", on_nano(train.main, "cot_sft", "--seed", "abc"), ("--seed='abc'", "a whole number")),
    ("pipeline SEED", on_nano(pipeline.main, "pipeline", "--seed=abc"), ("seed='abc'", "a whole number")),
    (
        "eval, a choice",
        on_nano(evaluate.main, "eval", "--form.style=thnk"),
        ("form.style='thnk'", "did you mean think?"),
    ),
    (
        "eval, a range",
        on_nano(evaluate.main, "eval", "--endpoint.timeout=-1"),
        ("timeout=-1", "must be greater than 0"),
    ),
    ("ablations, a row", on_nano(ablations.main, "ablations", "--only=[sfft]"), ("'sfft'", "'sft'")),
    ("LoRA rank 0", on_bench("--model.lora.rank=0"), ("rank=0", "greater than 0")),
    (
        "AdamW",
        on_bench("--model.weight_decay=-0.1", "--model.betas=[0.9,1.5]"),
        ("model.weight_decay=-0.1 must be at least 0", "model.betas=(0.9, 1.5) must be two numbers in [0, 1)"),
    ),
    (
        "null for a number",
        on_bench("--model.lora.rank=null", "--model.accumulate=null"),
        ("model.lora.rank=null: ", "model.accumulate=null: "),
    ),
    (
        "no end",
        on_bench("--trainer.max_steps=-1", "--trainer.max_epochs=-1"),
        ("trainer.max_steps=-1", "trainer.max_epochs=-1", "set trainer.max_steps"),
    ),
    (
        "a moving reference, sharded",
        lambda bench: (
            train.main,
            ["--config", bench.training("grpo"), "--trainer.strategy=sharded", "--model.loss.reference_every=1"],
        ),
        ("model.loss.reference_every=1", "trainer.strategy='sharded'", "use ddp or one device"),
    ),
    ("no devices", on_bench("--trainer.devices=0"), ("trainer.devices='0'", "such as 1")),
    ("a strategy", on_bench("--trainer.strategy=dpp"), ("trainer.strategy='dpp'", "did you mean ddp?")),
    ("what Lightning alone checks", on_bench("--trainer.limit_train_batches=-1"), ("trainer: ", "limit_train_batches")),
    ("a batch too large", on_bench("--data.batch_size=1000"), ("data.batch_size=1000", "--data.batch_size=")),
    (
        "GPUS",
        on_nano(train.main, "grpo", "--gpus=7"),
        ("--gpus=7", "total batch of 64", "Use 1, 2, 4, 8, 16, 32, 64 GPUs"),
    ),
    (
        "GPUS and devices",
        on_nano(train.main, "grpo", "--gpus=2", "--trainer.devices=2"),
        ("--gpus=2", "--trainer.devices"),
    ),
    # before the nano dataset and the CoT-SFT model are made
    (
        "first, a benchmark",
        on_nano(evaluate.main, "eval", "--bench=blinkk", "--check_without=[data/nano]"),
        ("bench='blinkk'", "blink"),
    ),
    (
        "first, a model to evaluate",
        on_nano(evaluate.main, "eval", "--model=outputs/no-such-model", "--check_without=[data/nano]"),
        ("'outputs/no-such-model'", "there is no folder"),
    ),
    (
        "first, other data",
        on_nano(evaluate.main, "eval", "--data_root=data/nope", "--check_without=[data/nano]"),
        ("data/nope", "data_root is the folder of the benchmarks"),
    ),
    (
        "first, a value",
        on_nano(train.main, "cot_sft", "--check_without=[data/nano]", "--model.lora.rank=0"),
        ("rank=0", "greater than 0"),
    ),
    (
        "first, shards",
        on_nano(train.main, "cot_sft", "--check_without", "[data/nano]", "--data.shards=data/nope"),
        ("data.shards='data/nope'", "manifest.json"),
    ),
    (
        "first, questions",
        on_nano(synthesize.main, "synthesize", *UNMADE, "--questions=data/nope"),
        ("questions='data/nope'", "manifest.json"),
    ),
    (
        "first, a teacher",
        on_nano(synthesize.main, "synthesize", *UNMADE, "--endpoint.model=outputs/nope"),
        ("endpoint.model: there is no folder 'outputs/nope'", "endpoint.base_url"),
    ),
    ("first, a sweep", swept_without, ("--model.loss.kl_bta=0.1", "did you mean model.loss.kl_beta?")),
    # files, models, data
    (
        "an image to ask about",
        alone(ask_model.main, "--model=nano", "--images=[nope.png]", "--question=Where?"),
        ("nope.png",),
    ),
    ("a model", on_bench("--model.model=models/nano-bas"), ("models/nano-bas", "did you mean 'models/nano-base'?")),
    ("shards", on_bench("--data.shards=data/nope"), ("data/nope", "manifest.json")),
    ("a benchmark", on_nano(evaluate.main, "eval", "--bench=blinkk", "--replicas=false"), ("bench='blinkk'", "blink")),
    (
        "data_root",
        on_nano(evaluate.main, "eval", "--data_root=data/nope", "--replicas=false"),
        ("data/nope", "data_root is the folder of the benchmarks", "make shards"),
    ),
    (
        "eval, a model",
        on_nano(evaluate.main, "eval", "--model=outputs/no-such-model", "--replicas=false"),
        ("'outputs/no-such-model'", "there is no folder"),
    ),
    ("a source", alone(import_shards.main, "--source=mgrouding", "--root=x"), ("mgrouding", "mgrounding")),
    ("samples", alone(inspect_shards.main, "--data", "data/no-such-data"), ("data/no-such-data",)),
    (
        "a report of nothing",
        alone(pipeline_report.main, "--folder", "outputs/no-such-run"),
        ("--folder=outputs/no-such-run",),
    ),
    (
        "a comparison of nothing",
        alone(compare.main, "--runs", "outputs/no-such-run"),
        ("outputs/no-such-run", "make pipeline"),
    ),
    (
        "answers of nothing",
        alone(browse_answers.main, "--runs", "outputs/no-such-run"),
        ("--runs=outputs/no-such-run", "make eval MODEL="),
    ),
    (
        "scores of nothing",
        alone(rescore.main, "--predictions=outputs/no-such-run"),
        ("predictions='outputs/no-such-run'", "make eval MODEL="),
    ),
    ("a model to publish", alone(publish.main, "--model=outputs/no-such-run", "--repo=a/b"), ("outputs/no-such-run",)),
    ("a repository", alone(publish.main, "--model=models/nano-base", "--repo=me"), ("repo='me'", "owner/name")),
    (
        "a benchmark's image",
        in_benchmark(images=["gone.png", "gone.png"]),
        ("mig_bench/1", "gone.png", "must be the one that holds"),
    ),
    (
        "a benchmark's task",
        in_benchmark(task="reasonning"),
        ("mig_bench/1", "task is 'reasonning'", "group_grounding, reasoning"),
    ),
    ("no thinking", without_thinking, ("missing_thinking", "--data.style=answer", "make synthesize")),
    ("rejection sampling keeps too few", too_few_kept, ("rejection sampling kept", "of 12", "threshold")),
    ("an import rejects too many", unsolved, ("12 of 20 samples rejected", "max_rejected=0.2", "missing_image")),
    # machines and servers
    ("no GPU", on_bench("--trainer.accelerator=gpu"), ("trainer.accelerator='gpu'", "--trainer.accelerator=cpu")),
    (
        "eval, no GPU",
        on_nano(evaluate.main, "eval", "--device=cuda", "--replicas=false"),
        ("device='cuda'", "--device=cpu"),
    ),
    ("eval, a device", on_nano(evaluate.main, "eval", "--device=gpu", "--replicas=false"), ("device='gpu'", "cuda:0")),
    ("a refused server", refused_server, ("http://127.0.0.1:9/v1",)),
    ("a port in use", port_in_use, ("--port=", "in use", "Name another port")),
    ("watch, a port", alone(watch.main, "--port", "99999"), ("--port=99999", "below 65536")),
    ("demo, a port", alone(demo.main, "--port=99999"), ("port=99999", "1..65535")),
    ("vLLM's port", apart(*SERVER, "models/nano-base", "--port", "99999"), ("--port=99999", "65535")),
    ("vLLM, no such folder", apart(*SERVER, "/nope"), ("--model=/nope",)),
    ("vLLM, no such folder here", apart(*SERVER, "experiments/nope"), ("--model=experiments/nope",)),
    ("vLLM, no outputs yet", apart(*SERVER, "outputs/no-such-model"), ("--model=outputs/no-such-model",)),
    ("vLLM, no model", apart(*SERVER, "experiments"), ("--model=experiments", "config.json")),
    # runs
    (
        "another learning rate",
        after_a_run("--model.learning_rate=0.5"),
        ("model.learning_rate: 0.001 -> 0.5", "nothing was moved", "--experiment NAME", "REDO=1"),
    ),
    (
        "an experiment without its CoT-SFT",
        linked_model,
        ("mine/cot_sft/merged", "Train mine/cot_sft first", "--model.model=FOLDER"),
    ),
]


@pytest.mark.parametrize(("prepare", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_in_five_lines_and_nothing_is_moved_or_lost(
    prepare: Prepare, parts: tuple[str, ...], workbench: Workbench, capsys
) -> None:
    main, arguments = prepare(workbench)
    capsys.readouterr()
    before, here = contents(workbench.outputs), sorted(ROOT.glob("outputs/*"))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    message, printed = str(caught.value.code), capsys.readouterr()
    assert isinstance(caught.value.code, str), "the message is printed to stderr, and the exit code is 1"
    assert_short(message, *parts)
    for text in (message, printed.err, printed.out):
        assert "usage:" not in text and "Traceback" not in text and "NestedArg" not in text
    assert before.items() <= contents(workbench.outputs).items(), "nothing is changed or removed"
    assert not [path for path in workbench.outputs.glob("*/*.*") if not path.name.startswith(".")], "nothing is moved"
    assert sorted(ROOT.glob("outputs/*")) == here
    assert not (workbench.root / "venv").exists()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the locks."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def assert_short(message: str, *parts: str) -> None:
    assert 1 <= len(message.splitlines()) <= 5, message
    for part in parts:
        assert part in message, message


def test_no_program_takes_abbreviated_flags() -> None:
    """argparse takes --seed for --seed_everything, until another flag begins so too."""
    for file in (
        file
        for folder in ("experiments", "lightning_modules", "datamodules", "callbacks", "tests", "docs")
        for file in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                assert "allow_abbrev=False" in ast.unparse(node), f"{file}, line {node.lineno}"


def test_a_path_below_a_folder_here_is_not_asked_of_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "nano").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"there is no folder 'outputs/nanoo'; did you mean 'outputs/nano'\?"):
        local_folder("outputs/nanoo")
    with pytest.raises(ModelError, match=r"there is no folder 'outputs/xyzzy'; name another"):
        local_folder("outputs/xyzzy")


def test_a_path_in_outputs_is_not_asked_of_the_hub_in_a_fresh_clone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no folder 'outputs/nano'"):
        local_folder("outputs/nano")


def test_suggestions_know_the_last_part_of_a_nested_name() -> None:
    assert suggest("model.beta", ["model.loss.kl_beta", "model.seed"]) == "; did you mean model.loss.kl_beta?"
    assert suggest("model.xyzzy", ["model.loss.kl_beta", "model.seed"]) == ""


def test_a_message_of_unknown_form_is_cut_and_not_lost() -> None:
    text = explain("\n".join(["", *(f"line {k} {'x' * 400}" for k in range(30))]))
    assert len(text.splitlines()) == 5 and re.match("line 0 x+", text)
