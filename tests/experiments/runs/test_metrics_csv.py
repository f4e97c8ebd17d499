from __future__ import annotations

from pathlib import Path

from experiments.runs import metrics_csv


def attempt(folder: Path, number: int, text: str) -> None:
    (folder / "attempts" / str(number)).mkdir(parents=True)
    (folder / "attempts" / str(number) / "metrics.csv").write_text(text)


def test_a_resumed_attempt_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "loss,step\n3.0,0\n2.0,1\n9.0,2\n")
    attempt(tmp_path, 1, "loss,lr,step\n1.5,,2\n1.0,,3\n,0.1,3\n")
    rows = metrics_csv.read_rows(tmp_path)
    assert metrics_csv.read_curve(rows, "loss") == [(0, 3.0), (1, 2.0), (2, 1.5), (3, 1.0)]
    assert metrics_csv.read_curve(rows, "lr") == [(3, 0.1)]
    assert metrics_csv.next_attempt(tmp_path) == 2


def test_attempts_are_ordered_as_numbers(tmp_path: Path) -> None:
    for number in range(11):
        attempt(tmp_path, number, f"loss,step\n{number}.0,{number}\n")
    assert [step for step, _ in metrics_csv.read_curve(metrics_csv.read_rows(tmp_path), "loss")] == list(range(11))


def test_merged_metrics_hold_all_columns(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "loss,step\n3.0,0\n")
    attempt(tmp_path, 1, "kl,step\n0.5,1\n")
    metrics_csv.merge_attempts(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "step,kl,loss\n0,,3.0\n1,0.5,\n"


def test_an_attempt_killed_before_or_while_writing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "attempts" / "0").mkdir(parents=True)
    attempt(tmp_path, 1, "loss,step\n3.0,0\n2.0")
    assert metrics_csv.read_curve(metrics_csv.read_rows(tmp_path), "loss") == [(0, 3.0)]
    attempt(tmp_path, 2, "loss,step\n2.5,1\n2.0,1")  # of 2.0,12
    assert metrics_csv.read_curve(metrics_csv.read_rows(tmp_path), "loss") == [(0, 3.0), (1, 2.5)]


def test_not_a_number_leaves_no_point(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "loss,step\nnan,0\ninf,1\n1.0,2\n")
    assert metrics_csv.read_curve(metrics_csv.read_rows(tmp_path), "loss") == [(2, 1.0)]


def test_nothing_logged_is_nothing(tmp_path: Path) -> None:
    assert metrics_csv.read_rows(tmp_path) == []
    metrics_csv.merge_attempts(tmp_path)
    assert not (tmp_path / "metrics.csv").exists()
