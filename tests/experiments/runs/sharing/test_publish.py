"""The model card holds the numbers of the results, and `make publish` uploads the folder, the card and the adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from datamodules.encoding.messages import THINK_SUFFIX
from datamodules.metrics.result_files import write_evaluation
from experiments import evaluate, train
from experiments.runs.sharing.model_card import CARD, _result_table, card_text, phase_results, write_model_card
from tests.experiments.conftest import ROOT, Workbench
from tests.experiments.phase_results import summary
from tests.experiments.test_pipeline import evaluation
from tests.hub_stub import HubStub, hub_stub

BASE = "base_model_name_or_path"  # in PEFT's configuration of an adapter


@pytest.fixture
def phase(workbench: Workbench) -> Path:
    """A trained and evaluated phase of the tiny model."""
    train.main(["--config", workbench.training("cot_sft"), "--data.label_images=true"])
    folder = workbench.outputs / "tiny" / "cot_sft"
    config = workbench.write_yaml("eval", evaluation(workbench))
    evaluate.main(["--config", config, "--model", str(folder / "merged"), "--output", str(folder / "benchmarks")])
    return folder


def test_the_card_holds_the_numbers_the_settings_the_prompt_and_the_commit(phase: Path) -> None:
    text = write_model_card(phase, "apache-2.0").read_text()
    front, _, body = text.removeprefix("---\n").partition("---\n")
    fields = yaml.safe_load(front)
    assert fields["pipeline_tag"] == "image-text-to-text" and fields["license"] == "apache-2.0"
    assert "base_model" not in fields, "a folder of this machine is no model of the Hub"
    # Every number of the result, under its name.
    (result,) = phase_results(phase)
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", body, re.MULTILINE))
    cells = result["averages"] | result["columns"]
    assert {name: float(rows[name]) for name in cells} == {
        name: round(cell["score"], 2) for name, cell in cells.items()
    }
    config = yaml.safe_load((phase / "config.yaml").read_text())
    assert f"started from: `…/{Path(config['model']['init_args']['model']).name}`" in body
    assert "| `learning_rate` | 0.001 |" in body and "rank: 4, alpha: 8" in body
    assert json.loads((phase / "started.json").read_text())["commit"] in body
    assert f"```text\n{THINK_SUFFIX.strip()}\n```" in body


def test_a_card_without_results_says_so_and_names_a_base_model_of_the_hub(phase: Path) -> None:
    for file in (phase / "benchmarks").rglob("result.json"):
        file.unlink()
    config = yaml.safe_load((phase / "config.yaml").read_text())
    config["model"]["init_args"]["model"] = "Qwen/Qwen2.5-VL-7B-Instruct"
    (phase / "config.yaml").write_text(yaml.safe_dump(config))
    text = write_model_card(phase).read_text()
    assert "This model was not evaluated." in text and "base_model: Qwen/Qwen2.5-VL-7B-Instruct" in text
    assert "license:" not in text


def test_a_card_tells_apart_how_its_results_were_measured(tmp_path: Path) -> None:
    results = {
        "mig_bench": summary(),
        "mig_bench-0123456789abcdef": summary(12.34),  # a later evaluation with other settings
        "mig_bench-limit5": summary(limit=5),
        "mig_bench-model-generation": summary(generation="model"),
    }
    for name, result in results.items():
        write_evaluation(tmp_path / "benchmarks" / name, (), result)
    config = {"model": {"class_path": "m.GRPO", "init_args": {"model": "m"}}, "data": {"shards": "s"}}
    text = card_text("tiny", config, phase_results(tmp_path), {}, "abc")
    assert re.findall(r"^\*\*mig_bench\*\* in `d`, (.*), in %", text, re.MULTILINE) == [
        "all questions",
        "5 questions of each column",
        "all questions, the model's own generation settings",
    ]
    assert "12.34" not in text


def test_the_code_in_the_card_asks_the_model_as_it_was_trained(phase: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", write_model_card(phase).read_text(), re.DOTALL)
    before = "from PIL import Image\nimage_1, image_2 = Image.new('RGB', (112, 84)), Image.new('RGB', (84, 112))\n"
    code = code.replace("max_new_tokens=1024", "max_new_tokens=4").replace(', device_map="auto"', "")
    run = subprocess.run(
        [sys.executable, "-c", before + code + "\nprint('PROMPT', text)"],
        cwd=phase / "merged",
        capture_output=True,
        text=True,
        check=True,
    )
    prompt = run.stdout.partition("PROMPT ")[2]
    assert "Picture 2: " in prompt and THINK_SUFFIX in prompt


def published(hub: HubStub, model: Path, *more: str, key: str | None = "hf_secret") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(model / "no-home")}
    environment |= {"HF_TOKEN": key} if key else {}
    command = [sys.executable, "-m", "experiments.runs.sharing.publish", "--model", str(model), "--repo", "me/x", *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_folder_its_card_and_the_adapter_are_uploaded(phase: Path) -> None:
    with hub_stub() as hub:
        run = published(hub, phase / "merged", "--private=true", "--license_name=apache-2.0")
        assert run.returncode == 0, run.stderr
        assert f"published: {hub.url}/me/x/commit/2" in run.stdout
    assert (hub.private == {"me/x": True} and hub.keys == {"Bearer hf_secret", None}) or hub.keys == {
        "Bearer hf_secret"
    }
    local = {path.name: path.read_bytes() for path in (phase / "merged").iterdir() if path.is_file()}
    assert {name: content for name, content in hub.files.items() if "/" not in name} == local
    assert CARD in local and "license: apache-2.0" in local[CARD].decode()
    adapter = {name: content for name, content in hub.files.items() if name.startswith("adapter/")}
    assert adapter.keys() == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    tensors = load_file(phase / "adapter" / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    # No file has a path of this machine. PEFT's configuration would have that of the base model.
    assert not [name for name, content in hub.files.items() if str(phase.parents[2]).encode() in content]
    base = json.loads(hub.files["adapter/adapter_config.json"])[BASE]
    assert base == "…/model" and Path(json.loads((phase / "adapter/adapter_config.json").read_text())[BASE]).is_dir()


def test_a_model_without_an_adapter_replaces_an_earlier_one_with_all_of_its_weights(phase: Path) -> None:
    with hub_stub() as hub:
        assert published(hub, phase / "merged").returncode == 0
        again = published(hub, phase / "merged")
        assert again.returncode == 0 and not hub.deleted, "the same model again deletes nothing"
        assert "adapter/adapter_model.safetensors" in hub.files
        # An earlier model with weights in two files, and a file of the owner.
        stale = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
        hub.files |= dict.fromkeys([*stale, "notes.md", ".gitattributes"], b"earlier")
        shutil.rmtree(phase / "adapter")  # as after a training of all weights
        run = published(hub, phase / "merged")
        assert run.returncode == 0, run.stderr
    assert set(hub.deleted) == stale | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    local = {path.name for path in (phase / "merged").iterdir() if path.is_file()}
    assert hub.files.keys() == local | {"notes.md", ".gitattributes"}


@pytest.mark.parametrize(("status", "word"), [(401, "401"), (403, "403"), (500, "500")])
def test_a_refusal_of_the_hub_is_one_short_message(phase: Path, status: int, word: str) -> None:
    with hub_stub() as hub:
        hub.refuse = status
        run = published(hub, phase / "merged")
    assert run.returncode == 1 and word in run.stderr and "me/x" in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 5 and "Traceback" not in run.stderr


def test_what_cannot_be_published_is_told_before_anything_is_sent(phase: Path) -> None:
    with hub_stub() as hub:
        without_key = published(hub, phase / "merged", key=None)
        wrong = published(hub, phase)
        name = published(hub, phase / "merged", "--repo=me")
    assert "HF_TOKEN" in without_key.stderr and "merged" in wrong.stderr and "owner/name" in name.stderr
    for run in (without_key, wrong, name):
        assert run.returncode == 1 and len(run.stderr.strip().splitlines()) <= 5 and "Traceback" not in run.stderr
    assert not hub.files and not hub.private


def test_a_card_says_in_which_folder_the_questions_were(tmp_path: Path) -> None:
    """A replica of drawn scenes, or validation questions, have the benchmark's name too."""
    assert "**mig_bench** in `data/nano/validation`, all questions" in _result_table(
        summary(data_root="data/nano/validation")
    )
    assert "in `…/MIG`" in _result_table(summary(data_root="/home/jane/MIG"))
