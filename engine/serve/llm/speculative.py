"""What may come next in a text, guessed from the text itself or by a smaller model.

Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192): one forward tells of each guess whether it
is what the model would have written, so that only the number of forwards changes. A wrong guess costs time: where guesses
are wrong, fewer are made.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from engine.bundles.bundle import Bundle
from engine.errors import UserError
from engine.serve.llm.model_runner import ModelRunner, ScheduledSequence, make_forward, positions
from engine.serve.llm.sampler import choose
from engine.serve.llm.scheduler import schedule_tokens

if TYPE_CHECKING:
    from engine.serve.llm.engine import Completion

GRAMS = (3, 2)  # tokens that are looked up, the longest first
FIRST_REACH = 2  # tokens guessed at a time, until it is known how good the guesses are
LONGEST_REST = 64  # steps without a guess, after several wrong ones
LOG = logging.getLogger(__name__)


class AdaptiveLength:
    """How many tokens of one sequence to guess."""

    def __init__(self) -> None:
        self.guessed: list[int] = []  # last
        self._at = 0  # tokens that were written before these
        self._length, self._wrong, self._rest = FIRST_REACH, 0, 0

    def next(self, written: Sequence[int], most: int) -> int:
        """Return how many to guess after what is written now, and begin with none of them."""
        self._learn(written[self._at :])
        self.guessed, self._at = [], len(written)
        if self._rest:
            self._rest -= 1
            return 0
        return min(most, self._length)

    def give_up(self) -> None:
        """Guess nothing for long."""
        self.guessed, self._rest = [], LONGEST_REST

    def _learn(self, came: Sequence[int]) -> None:
        """Guess more after what was right, and less, or nothing for a while, after what was wrong."""
        if not self.guessed:
            return
        right = alike(self.guessed, came)
        self._length = 2 * right + 1 if right == len(self.guessed) else right + 1
        self._wrong = 0 if right else self._wrong + 1
        self._rest = 0 if right else min(2**self._wrong, LONGEST_REST)


class Proposer(Protocol):
    """Where guesses come from. It is told of the lanes, since it may have a cache of its own."""

    forwards: int  # run for guesses

    @property
    def token_bytes(self) -> int:
        """Bytes of its cache for one token."""

    def guess(self, writers: Sequence[tuple[Completion, int]]) -> list[list[int]]:
        """Return what each of these sequences may go on with: no more tokens than are told with it."""

    def shape(self, lanes: int, capacity: int, keep: Sequence[int] = ()) -> None:
        """Have so many lanes; those of `keep` become lanes 0, 1, ..."""

    def place(self, source: int, target: int, tokens: int) -> None:
        """Give a lane to another sequence, whose first tokens are those of a lane."""


class NgramProposer:
    """Guesses from a sequence's own text (prompt lookup, Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding)."""

    forwards = 0
    token_bytes = 0

    def guess(self, writers: Sequence[tuple[Completion, int]]) -> list[list[int]]:
        """Look each up in itself."""
        return [it.draft.guess(it.prompt, it.tokens, most) for it, most in writers]

    def shape(self, lanes: int, capacity: int, keep: Sequence[int] = ()) -> None:
        """Have nothing in lanes."""

    def place(self, source: int, target: int, tokens: int) -> None:
        """Have nothing in lanes."""


class Draft:
    """How one sequence may go on: where its last tokens stood before, what followed them."""

    def __init__(self) -> None:
        self.reach = AdaptiveLength()
        self._known: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # tokens -> where what followed them last begins

    def guess(self, prompt: Sequence[int], written: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow; none where the last tokens stand nowhere before."""
        known = self._known
        new = [*prompt[len(known) :], *written[max(len(known) - len(prompt), 0) :]]
        for token in new:
            for gram in GRAMS:
                if len(known) >= gram:
                    self._follows[tuple(known[-gram:])] = len(known)
            known.append(token)
        count = self.reach.next(written, most)
        guessed = self.reach.guessed
        found = (self._follows.get(tuple(known[-gram:])) for gram in GRAMS)
        start = next((at for at in found if at is not None), None)
        if start is not None:
            for at in range(start, start + count):  # a text that repeats goes on so
                guessed.append(known[at] if at < len(known) else guessed[at - len(known)])
        return guessed


class DraftModel:
    """Guesses by a smaller model of the same tokens, all sequences at once, with a cache of as many lanes.

    It picks as the sequence itself would: the likeliest token, or with the numbers that its dice will show, so that the
    two models pick alike where their distributions are. It reads a prompt once its first token is written.
    """

    def __init__(
        self, forward: ModelRunner, positions: int | None, own: int, others: int, max_batched_tokens: int
    ) -> None:
        """Take a forward over lanes, the positions it has (None: any), its vocabulary and that of the model it guesses for."""
        assert forward.shares, "a draft must be able to go back on its guesses"
        self.forward, self.max_batched_tokens = forward, max_batched_tokens
        self.positions, self.own, self.others = positions, own, others
        self.forwards = 0
        self._read: list[int] = []  # tokens of each lane's sequence that are in the cache
        self._ahead: list[list[int]] = []  # guesses in the cache beyond these

    @property
    def token_bytes(self) -> int:
        """Bytes of its cache for one token."""
        return self.forward.token_bytes

    def shape(self, lanes: int, capacity: int, keep: Sequence[int] = ()) -> None:
        """Make the cache anew."""
        self.forward.shape(lanes, capacity, [(lane, self._read[lane]) for lane in keep])
        self._read = [self._read[lane] for lane in keep] + [0] * (lanes - len(keep))
        self._ahead = [[] for _ in range(lanes)]

    def place(self, source: int, target: int, tokens: int) -> None:
        """Go on from what was read of the same text."""
        shared = min(tokens, self._read[source])
        if source != target and shared:
            self.forward.copy(source, target, shared)
        self._read[target], self._ahead[target] = shared, []

    def guess(self, writers: Sequence[tuple[Completion, int]]) -> list[list[int]]:
        """Run a forward for each token ahead; a draft that fails guesses nothing."""
        rows = [row for it, most in writers if (row := self._row(it, most))]
        try:
            if rows and (rows := self._catch_up(rows)):
                self._look_ahead(rows)
        except Exception:  # what it has read is as good as before
            LOG.exception("the draft failed")
        return [it.draft.reach.guessed for it, _ in writers]

    def _row(self, it: Completion, most: int) -> Row | None:
        """Return what to guess of a sequence, if anything; what was guessed right is read."""
        lane = it.lane
        self._read[lane] += alike(self._ahead[lane], it.text(self._read[lane], it.known - 1))
        self._ahead[lane] = []
        if self.positions is not None:
            most = min(most, self.positions - it.known)
        count = it.draft.reach.next(it.tokens, max(most, 0))
        return Row(it, count, [*it.tokens], same_dice(it)) if count else None

    def _catch_up(self, rows: Sequence[Row]) -> list[Row]:
        """Read what a sequence has beyond what was read, a part of it where that is much; return those that are through.

        They have their first guess then.
        """
        pending = [row.it.known - self._read[row.it.lane] for row in rows]
        counts = schedule_tokens(pending, self.max_batched_tokens)
        parts = []
        for row, left, count in zip(rows, pending, counts, strict=True):
            read = self._read[row.it.lane]
            parts.append(
                ScheduledSequence(row.it.lane, read, self._ids(row.it.text(read, read + count)), int(count == left))
            )
        logits_RV = self._forward([part for part in parts if part.tokens])
        for part in parts:
            self._read[part.lane] += len(part.tokens)
        return self._pick([row for row, part in zip(rows, parts, strict=True) if part.wanted], logits_RV)

    def _look_ahead(self, rows: list[Row]) -> None:
        """Guess on from the guesses."""
        while rows := [row for row in rows if len(row.guessed) < row.count]:
            parts = [
                ScheduledSequence(row.it.lane, row.it.known + len(row.guessed) - 1, self._ids(row.guessed[-1:]), 1)
                for row in rows
            ]
            logits_RV = self._forward(parts)
            for row in rows:
                self._ahead[row.it.lane].append(row.guessed[-1])
            rows = self._pick(rows, logits_RV)

    def _forward(self, parts: Sequence[ScheduledSequence]) -> Tensor:
        self.forwards += 1
        return self.forward.run(parts)

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        """Return tokens that the draft has: vocabularies may be padded to other lengths."""
        return [token if token < self.own else 0 for token in tokens]

    def _pick(self, rows: Sequence[Row], logits_RV: Tensor) -> list[Row]:
        """Guess one token more of each row; return those that may go on."""
        if not rows:
            return []
        picked = choose(
            logits_RV[:, : self.others], [row.it.sampling for row in rows], [row.written for row in rows],
            [row.dice for row in rows],
        )  # fmt: skip
        for row, token in zip(rows, picked, strict=True):
            if token < 0:  # no finite number, and its cache may hold more of the kind
                self.forward.clear(row.it.lane)
                self._read[row.it.lane], self._ahead[row.it.lane] = 0, []
                row.it.draft.reach.give_up()
            else:
                row.guessed.append(token)
                row.written.append(token)
        return [row for row, token in zip(rows, picked, strict=True) if token >= 0]


@dataclass
class Row:
    """A sequence of which some tokens are guessed."""

    it: Completion
    count: int  # tokens to guess
    written: list[int]  # and guessed
    dice: random.Random

    @property
    def guessed(self) -> list[int]:
        """Those guessed so far."""
        return self.it.draft.reach.guessed


def make_guesser(
    forward: ModelRunner, model: nn.Module, draft: nn.Module | None, max_batched_tokens: int, compiled: bool = False
) -> Proposer:
    """Return what guesses for a model that runs by `forward`. Raises UserError for a draft of which no use can be made."""
    if draft is None:
        return NgramProposer()
    ahead = make_forward(draft, compiled=compiled)
    for whose, lanes in (("the bundle", forward), ("serve.draft_model", ahead)):
        if not lanes.shares:
            raise UserError(
                f"serve.draft_model: the attention of {whose} can't go back on guesses: leave serve.draft_model out"
            )
    own: Any = draft.config
    others: Any = model.config
    return DraftModel(ahead, positions(own), own.vocab_size, others.vocab_size, max_batched_tokens)


def refuse_unfit_draft(bundle: Bundle, draft: str) -> None:
    """Raise UserError for a draft (a folder) that was changed, writes no text, or has other tokens than the bundle."""
    smaller = Bundle.open(draft)
    smaller.verify()
    for it in (bundle, smaller):
        task = it.objective()
        if task.auto_class != "AutoModelForCausalLM":
            raise UserError(f"serve.draft_model is for bundles that write, and {it.folder} is for {task.options.name}")
    tokens, others = (it.processor().get_vocab() for it in (bundle, smaller))
    if tokens != others:
        differ = sum(others.get(token) != number for token, number in tokens.items())
        raise UserError(
            f"serve.draft_model={draft} has another tokenizer than {bundle.folder} ({len(others):,} tokens and {len(tokens):,}, of which "
            f"{differ:,} differ): use one that was trained with the same"
        )


def same_dice(it: Completion) -> random.Random:
    """Return dice that will show what a sequence's own will; the same, where none are thrown."""
    if not it.sampling.temperature:
        return it.dice
    dice = random.Random()
    dice.setstate(it.dice.getstate())
    return dice


def alike(guessed: Sequence[int], came: Sequence[int]) -> int:
    """Count the guesses that came true before the first that didn't."""
    right = 0
    while right < min(len(guessed), len(came)) and guessed[right] == came[right]:
        right += 1
    return right
