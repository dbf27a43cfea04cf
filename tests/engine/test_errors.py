"""Suggestions for misspelled words."""

from __future__ import annotations

from engine.errors import TransientError, UserError, did_you_mean


def test_the_closest_known_word_is_suggested() -> None:
    assert did_you_mean("optim.lrr", ["optim.lr", "seed"]) == "; did you mean 'optim.lr'?"
    assert did_you_mean("xyz", ["optim.lr", "seed"]) == ""


def test_a_transient_error_is_a_user_error() -> None:
    assert issubclass(TransientError, UserError)
