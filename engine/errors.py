"""The exceptions for errors that the user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A sentence that says what is wrong and what to do; the job prints it and ends with exit code 2."""


class TransientError(UserError):
    """A UserError that a retry may resolve: storage that could not be reached, a process that was killed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint like `; did you mean 'optim.lr'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
