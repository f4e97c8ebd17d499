from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments.reports.significance import TRANSFER, Hits, holm, paired_differences


def random_hits(rng: np.random.Generator, share: float, num_seeds: int = 3, num_questions: int = 40) -> Hits:
    tasks = ("diff", "region", "reasoning", "multi_view")
    return {task: rng.random((num_seeds, num_questions)) < share for task in tasks}


def enumerate_resamples(row: Hits, over: Hits) -> list[float]:
    """AVG's difference in every resample there is, each as likely: seeds and, in each task, questions drawn anew."""
    tasks = list(row)
    num_seeds = row[tasks[0]].shape[0]
    questions = [range(row[task].shape[1]) for task in tasks]
    draws = [list(itertools.product(count, repeat=len(count))) for count in questions]
    differences = []
    for seeds in itertools.product(range(num_seeds), repeat=num_seeds):
        for chosen in itertools.product(*draws):
            means = []
            for task, members in zip(tasks, chosen, strict=True):
                pairs = [(s, q) for s in seeds for q in members]
                means.append(sum(int(row[task][s, q]) - int(over[task][s, q]) for s, q in pairs) / len(pairs))
            differences.append(100 * sum(means) / len(means))
    return differences


def test_it_is_the_bootstrap_written_out() -> None:
    row = {"diff": np.array([[1, 1, 0], [1, 1, 1]], bool), "reasoning": np.array([[1, 0, 1], [0, 1, 1]], bool)}
    over = {"diff": np.array([[0, 1, 0], [1, 0, 0]], bool), "reasoning": np.array([[0, 0, 1], [1, 1, 0]], bool)}
    every = np.array(enumerate_resamples(row, over))
    found = paired_differences(row, over)["avg"]
    assert found.value == pytest.approx(100 * (3 / 6 + 1 / 6) / 2)
    low, high = np.percentile(every, [2.5, 97.5])
    step = 100 / 2 / 6  # the grid that single resamples lie on: seeds x questions of one of two tasks
    assert found.low == pytest.approx(low, abs=step) and found.high == pytest.approx(high, abs=step)
    assert found.p == pytest.approx(2 * min((every <= 1e-9).mean(), (every >= -1e-9).mean()), abs=0.03)


def test_the_interval_of_one_seed_is_that_of_a_mean_of_paired_differences() -> None:
    rng = np.random.default_rng(1)
    over = {"diff": rng.random((1, 2000)) < 0.4}
    row = {"diff": over["diff"] ^ (rng.random((1, 2000)) < 0.1)}
    paired = row["diff"][0].astype(float) - over["diff"][0]
    error = 100 * paired.std() / np.sqrt(len(paired))
    found = paired_differences(row, over)["avg"]
    assert found.low == pytest.approx(100 * paired.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(100 * paired.mean() + 1.96 * error, abs=0.15 * error)


def test_identical_rows_differ_by_nothing() -> None:
    row = random_hits(np.random.default_rng(0), 0.5)
    for difference in paired_differences(row, row).values():
        assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_rows_that_differ_by_luck_have_an_interval_around_zero() -> None:
    rng = np.random.default_rng(5)
    found = paired_differences(random_hits(rng, 0.5), random_hits(rng, 0.5))["avg"]
    assert found.low < 0 < found.high and found.p > 0.05


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_row_that_is_better_on_each_question_is_surely_better(num_seeds: int) -> None:
    rng = np.random.default_rng(0)
    all_right, all_wrong = random_hits(rng, 1.1, num_seeds), random_hits(rng, -1, num_seeds)
    better, worse = paired_differences(all_right, all_wrong), paired_differences(all_wrong, all_right)
    for name in ("avg", "in_domain", "out_of_domain"):
        assert better[name].value == better[name].low == 100 and better[name].p < 0.01
        assert worse[name].value == -100 and worse[name].p == better[name].p
    assert better[TRANSFER].value == 0 and better[TRANSFER].p == 1


def test_seeds_that_disagree_widen_the_interval() -> None:
    over = {"diff": np.zeros((2, 400), bool)}
    row = {"diff": np.zeros((2, 400), bool)}
    row["diff"][0, :] = True  # right everywhere at one seed, nowhere at the other
    found = paired_differences(row, over)["avg"]
    assert (found.value, found.low, found.high) == (50, 0, 100)
    assert found.p > 0.2


def test_averages_are_over_tasks_not_questions() -> None:
    row = {"diff": np.ones((1, 90), bool), "reasoning": np.zeros((1, 10), bool)}
    over = {task: np.zeros_like(hits) for task, hits in row.items()}
    found = paired_differences(row, over)
    assert (found["avg"].value, found["in_domain"].value, found["out_of_domain"].value) == (50, 100, 0)
    assert found[TRANSFER].value == -100


def test_the_order_of_tasks_does_not_matter_and_absent_averages_are_left_out() -> None:
    rng = np.random.default_rng(0)
    row, over = random_hits(rng, 0.6), random_hits(rng, 0.5)
    turned = dict(reversed(row.items())), dict(reversed(over.items()))
    assert paired_differences(row, over) == paired_differences(*turned)
    assert paired_differences({"diff": row["diff"]}, {"diff": over["diff"]}).keys() == {"avg", "in_domain"}


@pytest.mark.parametrize("other", [{}, {"diff": np.ones((1, 3), bool)}, {"region": np.ones((2, 3), bool)}])
def test_rows_that_cannot_be_paired_are_refused(other: Hits) -> None:
    with pytest.raises(ValueError, match="the same tasks, seeds and questions"):
        paired_differences({"diff": np.ones((2, 3), bool)}, other)


def test_questions_about_the_same_images_are_drawn_together() -> None:
    """Copies of a question say nothing new: the interval is that of the questions without copies."""
    rng = np.random.default_rng(3)
    row, over = random_hits(rng, 0.6, num_questions=100), random_hits(rng, 0.4, num_questions=100)
    single = paired_differences(row, over)["avg"]
    copied = [{task: np.repeat(hits, 5, axis=1) for task, hits in side.items()} for side in (row, over)]
    clusters = {task: np.repeat(np.arange(100), 5) for task in row}
    together = paired_differences(*copied, clusters)["avg"]
    assert (together.value, together.low, together.high) == pytest.approx((single.value, single.low, single.high))
    apart = paired_differences(*copied)["avg"]
    assert apart.high - apart.low < 0.7 * (together.high - together.low)


def test_clusters_of_different_sizes_give_the_mean_over_their_questions() -> None:
    rng = np.random.default_rng(4)
    over = {"diff": np.zeros((1, 2000), bool)}
    row = {"diff": rng.random((1, 2000)) < 0.3}
    clusters = {"diff": np.repeat(np.arange(400), np.tile([1, 9], 200))}
    found = paired_differences(row, over, clusters)["avg"]
    assert found.value == pytest.approx(100 * row["diff"].mean())
    assert found.low < found.value < found.high and found.high - found.low < 6


def test_the_correction_for_several_comparisons_is_holm_s() -> None:
    # The smallest of four is multiplied by 4, the next by 3, and no corrected value is below one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []
