"""Draft tokens of one sequence: how many to propose, and an n-gram index of its own tokens that proposes some."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM_SIZES = (3, 2)  # tokens that are looked up, the longest first
INITIAL_LENGTH = 2  # draft tokens of a step, until their acceptance is known
MAX_PAUSE_STEPS = 64  # steps without draft tokens, after several rejections in a row


class AdaptiveLength:
    """How many draft tokens to propose for one sequence, by how many were accepted before."""

    def __init__(self) -> None:
        self.draft_tokens: list[int] = []  # of the last proposal
        self._num_generated = 0  # tokens of the sequence before these
        self._length, self._num_rejections, self._pause_steps = INITIAL_LENGTH, 0, 0

    def start_proposal(self, generated: Sequence[int], max_tokens: int) -> int:
        """Return how many tokens to propose after those generated so far, and clear `draft_tokens` for them."""
        self._update(generated[self._num_generated :])
        self.draft_tokens, self._num_generated = [], len(generated)
        if self._pause_steps:
            self._pause_steps -= 1
            return 0
        return min(max_tokens, self._length)

    def pause(self) -> None:
        """Drop the draft tokens and propose none for the longest pause."""
        self.draft_tokens, self._pause_steps = [], MAX_PAUSE_STEPS

    def _update(self, new_tokens: Sequence[int]) -> None:
        """Propose more after tokens that were accepted; fewer, or none for some steps, after rejected ones."""
        if not self.draft_tokens:
            return
        accepted = count_accepted(self.draft_tokens, new_tokens)
        self._length = 2 * accepted + 1 if accepted == len(self.draft_tokens) else accepted + 1
        self._num_rejections = 0 if accepted else self._num_rejections + 1
        self._pause_steps = 0 if accepted else min(2**self._num_rejections, MAX_PAUSE_STEPS)


class DraftState:
    """The draft tokens of one sequence, and an index from its n-grams to what followed each of them last."""

    def __init__(self) -> None:
        self.length = AdaptiveLength()
        self._tokens: list[int] = []  # indexed so far
        self._next_index: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence

    def propose(self, prompt: Sequence[int], generated: Sequence[int], max_tokens: int) -> list[int]:
        """Return up to `max_tokens` tokens that may follow; none where the last n-gram does not occur before."""
        tokens = self._tokens
        new_tokens = [*prompt[len(tokens) :], *generated[max(len(tokens) - len(prompt), 0) :]]
        for token in new_tokens:
            for size in NGRAM_SIZES:
                if len(tokens) >= size:
                    self._next_index[tuple(tokens[-size:])] = len(tokens)
            tokens.append(token)
        count = self.length.start_proposal(generated, max_tokens)
        draft_tokens = self.length.draft_tokens
        matches = (self._next_index.get(tuple(tokens[-size:])) for size in NGRAM_SIZES)
        start = next((index for index in matches if index is not None), None)
        if start is not None:
            for index in range(start, start + count):  # past the end, the repetition continues into the draft tokens
                draft_tokens.append(tokens[index] if index < len(tokens) else draft_tokens[index - len(tokens)])
        return draft_tokens


def count_accepted(draft_tokens: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many draft tokens equal the tokens that came, before the first that differs."""
    count = 0
    while count < min(len(draft_tokens), len(tokens)) and draft_tokens[count] == tokens[count]:
        count += 1
    return count
