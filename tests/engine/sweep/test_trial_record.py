"""Trial records: states, ranking, the Pareto front, and their files."""

from __future__ import annotations

from pathlib import Path

from engine.sweep.trial_record import (
    PAUSED,
    Trial,
    best_first,
    current_best,
    pareto_front,
    read_trial,
    write_trial,
)


def trial(index: int, value: float | None, state: str = "finished", steps: int = 6, **others: float) -> Trial:
    return Trial(index, f"s-{index}", {}, budget=6, steps=steps, value=value, state=state, others=others)


def test_states() -> None:
    assert trial(0, 1.0).is_over
    assert trial(0, 1.0).has_result
    assert not trial(0, float("nan")).has_result
    assert trial(0, None, "refused").is_over
    assert not trial(0, 1.0, PAUSED).is_over
    assert not trial(0, 1.0, "stopped early").has_result


def test_a_repeated_validation_replaces_the_former() -> None:
    record = trial(0, None, "running", steps=0)
    for step, value in ((2, 3.0), (4, 2.0), (4, 2.5)):
        record.record_validation(step, value, {"accuracy": value / 10})
    assert record.curve == [(2, 3.0), (4, 2.5)]
    assert (record.steps, record.value, record.others) == (4, 2.5, {"accuracy": 0.25})


def test_the_best_comes_first_and_equal_ones_by_index() -> None:
    trials = [trial(0, 2.0), trial(1, 1.0), trial(2, 1.0), trial(3, 0.5, "failed"), trial(4, None)]
    assert [t.index for t in best_first(trials, "min")] == [1, 2, 0]
    assert [t.index for t in best_first(trials, "max")] == [0, 1, 2]


def test_without_a_result_the_best_paused_trial_with_most_steps_leads() -> None:
    paused = [trial(0, 0.5, PAUSED, 2), trial(1, 2.0, PAUSED, 4), trial(2, 1.0, PAUSED, 4)]
    best = current_best(paused, "min")
    assert best is paused[2]
    assert current_best([*paused, trial(3, 9.0)], "min") == trial(3, 9.0)
    assert current_best([], "min") is None


def test_the_pareto_front_leaves_out_dominated_trials() -> None:
    trials = [trial(0, 1.0, size=1.0), trial(1, 2.0, size=3.0), trial(2, 3.0, size=2.0), trial(3, 1.0, size=1.0)]
    assert [t.index for t in pareto_front(trials, ["loss", "size"], ["min", "max"])] == [0, 3, 1]


def test_a_record_is_read_back(tmp_path: Path) -> None:
    record = Trial(1, "s-1", {"optim.lr": 0.1}, 6, 4, 2.5, {"accuracy": 0.25}, PAUSED, curve=[(2, 3.0), (4, 2.5)])
    assert read_trial(tmp_path / "s-1") is None
    write_trial(tmp_path / "s-1", record)
    assert read_trial(tmp_path / "s-1") == record
