"""The lines about a running trial, and the time that is left of the sweep."""

from __future__ import annotations

from pathlib import Path

from experiments.sweeps.trials import Trial, last_progress, trial_outlook


def test_before_any_trial_has_ended_the_others_take_as_long_as_the_first() -> None:
    outlook = trial_outlook([Trial(0, {})], 0, total=4)
    assert (outlook.stage, outlook.expected, outlook.later, outlook.alike) == ("trial 1 of 4", None, 0.0, 3)


def test_later_trials_take_the_mean_time_of_those_that_have_ended() -> None:
    trials = [Trial(0, {}, state="complete", seconds=100.0), Trial(1, {}, state="pruned", seconds=50.0), Trial(2, {})]
    outlook = trial_outlook(trials, 2, total=5)
    assert (outlook.stage, outlook.expected, outlook.later) == ("trial 3 of 5", 75.0, 150.0)


def test_the_last_line_of_a_trial_is_found_whatever_it_works_at(tmp_path: Path) -> None:
    log = tmp_path / "trial-0.log"
    assert last_progress(log) == ""
    log.write_text("Seed set to 0\n[trial 1 of 4] rejection sampling: 5 of 9 prompts\nwandb: step 3\n")
    assert last_progress(log) == "[trial 1 of 4] rejection sampling: 5 of 9 prompts"
