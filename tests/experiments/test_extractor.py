"""`--extractor`: a language model says which option an answer picks, where an official reader finds no letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.metrics.extraction import NO_OPTION, extraction_request, read_extraction
from datamodules.synthetic.benchmark_replicas import write
from experiments import evaluate
from experiments.evaluation import rescore
from tests.chat_server import ChatServer, http_response, question_text

WHOLE = ("--extractor.base_url=http://a/v1", "--extractor.model=m")
SOON = ("--extractor.attempts=2", "--extractor.backoff=0.01")


@pytest.fixture(autouse=True)
def small_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: (folder, writer, 2) for name, (folder, writer, _) in write.REPLICAS.items()}
    monkeypatch.setattr(write, "REPLICAS", small)


def verbose(request: dict) -> str:
    """The model under test: no official reader finds a letter in it, and some questions have the same answer."""
    return f"I would go for the second of them, {len(question_text(request)) % 3}."


def extract(request: dict) -> str | bytes | None:
    """The extractor, which thinks first."""
    return "<think>(A) is not meant</think>\n(B)"


def run(root: Path, model: ChatServer, extractor: ChatServer | None, *args: str, bench: str = "blink,mmiu") -> Path:
    fixed = [
        "--model=some",
        "--form.model_family=internvl",
        "--data_root",
        str(root / "data"),
        "--output",
        str(root / "out"),
    ]
    fixed += [f"--bench={bench}", "--replicas=true", f"--endpoint.base_url={model.base_url}"]
    if extractor is not None:
        fixed += [f"--extractor.base_url={extractor.base_url}", "--extractor.model=reader-7b", *SOON]
    evaluate.main([*fixed, *args])
    return root / "out"


def read(folder: Path) -> tuple[list[dict], dict]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "result.json").read_text())


def test_the_last_step_of_the_official_scoring_is_a_language_models(tmp_path: Path, capsys) -> None:
    with ChatServer(verbose) as model, ChatServer(extract) as extractor:
        before, without = read(run(tmp_path, model, None) / "blink")
        assert without["extractor"] is None and not any(found["official_correct"] for found in before)
        out = run(tmp_path, model, extractor)
        asked = len(extractor.requests)
        for name in ("blink", "mmiu"):
            predictions, result = read(out / name)
            assert result["extractor"] == {
                "model": "reader-7b", "asked": len(predictions), "found": len(predictions), "none": 0, "failed": {},
            }  # fmt: skip
            source = result["official"]["rule"]["source"]
            assert "with its last step by the extractor reader-7b" in source and "without" not in source
            right = [found["answer"]["letter"] == "B" for found in predictions]
            assert [found["official_correct"] for found in predictions] == right and any(right)
            assert {found["extracted"] for found in predictions} == {"B"}
        ours, after = (
            [(found["read"], found["correct"]) for found in predicted] for predicted in (before, read(out / "blink")[0])
        )
        assert ours == after, "the default reader asks nobody"
        assert "reader-7b read 14 answers, a letter in 14" in capsys.readouterr().out
        assert {request["temperature"] for request in extractor.requests} == {0}
        assert {request["repetition_penalty"] for request in extractor.requests} == {1}
        run(tmp_path, model, extractor)
        assert len(extractor.requests) == asked, "every reply is kept"
    run(tmp_path, model, extractor)  # both servers are gone
    _, result = read(out / "blink")
    rescore.main(["--predictions", str(out / "blink")])
    assert json.loads((out / "blink/rescored.json").read_text()) == result


def test_what_is_asked_holds_question_options_and_answer(tmp_path: Path) -> None:
    with ChatServer(verbose) as model, ChatServer(extract) as extractor:
        predictions, _ = read(run(tmp_path, model, extractor, bench="blink") / "blink")
        texts = [question_text(request) for request in extractor.requests][1:]
    assert len(set(texts)) == len(texts), "equal requests are made once"
    for prediction in predictions:
        choices = prediction["answer"]["choices"]
        options = [f"({letter}) {choice}" for letter, choice in zip("ABCDE", choices, strict=False)]
        parts = ("<image 1>\n", f"\n{prediction['text']}\n", *options)
        assert any(all(part in text for part in parts) for text in texts)


def test_failures_are_counted_and_what_got_no_reply_is_asked_again(tmp_path: Path, caplog) -> None:
    bad = {"on": True}

    def reply(request: dict) -> str | bytes:
        text = question_text(request)
        if not bad["on"] or "the ball" in text:
            return "B"
        number = len(seen)
        seen.setdefault(text, number)
        refusal, fault = http_response(400, b'{"error": {"message": "no"}}'), http_response(500, b"{}")
        return (refusal, fault, "perhaps B", NO_OPTION, "A.")[seen[text] % 5]

    seen: dict[str, int] = {}
    with ChatServer(verbose) as model, ChatServer(reply) as extractor:
        out = run(tmp_path, model, extractor, "--extractor.concurrency=1", bench="blink")
        predictions, result = read(out / "blink")
        counts = result["extractor"]
        assert set(counts["failed"]) == {"refused", "unanswered", "unreadable"} and counts["none"] and counts["found"]
        assert sum(counts["failed"].values()) + counts["none"] + counts["found"] == counts["asked"] == 14
        failed = [found for found in predictions if found["extracted"] is None]
        assert len(failed) == sum(counts["failed"].values()) and not any(found["official_correct"] for found in failed)
        bad["on"] = False
        unreadable = counts["failed"]["unreadable"]
        assert read(run(tmp_path, model, extractor, bench="blink") / "blink")[1]["extractor"]["failed"] == {
            "unreadable": unreadable
        }
    assert "no letter was extracted: 400" in caplog.text


def test_letters_that_the_official_reader_finds_are_asked_of_nobody(tmp_path: Path) -> None:
    with ChatServer(lambda request: "B") as model, ChatServer(extract) as extractor:
        _, result = read(run(tmp_path, model, extractor, bench="blink") / "blink")
        assert len(extractor.requests) == 1, "the look at the server"
    assert result["extractor"]["asked"] == 0


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (http_response(404, b'{"error": {"message": "no such model"}}'), "no such model"),
        (http_response(400, b'{"error": {"message": "bad"}}'), "extractor: .*refuses a short text: 400"),
        ("I am an assistant.", "extractor: .*it replied 'I am an assistant"),
        (http_response(503, b"{}"), "no answer in 2 attempts"),
    ],
    ids=["404", "400", "chatter", "503"],
)
def test_an_extractor_that_cannot_read_ends_the_evaluation_before_a_question(tmp_path: Path, reply, words) -> None:
    with ChatServer(verbose) as model, ChatServer(lambda request: reply) as extractor:
        with pytest.raises(SystemExit, match=words):
            run(tmp_path, model, extractor)
        assert not model.requests


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--extractor.model=m"], "extractor.base_url=None"),
        (["--extractor.base_url=http://a/v1"], "extractor.model=''"),
        ([*WHOLE, "--bench=lisa"], "is for blink, mmiu, not for lisa"),
        ([*WHOLE, "--extractor.extra_body={top_k: 5}"], "top_k=5"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_read(tmp_path: Path, args: list[str], words: str) -> None:
    fixed = [
        "--model=some",
        "--form.model_family=internvl",
        "--data_root",
        str(tmp_path),
        "--endpoint.base_url=http://a/v1",
    ]
    with pytest.raises(SystemExit, match=words):
        evaluate.main([*fixed, "--bench=blink", *args])


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), (" (C). ", "C"), ("**A**", "A"), ("B. the second image", "B"), ("(D) it says so", "D"),
        ("Z", NO_OPTION), ("<think>A or B</think>B", "B"),
        ("E", None), ("A dog", None), ("B or C", None), ("", None), ("<think>B", None), ("The answer is B", None),
        ("b", None),
    ],
)  # fmt: skip
def test_the_reply_is_one_letter(reply: str, letter: str | None) -> None:
    assert read_extraction(reply, 4) == letter


def test_braces_and_blanks_in_an_answer_are_text() -> None:
    text = extraction_request("{question}?", ("{0}", "b"), " {answer} ")
    assert "{question}?" in text and "(A) {0}" in text and "\n{answer}\n" in text
