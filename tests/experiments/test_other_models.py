"""`make eval` with models of other families: behind a server, and in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.checkpoints.model_folder import PROMPT_FORM
from datamodules.encoding.messages import CHOICE_SUFFIX
from datamodules.encoding.model_families import find_model_family
from datamodules.samples.answer_text import FAILURE_KINDS
from datamodules.samples.boxes import BoxFormat
from datamodules.synthetic.benchmark_replicas import write
from experiments import evaluate
from experiments.evaluation import rescore
from experiments.evaluation.choose_predictor import ImageTextSettings, PolicySettings, choose_predictor
from experiments.evaluation.evaluation_settings import AskedModel, Evaluation, QuestionForm
from experiments.runs import preflight
from lightning_modules.models.architectures import registry
from lightning_modules.serving.openai_client import EndpointSettings
from tests.chat_server import ChatServer, http_response, question_text
from tests.image_text_models import qwen2_vl, save_model
from tests.lightning_modules.models.architectures.qwen3_vl import Qwen3VL, write_tiny_model

SERVED = "OpenGVLab/InternVL2-8B"
INTERNVL = find_model_family("internvl")
SOON = ("--endpoint.attempts=2", "--endpoint.backoff=0.01")


@pytest.fixture(autouse=True)
def small_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: (folder, writer, 2) for name, (folder, writer, _) in write.REPLICAS.items()}
    monkeypatch.setattr(write, "REPLICAS", small)


def run(model: str, root: Path, *args: str) -> Path:
    """Run the entry point on lisa (four boxes) and blink (14 letters); its output folder."""
    fixed = ["--model", model, "--data_root", str(root / "data"), "--output", str(root / "out"), "--replicas=true"]
    evaluate.main([*fixed, "--bench=lisa,blink", "--decoding.max_new_tokens=6", *args])
    return root / "out"


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def reply(request: dict) -> str:
    box = question_text(request).endswith(INTERNVL.suffix)
    return "<ref>it</ref><box>[[100, 200, 600, 900]]</box>" if box else "The answer is B."


def test_a_served_model_is_asked_once_in_its_dialect_and_its_answers_are_kept(tmp_path: Path) -> None:
    with ChatServer(reply) as server:
        address = f"--endpoint.base_url={server.base_url}"
        out = run(SERVED, tmp_path, address, "--processes=2", "--endpoint.concurrency=3")
        boxes, letters = predictions(out / "lisa"), predictions(out / "blink")
        asked = len(server.requests)
    assert asked == 1 + len(boxes) + len(letters), "one look at the server, and each question once"
    assert {request["model"] for request in server.requests} == {SERVED}
    texts = [question_text(request) for request in server.requests]
    assert sum(text.endswith(CHOICE_SUFFIX) for text in texts) == len(letters) == 14
    assert all(text.startswith("Image-1: ") for text in texts)
    assert {tuple(prediction["read"]) for prediction in boxes} == {(0.1, 0.2, 0.6, 0.9)}
    assert {prediction["box_format"] for prediction in boxes} == {"relative_1000"}
    assert {prediction["read"] for prediction in letters} == {"B"}
    assert all(prediction["correct"] == (prediction["answer"]["letter"] == "B") for prediction in letters)

    first = (out / "blink/result.json").read_text()
    run(SERVED, tmp_path, address)  # the server is gone: nothing is left to ask
    assert (out / "blink/result.json").read_text() == first
    rescore.main(["--predictions", str(out / "lisa"), "--threshold=0"])
    found = json.loads((out / "lisa/rescored.json").read_text())["averages"]["avg"]
    assert found["score"] == 100 * sum(prediction["value"] > 0 for prediction in boxes) / len(boxes)


def test_what_a_dying_server_answered_is_not_asked_again(tmp_path: Path) -> None:
    def until_the_tenth(request: dict) -> str | bytes:
        return reply(request) if len(server.requests) <= 10 else http_response(503, b"{}")

    with ChatServer(until_the_tenth) as server, pytest.raises(SystemExit, match="no answer in 2 attempts"):
        run(SERVED, tmp_path, f"--endpoint.base_url={server.base_url}", "--endpoint.concurrency=1", *SOON)
    with ChatServer(reply) as server:
        out = run(SERVED, tmp_path, f"--endpoint.base_url={server.base_url}")
    total = len(predictions(out / "lisa")) + len(predictions(out / "blink"))
    assert len(server.requests) == 1 + total - 9


def test_servers_that_cannot_be_used_end_the_evaluation_soon(tmp_path: Path) -> None:
    with ChatServer(reply) as server:
        closed = server.base_url
    with pytest.raises(SystemExit, match=f"no server listens at {closed}"):
        run(SERVED, tmp_path, f"--endpoint.base_url={closed}", *SOON)
    unknown = http_response(404, b'{"error": {"message": "no such model"}}')
    with ChatServer(lambda request: unknown) as server, pytest.raises(SystemExit, match="no such model"):
        run(SERVED, tmp_path, f"--endpoint.base_url={server.base_url}")
    assert not (tmp_path / "out/lisa").exists(), "no answer is scored"


def test_another_family_in_this_process(tmp_path: Path) -> None:
    model = str(save_model(qwen2_vl, tmp_path / "model"))
    settings = choose_predictor(model, AskedModel())
    assert isinstance(settings, ImageTextSettings) and settings.form.model_family.name == "qwen2_vl"
    assert settings.form.style == "native" and not settings.trust_remote_code
    out = run(model, tmp_path, "--limit=1")
    boxes, letters = predictions(out / "lisa-limit1"), predictions(out / "blink-limit1")
    assert len(boxes) == 2 and len(letters) == 7
    for prediction in boxes + letters:
        assert prediction["box_format"] == "relative_1000" and prediction["refused"] is None
        assert 1 <= prediction["num_tokens"] <= 6 and prediction["image_sizes"]
    assert {prediction["failure"] for prediction in boxes} <= {None, *FAILURE_KINDS}


def test_the_base_model_of_a_further_family_is_read_in_the_box_format_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Qwen3-VL that can be trained, but was not: absolute pixels, the default, would make every box wrong."""
    monkeypatch.setitem(registry.ARCHITECTURES, Qwen3VL.model_type, Qwen3VL())
    model = str(write_tiny_model(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"is a Qwen3-VL, which writes boxes as relative_1000.*set form.box_format"):
        choose_predictor(model, AskedModel())
    with pytest.raises(ValueError, match="is a Qwen3-VL: box format, style"):
        choose_predictor(model, AskedModel(form=QuestionForm(model_family="qwen3_vl")))
    settings = choose_predictor(model, AskedModel(form=QuestionForm(box_format="relative_1000")))
    assert isinstance(settings, PolicySettings) and settings.prompts["box_format"] == BoxFormat.RELATIVE_1000
    # One that was trained here, in whatever format, is asked as it was trained.
    form = {"version": 1, "style": "think", "box_format": "absolute_pixels", "label_images": False}
    (tmp_path / "model" / PROMPT_FORM).write_text(json.dumps(form | {"max_resized_pixels": None}))
    assert choose_predictor(model, AskedModel()).prompts["box_format"] == BoxFormat.ABSOLUTE_PIXELS


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model=gpt-4o", "--endpoint.concurrency=2"], "endpoint.base_url=None"),
        (["--model=gpt-4o", "--endpoint.base_url=http://a/v1", "--endpoint.model=other"], "endpoint.model='other'"),
        (["--model=mystery-7b", "--endpoint.base_url=http://a/v1"], "set model family to one of"),
        (
            ["--model=gpt-4o", "--endpoint.base_url=http://a/v1", "--form.model_family=klingon"],
            "model_family='klingon'",
        ),
        (["--model=gpt-4o", "--endpoint.base_url=http://a/v1", "--form.style=official"], "style='official'"),
        (["--model=gpt-4o", "--endpoint.base_url=http://a/v1", "--form.box_format=unit"], "box_format='unit'"),
        (["--model=gpt-4o"], "no folder 'gpt-4o'"),
        (["--model={text}"], "'llama', which transformers knows no image-text model of"),
        (["--model={bare}"], "model.safetensors is missing"),
        (["--model={ours}", "--form.model_family=internvl"], "model_family='internvl' is for other models"),
        (["--model={ours}", "--form.style=native"], "style='native'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_models_and_settings_are_named_before_anything_is_read(
    args: list[str], words: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, model_type in (("text", "llama"), ("bare", "qwen2_vl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    folders = {"text": tmp_path / "text", "bare": tmp_path / "bare", "ours": tiny_model_dir}
    args = [arg.format(**folders) for arg in args]
    with pytest.raises(SystemExit, match=words):
        evaluate.main([*args, "--data_root", str(tmp_path / "none")])
    assert capsys.readouterr().out == ""


def test_a_served_model_never_writes_where_one_in_this_process_does() -> None:
    merged = "outputs/nano/grpo/merged"
    assert evaluate.default_output(merged) == "outputs/nano/grpo/benchmarks"
    assert evaluate.default_output(merged, served=True) == "outputs/eval/outputs--nano--grpo--merged--served"


def test_a_served_model_that_was_trained_here_is_asked_as_in_its_training(tmp_path: Path, capsys) -> None:
    form = {"style": "answer", "box_format": "relative_1000", "label_images": True, "max_resized_pixels": 5000}
    (tmp_path / "prompt_form.json").write_text(json.dumps({"version": 1, **form}))
    served = EndpointSettings(base_url="http://a/v1")

    found = choose_predictor(str(tmp_path), AskedModel(endpoint=served)).form
    assert (found.style, found.before_image, found.max_pixels) == ("answer", "Picture {}: ", 5000)
    assert (found.model_family.name, found.model_family.box_format) == ("qwen2_5_vl", "relative_1000")
    assert "style='answer' as" in capsys.readouterr().out

    given = QuestionForm(as_trained=False, model_family="qwen2_5_vl")
    found = choose_predictor(str(tmp_path), AskedModel(endpoint=served, form=given)).form
    assert (found.style, found.before_image, found.model_family.box_format) == ("native", None, "absolute_pixels")

    (tmp_path / "prompt_form.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="the field style is missing"):
        choose_predictor(str(tmp_path), AskedModel(endpoint=served))


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(preflight.SettingsError, match=r"(?s)processes=0.*model_family='klingon'"):
        evaluate.evaluate(
            Evaluation(
                "gpt-4o",
                str(tmp_path),
                endpoint=EndpointSettings(base_url="http://a/v1"),
                form=QuestionForm(model_family="klingon"),
                processes=0,
            )
        )
