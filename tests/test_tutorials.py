"""Tutorials do what they say: their own blocks are run, with small settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from experiments.asking.grounding_model import GroundingModel
from lightning_modules.serving.openai_client import EndpointSettings
from tests.chat_server import ChatServer, streamed
from tests.datamodules.importers.own_data import own_files
from tests.tutorials import ROOT, marked_blocks, run_page

DOCS = ROOT / "docs"
TRAINED = {"outputs/nano/grpo/merged": "models/nano-base", "outputs/nano/cot_sft/merged": "models/nano-base"}
# Few steps and questions, one process, and no callback that needs the nano dataset.
ONLY_MERGE = ["--trainer.callbacks=callbacks.merge_adapter.MergeAdapter"]
ONLY_MERGE += ["--trainer.callbacks+=callbacks.save_on_interrupt.SaveOnInterrupt"]
SMALL = {
    "experiments.generate_synthetic": [
        "--train_samples=48", "--pool_samples=24", "--eval_per_task=1", "--validation_per_task=1",
    ],
    "experiments.train": [
        "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_steps=2", "--data.batch_size=2", *ONLY_MERGE,
    ],
    "experiments.evaluate": ["--decoding.max_new_tokens=24", "--processes=1"],
}  # fmt: skip
FORM = {"version": 1, "style": "think", "box_format": "absolute_pixels", "label_images": True}
FORM |= {"max_resized_pixels": None, "answer_form": "one_box"}


def draw_images(folder: Path, *names: str) -> None:
    for name, colour in zip(names, ("red", "blue"), strict=True):
        picture = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(picture).rectangle((20, 20, 50, 50), fill=colour)
        picture.save(folder / name)


def test_marked_blocks_are_found_and_others_are_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nraise SystemExit('not run')\n```\n\n<!-- file: a/b.py -->\n```python\nx = 2\n```\n\n"
        "<!-- run -->\n\n    python a/b.py  # a comment\n    ls a\n\nText.\n\n    rm -r a\n\n"
        "<!-- run -->\n```python\nfrom a.b import x\nprint(x)\n```\n"
    )
    assert [(block.file, block.language) for block in marked_blocks(page)] == [
        ("a/b.py", "python"), (None, None), (None, "python"),
    ]  # fmt: skip
    assert run_page(page, tmp_path) == ["b.py\n", "2\n"]
    page.write_text(page.read_text().replace("print(x)", "print(y)"))
    for name in ("experiments", "models"):
        (tmp_path / name).unlink()
    with pytest.raises(AssertionError, match="name 'y' is not defined"):
        run_page(page, tmp_path)


def test_the_snippet_that_asks_a_model_prints_its_answer_and_draws_it(tmp_path: Path) -> None:
    draw_images(tmp_path, "a.jpg", "b.jpg")
    replace = TRAINED | {"Which object of image 1 is in image 2 too?": "Find the blue square in image-2."}
    (said,) = run_page(DOCS / "asking.md", tmp_path, replace=replace)
    assert re.search(r"^image 2: blue square from \(\d+, \d+\) to \(\d+, \d+\)$|^no box: \w+$", said, re.MULTILINE), (
        said
    )
    with Image.open(tmp_path / "answer.png") as drawing:
        assert drawing.height == 420
    (block,) = marked_blocks(DOCS / "asking.md")
    assert len(block.text.splitlines()) <= 20


def served_model(folder: Path) -> Path:
    """A folder that a server would name a model by: with the form of a training."""
    model = folder / "outputs/nano/grpo/merged"
    model.mkdir(parents=True)
    (model / "prompt_form.json").write_text(json.dumps(FORM))
    return model


def test_the_requests_of_the_page_on_serving_are_those_of_the_code(tmp_path: Path, monkeypatch) -> None:
    draw_images(tmp_path, "a.png", "b.png")
    served_model(tmp_path)
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with ChatServer(lambda request: streamed("there") if request.get("stream") else "grey") as server:
        (said,) = run_page(DOCS / "serving.md", tmp_path, replace={"http://localhost:8000/v1": server.base_url})
        name = "outputs/nano/grpo/merged"
        model = GroundingModel(name, endpoint=EndpointSettings(base_url=server.base_url))
        model.ask(["a.png", "b.png"], "Find the red kite in image 2.")
        client, _, ours = server.requests
    assert said == "there"
    curl = json.loads(re.search(r"<<END\n(.*?)\nEND", page, re.DOTALL)[1])
    for request in (client, curl):
        assert {name: request[name] for name in ("model", "temperature", "max_completion_tokens")} == {
            name: ours[name] for name in ("model", "temperature", "max_completion_tokens")
        }
        assert kinds(request) == kinds(ours) and texts(request) == texts(ours)
    assert client["messages"] == ours["messages"], "the images too, which need no other size"
    assert json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]) == FORM


def kinds(request: dict) -> list[str]:
    return [part["type"] for part in request["messages"][0]["content"]]


def texts(request: dict) -> list[str]:
    return [part["text"] for part in request["messages"][0]["content"] if part["type"] == "text"]


def test_the_prompts_on_the_page_on_serving_are_those_of_the_code() -> None:
    from datamodules.encoding.messages import PromptStyle, style_suffix
    from datamodules.encoding.prompt_form import LABEL
    from datamodules.samples.answer_text import AnswerForm

    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    shown = [text.strip() for text in re.findall(r"```prompt\n(.*?)```", page, re.DOTALL)]
    think, answer = (style_suffix(style, AnswerForm.ONE_BOX) for style in (PromptStyle.THINK, PromptStyle.ANSWER))
    named = [style_suffix(style, AnswerForm.NAMED_IMAGE) for style in (PromptStyle.THINK, PromptStyle.ANSWER)]
    assert shown == [think.strip(), named[1].strip()]
    assert think.endswith(answer) and named[0] == think.removesuffix(answer) + named[1]
    assert f"`{LABEL.format(1)}`" in page and f"`{LABEL.format(2)}`" in page


@pytest.mark.slow
def test_the_tutorial_on_own_data_ends_with_scores(tmp_path: Path) -> None:
    records = own_files.records("qwen")
    root = own_files.write_jsonl(tmp_path / "kites", records)
    (root / "val.jsonl").write_text((root / "train.jsonl").read_text())
    replace = {"ROOT=/data/kites": f"ROOT={root}"}
    imported, trained = run_page(DOCS / "own_data.md", tmp_path, SMALL, replace)
    assert (tmp_path / "data/kites/train/manifest.json").is_file() and "wrote" in imported
    assert (tmp_path / "outputs/kites/cot_sft/benchmarks/shards-kites-val/result.json").is_file() and "avg" in trained


@pytest.mark.slow
def test_the_tutorial_on_own_rewards_ends_with_a_page_of_both_runs(tmp_path: Path) -> None:
    flags = SMALL | {"experiments.train": [*SMALL["experiments.train"], "--model.rollout.max_new_tokens=64"]}
    tried, *_ = run_page(DOCS / "own_reward.md", tmp_path, flags, TRAINED)
    assert tried == "1.0 0.0\n"
    for name in ("kites", "kites-short"):
        rollouts = (tmp_path / f"outputs/{name}/grpo/rollouts.jsonl").read_text().splitlines()
        assert {"short", "centre", "accuracy", "format"} <= set(json.loads(rollouts[0])["rewards"][0])
    assert "reward/centre" in (tmp_path / "outputs/compare/index.html").read_text()


@pytest.mark.slow
def test_the_tutorial_on_an_own_benchmark_ends_with_a_score_for_each_task(tmp_path: Path) -> None:
    *_, said = run_page(DOCS / "own_benchmark.md", tmp_path, SMALL, TRAINED)
    assert re.search(r"^large: \d+\.\d % of 6 questions", said, re.MULTILINE) and "small: " in said
