"""What may come next in a text, guessed from the text itself: where its last tokens stood before, what followed them.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) as a draft for speculative decoding
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192): one forward tells of each guess whether it is what the model
would have written, so that only the number of forwards changes. A wrong guess costs time: who guesses wrong guesses less.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAMS = (3, 2)  # tokens that are looked up, the longest first
FIRST_REACH = 2  # tokens guessed at a time, until it is known how good the guesses are
LONGEST_REST = 64  # steps without a guess, after several wrong ones


class Draft:
    """Guesses how one sequence goes on."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # tokens -> where what followed them last begins
        self._guessed: list[int] = []
        self._reach, self._wrong, self._rest = FIRST_REACH, 0, 0

    def guess(self, prompt: Sequence[int], written: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow; none where the last tokens stand nowhere before."""
        known = self._known
        new = [*prompt[len(known) :], *written[max(len(known) - len(prompt), 0) :]]
        self._learn(new)
        for token in new:
            for gram in GRAMS:
                if len(known) >= gram:
                    self._follows[tuple(known[-gram:])] = len(known)
            known.append(token)
        self._guessed = []
        if self._rest:
            self._rest -= 1
            return []
        found = (self._follows.get(tuple(known[-gram:])) for gram in GRAMS)
        start = next((at for at in found if at is not None), None)
        if start is not None:
            for at in range(start, start + min(most, self._reach)):  # a text that repeats goes on so
                self._guessed.append(known[at] if at < len(known) else self._guessed[at - len(known)])
        return self._guessed

    def _learn(self, new: Sequence[int]) -> None:
        """Guess more after what was right, and less, or nothing for a while, after what was wrong."""
        if not self._guessed:
            return
        right = 0
        while right < min(len(self._guessed), len(new)) and self._guessed[right] == new[right]:
            right += 1
        whole = right == len(self._guessed)
        self._reach = 2 * right + 1 if whole else right + 1
        self._wrong = 0 if right else self._wrong + 1
        self._rest = 0 if right else min(2**self._wrong, LONGEST_REST)
