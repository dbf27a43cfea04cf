"""The train state: progress, validations, rollbacks, the loss scale, and states of older versions."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from engine.train.train_state import LOSS_SCALE_WINDOW, TrainState


def test_a_step_adds_samples_and_tokens_and_a_skipped_one_is_no_update() -> None:
    state = TrainState().after_step(8, 256, 3, recent=(2.0,)).after_step(8, 200, 4, skipped=True, recent=(9.0,))
    assert (state.step, state.samples, state.tokens, state.samples_hash) == (2, 16, 456, 7)
    assert (state.updates, state.skipped, state.skipped_in_a_row, state.recent) == (1, 1, 1, (2.0,))
    assert state.after_step(8, 256, 5).skipped_in_a_row == 0


def test_a_rollback_skips_the_data_up_to_the_failed_step() -> None:
    good, failed = TrainState(step=12), TrainState(step=14, skipped=2, skipped_in_a_row=2)
    state = failed.after_rollback(good)
    assert (state.step, state.skipped_data_steps, state.data_step, state.rollbacks) == (12, 3, 15, 1)


def test_validations_update_the_best_value() -> None:
    state = TrainState(step=4).after_validation(2.0, "min")
    assert (state.best, state.best_step, state.evals_since_best) == (2.0, 4, 0)
    state = state.after_step(1, 1, 1).after_validation(2.0, "min")
    assert (state.best_step, state.evals_since_best) == (4, 1)
    assert state.after_validation(1.0, "min").evals_since_best == 0
    assert TrainState().after_validation(0.5, "max").after_validation(0.4, "max").evals_since_best == 1


def test_the_loss_scale_falls_with_an_overflow_and_rises_after_many_updates() -> None:
    state = TrainState(loss_scale=1024.0)
    state = state.after_step(1, 1, 0, skipped=True)
    assert (state.loss_scale, state.steady) == (512.0, 0)
    for _ in range(LOSS_SCALE_WINDOW - 1):
        state = state.after_step(1, 1, 0)
    assert (state.loss_scale, state.steady) == (512.0, LOSS_SCALE_WINDOW - 1)
    assert state.after_step(1, 1, 0).loss_scale == 1024.0
    assert TrainState(loss_scale=1.0).after_step(1, 1, 0, skipped=True).loss_scale == 1.0
    assert TrainState().after_step(1, 1, 0, skipped=True).loss_scale is None


def test_a_state_is_read_back_from_json() -> None:
    state = TrainState(step=3, recent=(2.5, 2.25), skipped_data_steps=2, best=1.5, evals_since_best=1)
    assert TrainState.from_dict(json.loads(json.dumps(asdict(state)))) == state


def test_a_state_of_an_older_version_is_read() -> None:
    tree = {"step": 3, "samples": 24, "recent": [2.5], "passed": 2, "stale": 1}
    expected = TrainState(step=3, samples=24, recent=(2.5,), skipped_data_steps=2, evals_since_best=1)
    assert TrainState.from_dict(tree) == expected
    with pytest.raises(TypeError):
        TrainState.from_dict({"unknown": 1})
