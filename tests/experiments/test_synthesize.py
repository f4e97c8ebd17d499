"""CoT synthesis: what is kept, and that neither kills nor faults change it."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from datamodules.encoding.messages import THINK_SUFFIX
from datamodules.persistence.files import read_json, write_json
from datamodules.samples.answer_text import render_answer
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ImagePart, LoadedSample, Sample, TextPart
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from experiments import synthesize
from experiments.runs import preflight
from lightning_modules.serving.transformers_server import local_server
from tests.chat_server import ChatServer, FaultProxy, http_response, question_text
from tests.conftest import random_png

ROOT = Path(__file__).resolve().parents[2]
NUM_QUESTIONS = 30
TRUTH = (0.1, 0.2, 0.6, 0.9)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images each; the question's number stands in its text. The last one has two true boxes."""
    folder = tmp_path_factory.mktemp("questions") / "shards"
    rng = random.Random(0)
    with ShardWriter(folder) as writer:
        for number in range(NUM_QUESTIONS):
            parts = (ImagePart(0), TextPart("Look. "), ImagePart(1), TextPart(f"Where is thing {number}?"))
            box = BoxAnswer(1, TRUTH, "thing")
            answer = BoxesAnswer((box, box)) if number == NUM_QUESTIONS - 1 else box
            task = ("diff", "region")[number % 2]
            sample = Sample(f"q/{number}", "test", task, ("a.png", "b.png"), parts, answer, "an older rationale")
            writer.add(LoadedSample(sample, tuple(random_png(rng, size) for size in ((64, 48), (90, 60)))))
    return folder


def teach(request: dict) -> str:
    """Right for two thirds of the questions, else right or wrong by seed; pure in (question, seed)."""
    number = int(re.search(r"thing (\d+)", question_text(request)).group(1))
    digest = hashlib.sha256(f"{number}/{request['seed']}".encode()).hexdigest()
    right = number % 3 < 2 or int(digest, 16) % 2 == 0
    width, height = 84, 56  # (90, 60) to multiples of 28
    x1, y1, x2, y2 = TRUTH if right else (0.7, 0.7, 0.9, 0.9)
    box = [round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)]
    return render_answer(box, "thing", f"Thought {digest[:6]}.")


def write_config(folder: Path, questions: Path, base_url: str | None, **more: object) -> Path:
    endpoint = {"model": "Qwen/Qwen2.5-VL-72B-Instruct", "base_url": base_url, "concurrency": 4, "timeout": 30.0}
    endpoint |= {"backoff": 0.01, "max_backoff": 0.05, "attempts": 12} | more.pop("endpoint", {})
    settings = {"questions": str(questions), "output": str(folder / "out"), "endpoint": endpoint, "min_pixels": 784}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "synthesize.yaml"
    path.write_text(yaml.safe_dump(settings | more))
    return path


def run(config: Path, *args: str) -> Path:
    synthesize.main(["--config", str(config), *args])
    return config.parent / "out"


def journal(out: Path) -> dict[tuple[int, int], dict]:
    records = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    answers = [record for record in records if "text" in record]
    found = {(record["number"], record["response"]): record for record in answers}
    assert len(found) == len(answers), "a response is journalled once"
    return found


def kept(out: Path) -> list[Sample]:
    reader = ShardReader(out / "shards")
    return [reader.read(number).sample for number in range(reader.count)]


@pytest.fixture(scope="module")
def undisturbed(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with ChatServer(teach) as server:
        out = run(write_config(tmp_path_factory.mktemp("undisturbed"), questions, server.base_url))
        assert set(server.asked.values()) == {1} and len(server.asked) == 4 * (NUM_QUESTIONS - 1)
        for request in server.requests:
            assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"] * 2
            assert question_text(request).endswith(THINK_SUFFIX)
            assert "an older rationale" not in json.dumps(request)
            samplers = [request[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")]
            assert samplers == [1, -1, 0, 1], "the temperature alone samples, whatever the server's defaults"
    return out


def test_what_all_four_responses_get_right_is_kept_with_one_of_their_rationales(undisturbed: Path) -> None:
    answers = journal(undisturbed)
    ids = [sample.id for sample in kept(undisturbed)]
    sure = [f"q/{number}" for number in range(NUM_QUESTIONS - 1) if number % 3 < 2]
    assert set(sure) <= set(ids) and len(ids) < NUM_QUESTIONS - 1
    assert ids == sorted(ids, key=lambda name: int(name.split("/")[1]))
    for sample in kept(undisturbed):
        number, origin = int(sample.id.split("/")[1]), sample.extra["synthesis"]
        assert f"<think>{sample.thinking}</think>" in answers[number, origin["response"]]["text"]
        assert sample.answer == BoxAnswer(1, TRUTH, "thing") and origin["teacher"] == "Qwen/Qwen2.5-VL-72B-Instruct"
        assert len(origin["ious"]) == 4 and min(origin["ious"]) > 0.5
    assert len({sample.extra["synthesis"]["response"] for sample in kept(undisturbed)}) > 1


def test_the_report_counts_difficulty_tokens_cost_and_rejections(undisturbed: Path, questions: Path) -> None:
    summary = read_json(undisturbed / "synthesis.json")
    outcomes = [json.loads(line) for line in (undisturbed / "outcomes.jsonl").read_text().splitlines()]
    counts = Counter(outcome["correct"] for outcome in outcomes)
    assert summary["difficulty"] == [counts[k] for k in range(5)] and sum(counts.values()) == NUM_QUESTIONS - 1
    assert [sum(column) for column in zip(*summary["tasks"].values(), strict=True)] == summary["difficulty"]
    assert summary["kept"] == len(kept(undisturbed)) == counts[4]
    assert summary["rejected"] == {"no_box_answer": 1}
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (
        10 * summary["responses"],
        4 * summary["responses"],
    )
    assert f"| all | {' | '.join(str(counts[k]) for k in range(5))} |" in (undisturbed / "report.md").read_text()


def test_a_finished_run_asks_nothing_and_another_threshold_or_limit_asks_nothing_more(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(teach) as server:
        config = write_config(tmp_path, questions, server.base_url, prices={"prompt": 2.0, "completion": 5.0})
        out = run(config, "--limit=9")
        assert server.asked.total() == 36
        assert read_json(out / "synthesis.json")["cost"] == pytest.approx(36 * (10 * 2 + 4 * 5) / 1e6, abs=1e-4)
        run(config, "--limit=9")
        assert "already finished" in capsys.readouterr().out
        run(config, "--limit=9", "--prices.prompt=0", "--prices.completion=0")
        assert read_json(out / "synthesis.json")["cost"] == 0  # of the prices that hold now
        run(config, "--limit=9", "--threshold=0.99")
        assert server.asked.total() == 36
        assert read_json(out / "synthesis.json")["kept"] == 0
        run(config, "--limit=10")
        assert server.asked.total() == 40
        with pytest.raises(SystemExit, match=r"sampling\.seed: 0 -> 1"):
            run(config, "--limit=9", "--sampling.seed=1")
        run(config, "--limit=9", "--sampling.seed=1", "--redo")
        assert server.asked.total() == 76
    assert [folder.is_dir() for folder in tmp_path.glob("out.*")] == [True]  # the paid-for answers are still there


def test_the_responses_that_another_version_has_collected_are_kept(
    undisturbed: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    started = read_json(out / "started.json")
    (out / "synthesis.json").unlink()
    del started["settings"]["sampling"]["seed"]  # a setting that the other version did not have
    write_json(out / "started.json", started | {"key": "other", "code": {"experiments/synthesize.py": "other"}})
    write_json(out / "journal.jsonl.key", {"key": "other"})
    with ChatServer(teach) as server:
        config = write_config(tmp_path, questions, server.base_url)
        with pytest.raises(SystemExit, match=r"only one of the two has: sampling\.seed"):
            run(config)
        run(config, "--keep")
        run(config)
        assert not server.asked
    assert (out / "journal.jsonl").read_text() == (undisturbed / "journal.jsonl").read_text()
    assert kept(out) == kept(undisturbed)


def test_a_torn_journal_costs_its_last_line_only(undisturbed: Path, questions: Path, tmp_path: Path) -> None:
    with ChatServer(teach) as server:
        config = write_config(tmp_path, questions, server.base_url)
        out = run(config)
        text = (out / "journal.jsonl").read_text()
        lines = text.splitlines(keepends=True)
        (out / "journal.jsonl").write_text("".join(lines[:70]) + lines[70][:-5])
        (out / "synthesis.json").unlink()
        server.asked.clear()
        run(config)
        assert server.asked.total() == 4 * (NUM_QUESTIONS - 1) - sum('"text"' in line for line in lines[:70])
    assert kept(out) == kept(undisturbed)


def test_faults_change_nothing(
    undisturbed: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(teach) as server, FaultProxy(server.port, share=0.2) as proxy:
        out = run(write_config(tmp_path, questions, proxy.base_url, endpoint={"timeout": 2.0}))
    assert proxy.faults.total() >= 15 and len(proxy.faults) == 5
    assert kept(out) == kept(undisturbed)
    # Nobody is asked again who has answered, but where the answer was lost on the way: cut by the proxy, or too late,
    # as on a machine with other things to do.
    counts = dict(re.findall(r"(\w+) (\d+)", capsys.readouterr().out.partition("repeated: ")[2]))
    late = int(counts["timeout"]) - proxy.faults["hang"]
    repeated = server.asked.total() - 4 * (NUM_QUESTIONS - 1) - proxy.faults["truncated"]
    assert 0 <= repeated <= late


def test_a_key_that_the_server_does_not_know_ends_the_run(questions: Path, tmp_path: Path) -> None:
    with ChatServer(lambda request: http_response(401, b'{"error": {"message": "who?"}}')) as server:
        with pytest.raises(SystemExit, match=r"401.*who"):
            run(write_config(tmp_path, questions, server.base_url))
        assert server.asked.total() <= 4


def test_what_the_server_refuses_is_counted_and_not_asked_again(questions: Path, tmp_path: Path) -> None:
    def reply(request: dict) -> str | bytes:
        if "thing 3?" in question_text(request):
            return http_response(400, b'{"error": {"message": "prompt too long"}}')
        return teach(request)

    with ChatServer(reply) as server:
        out = run(write_config(tmp_path, questions, server.base_url))
    assert read_json(out / "synthesis.json")["rejected"] == {"refused": 1, "no_box_answer": 1}
    assert sum(count for (text, _), count in server.asked.items() if "thing 3?" in text) == 1
    assert "q/3" not in [sample.id for sample in kept(out)]


@pytest.mark.parametrize(("limit", "most"), [(None, 8 + 3), (5, 5)])
def test_a_server_that_refuses_everything_is_misused_and_marks_no_question(
    undisturbed: Path, questions: Path, tmp_path: Path, limit: int | None, most: int
) -> None:
    refusal = http_response(400, b'{"error": {"message": "unknown field max_completion_tokens"}}')
    with ChatServer(lambda request: refusal) as server:
        with pytest.raises(SystemExit, match=r"none was answered; first: .*unknown field.*sampling_fields=openai"):
            run(write_config(tmp_path, questions, server.base_url, limit=limit))
        assert server.asked.total() <= most
    with ChatServer(teach) as server:
        out = run(write_config(tmp_path, questions, server.base_url))
    assert [sample.id for sample in kept(out)] == [sample.id for sample in kept(undisturbed)]


def test_a_server_that_dies_ends_the_run_and_the_next_one_goes_on(
    undisturbed: Path, questions: Path, tmp_path: Path
) -> None:
    answered = iter(range(40))
    with ChatServer(lambda request: teach(request) if next(answered, None) is not None else b"") as server:
        config = write_config(tmp_path, questions, server.base_url, endpoint={"attempts": 2})
        with pytest.raises(SystemExit, match="no answer in 2 attempts"):
            run(config)
        assert len(journal(tmp_path / "out")) == 40 and not (tmp_path / "out/shards").exists()
        server.reply = teach
        server.asked.clear()
        assert kept(run(config)) == kept(undisturbed)
        assert server.asked.total() == 4 * (NUM_QUESTIONS - 1) - 40


@pytest.mark.parametrize(
    ("concurrency", "silence", "patience"),
    [
        (1, http_response(500, b"{}"), {"attempts": 2}),
        (4, http_response(500, b"{}"), {"attempts": 2}),
        (1, None, {"attempts": 1, "timeout": 3.0}),
    ],
    ids=["500, one at a time", "500", "hangs"],
)
def test_a_question_without_answer_is_reported_and_holds_up_nothing(
    undisturbed: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    concurrency: int,
    silence: bytes | None,
    patience: dict,
) -> None:
    """Its second response never comes; the server answers all else, and later this too."""

    def reply(request: dict) -> str | bytes | None:
        if "thing" not in question_text(request):
            return "Hello."
        seeds = [seed for text, seed in server.asked if "thing 3?" in text]
        return silence if "thing 3?" in question_text(request) and len(seeds) > 1 else teach(request)

    with ChatServer(reply) as server:
        endpoint = {"concurrency": concurrency} | patience
        config = write_config(tmp_path, questions, server.base_url, endpoint=endpoint)
        out = run(config)
        assert server.asked.total() <= 4 * (NUM_QUESTIONS - 1) + 2 * patience["attempts"] + 2
        assert "1 questions got no answer" in capsys.readouterr().out
        summary = read_json(out / "synthesis.json")
        assert list(summary["failed"]) == ["q/3"] and summary["judged"] == NUM_QUESTIONS - 2
        assert "without an answer: 1" in (out / "report.md").read_text()
        assert kept(out) == [sample for sample in kept(undisturbed) if sample.id != "q/3"]
        assert sum("thing 3?" in text for text, _ in server.asked) == 2

        server.reply = teach
        server.asked.clear()
        assert kept(run(config)) == kept(undisturbed) and server.asked.total() == 3
        assert read_json(out / "synthesis.json")["failed"] == {}


@pytest.mark.parametrize(("limit", "most"), [(None, 8 + 3), (3, 6)])
def test_a_server_that_answers_no_question_ends_the_run(
    questions: Path, tmp_path: Path, limit: int | None, most: int
) -> None:
    """Such as where `timeout` is too short for any: it is not to be waited for with each."""
    failing = http_response(500, b'{"error": {"message": "too slow"}}')
    with ChatServer(lambda request: failing if "thing" in question_text(request) else "Hello.") as server:
        config = write_config(tmp_path, questions, server.base_url, limit=limit, endpoint={"attempts": 1})
        with pytest.raises(SystemExit, match="too slow"):
            run(config)
        asked = [text for text, _ in server.asked.elements() if "thing" in text]
        assert len(asked) <= most and not (tmp_path / "out/synthesis.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "nowhere"}, "nowhere"),
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"limit": 0}, "limit=0"),
        ({"model_family": "klingon", "threshold": -1.0}, "model_family='klingon'"),
        ({"max_pixels": 10}, "max_pixels=10"),
        ({"before_image": "{image}: "}, "before_image='{image}: '"),
        ({"endpoint": {"model": "outputs/nano/gone/merged", "base_url": None}}, "outputs/nano/gone/merged"),
    ],
)
def test_wrong_settings_end_before_anything_is_asked(
    change: dict, message: str, questions: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **{"questions": questions, "base_url": "http://127.0.0.1:9/v1"} | change)
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(config)
    assert not (tmp_path / "out").exists()


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "experiments.synthesize", "--config", str(config)]


def kill_at(config: Path, num_lines: int) -> None:
    """Start the command and kill it with -9 once its journal has so many lines."""
    path = config.parent / "out/journal.jsonl"
    process = subprocess.Popen(command(config), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not path.is_file() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_three_kills_lose_nothing_and_repeat_no_more_than_was_in_flight(
    share: float, undisturbed: Path, questions: Path, tmp_path: Path
) -> None:
    with ChatServer(teach, delay=0.05) as server, FaultProxy(server.port, share) as proxy:
        config = write_config(tmp_path, questions, proxy.base_url, endpoint={"timeout": 5.0})
        for num_lines in (20, 50, 80):
            kill_at(config, num_lines)
        subprocess.run(command(config), cwd=ROOT, check=True)
    assert kept(tmp_path / "out") == kept(undisturbed)
    assert (tmp_path / "out/outcomes.jsonl").read_text() == (undisturbed / "outcomes.jsonl").read_text()
    repeated = server.asked.total() - 4 * (NUM_QUESTIONS - 1)
    assert 0 <= repeated <= 3 * 4 + proxy.faults["truncated"]
    assert max(server.asked.values()) <= 1 + 3 + proxy.faults["truncated"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc whether the server has ended")
def test_a_local_server_is_started_killed_with_its_owner_and_gives_the_same_again(
    questions: Path, tmp_path: Path
) -> None:
    def config(name: str) -> Path:
        endpoint = {"model": "models/nano-base", "timeout": 120.0}
        more = {"model_family": "qwen2_5_vl", "max_pixels": 10_000, "limit": 6, "device": "cpu", "endpoint": endpoint}
        return write_config(tmp_path / name, questions, None, sampling={"max_tokens": 48, "temperature": 1.0}, **more)

    subprocess.run(command(config("whole")), cwd=ROOT, check=True)
    for num_lines in (4, 10, 16):
        kill_at(config("killed"), num_lines)
        log = (tmp_path / "killed/out/server/server.log").read_text()
        server = Path("/proc") / re.search(r"server process \[(\d+)\]", log).group(1) / "cmdline"
        end = time.monotonic() + 30
        while server.is_file() and server.read_bytes():  # empty: ended, and waiting to be reaped
            assert time.monotonic() < end, "a server without an owner"
            time.sleep(0.1)
    subprocess.run(command(config("killed")), cwd=ROOT, check=True)
    whole, killed = journal(tmp_path / "whole/out"), journal(tmp_path / "killed/out")
    assert len(whole) == 24 and whole == killed
    assert len({record["text"] for record in whole.values()}) > 6  # it samples
    assert all(record["prompt_tokens"] > 20 and record["completion_tokens"] > 0 for record in whole.values())
    # The nano base does not reason, so nothing is kept here; that is what the tests above are about.
    outcomes = [(tmp_path / name / "out/outcomes.jsonl").read_text() for name in ("whole", "killed")]
    assert outcomes[0] == outcomes[1] and outcomes[0].count("\n") == 6


@pytest.mark.slow
def test_a_local_server_that_cannot_come_up_says_why(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # the server's Python
    with pytest.raises(RuntimeError, match="ended with 1"), local_server(str(tiny_model_dir), tmp_path / "work"):
        pass


def write_form(folder: Path, **changes: object) -> str:
    form = {"style": "think", "box_format": "relative_1000", "label_images": True, "max_resized_pixels": 5000}
    folder.mkdir(exist_ok=True)
    write_json(folder / "prompt_form.json", {"version": 1, **form, **changes})
    return str(folder)


def test_a_teacher_that_was_trained_here_is_asked_in_its_own_form(tmp_path: Path, capsys) -> None:
    teacher = write_form(tmp_path / "copied")
    form = synthesize._form("stated", teacher, [], True, None, 3136, 10_000)
    assert (form.model_family.name, form.model_family.box_format) == ("qwen2_5_vl", "relative_1000")
    assert (form.before_image, form.min_pixels, form.max_pixels) == ("Picture {}: ", 3136, 5000)
    assert "max_pixels=5000 as" in capsys.readouterr().out
    form = synthesize._form("stated", teacher, [], False, None, 3136, 10_000)
    assert (form.model_family.name, form.before_image, form.max_pixels) == ("stated", None, 10_000)


@pytest.mark.parametrize(
    ("changes", "named"), [({"style": "answer"}, "it writes no thinking"), ({"version": 3}, "version=3 is not 1")]
)
def test_a_teacher_that_cannot_be_one_is_a_fault_among_others(tmp_path: Path, changes: dict, named: str) -> None:
    teacher = write_form(tmp_path / "copied", **changes)
    with pytest.raises(preflight.SettingsError, match=f"(?s)limit=0.*{named}"):
        synthesize._form("auto", teacher, ["limit=0 must be at least 1"], True, None, 3136, 10_000)
