from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest

from datamodules.persistence import progress_lines
from datamodules.persistence.durations import Outlook
from datamodules.persistence.progress_lines import Counted, ProgressLines, lines_in_stage


class Stream(io.StringIO):
    """stdout or stderr; `terminal`: whether it is one."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch):
    """streams(stdout, stderr): whether each is a terminal; returns both."""

    def make(stdout: bool, stderr: bool) -> tuple[Stream, Stream]:
        both = Stream(stdout), Stream(stderr)
        monkeypatch.setattr(progress_lines, "sys", SimpleNamespace(stdout=both[0], stderr=both[1]))
        monkeypatch.setattr("sys.stdout", both[0])
        monkeypatch.setattr("sys.stderr", both[1])
        return both

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of `Counted`. Its thread waits for the usual 20 s, so that it prints nothing in a test."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def wait_for(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_lines_come_while_nothing_moves_and_end_with_the_work(capsys) -> None:
    said = []

    def text() -> str:
        said.append(1)
        return f"line {len(said)}"

    lines = ProgressLines(text, every_seconds=0.05)
    wait_for(lambda: len(said) >= 3)
    lines.close()
    lines.close()
    time.sleep(0.2)
    count = len(said)
    time.sleep(0.3)
    assert len(said) == count and capsys.readouterr().out.startswith("line 1\nline 2\nline 3\n")


def test_the_newest_of_several_prints_and_then_the_one_before_it_again(capsys) -> None:
    said = []
    training = ProgressLines(lambda: said.append("training") or "training", every_seconds=0.05)
    validation = ProgressLines(lambda: said.append("validation") or "validation", every_seconds=0.05)
    wait_for(lambda: said.count("validation") >= 3)
    validation.close()
    count = len(said)
    wait_for(lambda: "training" in said[count:])
    training.close()
    inner = said[said.index("validation") : len(said) - said[::-1].index("validation")]
    assert set(inner) == {"validation"}


def test_without_a_terminal_there_are_lines_and_no_bar(streams, clock) -> None:
    out, err = streams(False, False)
    with Counted(200, "mig_bench", "question", note=lambda: "3 retries") as progress:
        clock.seconds += 5
        assert progress.line() == "mig_bench: 0 of 200 questions, 3 retries, 5 s so far"
        progress.update(50)
        clock.seconds += 5
        assert progress.line() == "mig_bench: 50 of 200 questions, 3 retries, 30 s left"
        progress.update(150)
    assert out.getvalue() == "mig_bench: 200 of 200 questions, 3 retries, in 10 s\n" and err.getvalue() == ""


def test_units_that_are_finished_many_at_once_do_not_hide_those_in_work(streams, clock) -> None:
    streams(False, False)
    with Counted(3000, "mig_bench", "question") as progress:
        progress.update(500)  # done before
        for _ in range(2):
            clock.seconds += 10
            progress.update(500)
        clock.seconds += 8
        assert progress.line() == "mig_bench: 1,500 of 3,000 questions, 22 s left"
        clock.seconds += 60
        assert progress.line().endswith("20 s left"), "the chunks behind the one that takes long"
        progress.update(1500)


def test_what_was_done_before_is_not_in_the_pace(streams, clock) -> None:
    streams(False, False)
    with Counted(1100, "rejection sampling", "prompt", initial=1000) as progress:
        progress.update(50)
        clock.seconds += 10
        assert progress.line() == "rejection sampling: 1,050 of 1,100 prompts, 10 s left"


def test_in_a_terminal_there_is_a_bar_and_no_line(streams) -> None:
    out, err = streams(True, True)
    with Counted(2, "sft", "sample", note=lambda: "cost 1.20") as progress:
        progress.update()
        progress.make_room()
        progress.update()
    assert out.getvalue() == "" and "sft: 100%" in err.getvalue() and "2/2" in err.getvalue()


def test_a_log_of_stdout_has_lines_while_the_terminal_has_the_bar(streams) -> None:
    out, err = streams(False, True)
    with Counted(2, "sft", "sample") as progress:
        progress.update(2)
    assert out.getvalue().startswith("sft: 2 of 2 samples, in") and "sft: 100%" in err.getvalue()


def test_other_ranks_show_nothing(streams) -> None:
    out, err = streams(False, True)
    with Counted(2, "sft", "sample", is_shown=False) as progress:
        progress.update(2)
    assert out.getvalue() == err.getvalue() == ""


def test_a_line_in_a_pipeline_has_stage_and_time_of_the_whole(streams, clock, monkeypatch) -> None:
    streams(False, False)
    outlook = Outlook("4 of 5, grpo: training", began=time.time(), expected=570.0, later=30.0)
    for name, value in outlook.environment().items():
        monkeypatch.setenv(name, value)
    with Counted(100, "rejection sampling", "prompt") as progress:
        progress.update(50)
        clock.seconds += 60
        assert progress.line().startswith("[4 of 5, grpo: training] rejection sampling: 50 of 100 prompts, 60 s left")
        assert progress.line().endswith("of all stages 10 min")


def test_work_that_fails_says_how_far_it_came(streams) -> None:
    out, _ = streams(False, False)
    with pytest.raises(RuntimeError), Counted(4, "sft", "sample") as progress:
        progress.update()
        raise RuntimeError("disk full")
    assert out.getvalue().startswith("sft: 1 of 4 samples") and not ProgressLines._open


def test_a_stage_has_lines_from_its_first_second_on(streams, monkeypatch) -> None:
    out, _ = streams(False, False)
    with lines_in_stage(True):
        assert not ProgressLines._open, "a command of its own needs none"
    for name, value in Outlook("2 of 5, sft: training", time.time()).environment().items():
        monkeypatch.setenv(name, value)
    with lines_in_stage(False):
        assert not ProgressLines._open, "another rank"
    with lines_in_stage(True):
        ProgressLines._open[-1].say()
    assert out.getvalue() == "[2 of 5, sft: training] starting or ending, 0 s so far\n" and not ProgressLines._open
