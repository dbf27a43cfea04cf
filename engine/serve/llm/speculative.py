"""Proposes draft tokens for speculative decoding, from the sequence itself or by a smaller model.

Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192): one forward verifies all draft tokens of a
sequence, so that only the number of forwards changes, not the text. Rejected tokens cost time: where draft tokens are
rejected, fewer are proposed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.bundles.bundle import Bundle
from engine.errors import UserError
from engine.serve.llm.model_runner import ModelRunner, make_runner, max_positions
from engine.serve.llm.ngram import count_accepted
from engine.serve.llm.sampler import NOT_FINITE, sample
from engine.serve.llm.scheduler import ScheduledSequence, schedule_tokens
from engine.serve.llm.sequence import Sequence

LOG = logging.getLogger(__name__)

Requests = list[tuple[Sequence, int]]  # sequences that decode, and how many draft tokens each may get


class Proposer(Protocol):
    """Proposes draft tokens. It may have a KV cache of its own: a `kv_cache.CacheStorage` with the same slots."""

    num_forwards: int  # run to propose tokens

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of its KV cache for one token."""

    def propose(self, requests: Requests) -> list[list[int]]:
        """Return draft tokens of each sequence, no more than it may get."""

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Reallocate the cache; `keep` are (slot, tokens) that become slots 0, 1, ... of the new one."""

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Give a slot to a new sequence, whose first tokens are those of slot `source`."""


class NgramProposer:
    """Looks n-grams up in a sequence's own tokens (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding)."""

    num_forwards = 0
    cache_bytes_per_token = 0

    def propose(self, requests: Requests) -> list[list[int]]:
        """Look up each sequence's last n-gram in itself."""
        return [sequence.draft.propose(sequence.prompt, sequence.tokens, limit) for sequence, limit in requests]

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Do nothing: there is no cache."""

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Do nothing: there is no cache."""


class DraftModel:
    """Proposes tokens by a smaller model with the same tokenizer, for all sequences at once, with slots of its own.

    It samples as the sequence itself will: greedily, or with the random numbers that the sequence's random generator will give,
    so that the two models agree where their distributions do. It computes a prompt once its sequence has its first token.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_positions: int | None,
        vocab_size: int,
        target_vocab_size: int,
        max_batched_tokens: int,
    ) -> None:
        """Take the draft model's runner, its positions (None: no limit), and the vocabulary sizes of it and the target."""
        assert runner.has_slot_cache, "a draft model must be able to roll back its tokens"
        self.runner, self.max_batched_tokens = runner, max_batched_tokens
        self.max_positions, self.vocab_size, self.target_vocab_size = max_positions, vocab_size, target_vocab_size
        self.num_forwards = 0
        self._num_computed: list[int] = []  # tokens of each slot's sequence in the draft model's cache
        self._drafted: list[list[int]] = []  # draft tokens in the cache after these

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of its KV cache for one token."""
        return self.runner.cache_bytes_per_token

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Reallocate the cache; how many tokens of a slot are kept is what the draft model has computed of it."""
        kept = [(slot, self._num_computed[slot]) for slot, _ in keep]
        self.runner.reshape(num_slots, capacity, kept)
        self._num_computed = [num_tokens for _, num_tokens in kept] + [0] * (num_slots - len(kept))
        self._drafted = [[] for _ in range(num_slots)]

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Share as much of the prefix as the draft model has computed."""
        num_shared = min(num_tokens, self._num_computed[source])
        self.runner.assign_slot(slot, source, num_shared)
        self._num_computed[slot], self._drafted[slot] = num_shared, []

    def propose(self, requests: Requests) -> list[list[int]]:
        """Run a forward for each draft token; if one fails, there are no more."""
        rows = [row for sequence, limit in requests if (row := self._start_row(sequence, limit))]
        try:
            if rows and (rows := self._prefill(rows)):
                self._decode(rows)
        except Exception:  # what was computed before is still valid
            LOG.exception("the draft model failed")
        return [sequence.draft.length.draft_tokens for sequence, _ in requests]

    def _start_row(self, sequence: Sequence, limit: int) -> DraftRow | None:
        """Count accepted draft tokens as computed, and return what to propose next; None: nothing."""
        slot = sequence.slot
        new_tokens = sequence.slice_tokens(self._num_computed[slot], sequence.num_tokens - 1)
        self._num_computed[slot] += count_accepted(self._drafted[slot], new_tokens)
        self._drafted[slot] = []
        if self.max_positions is not None:
            limit = min(limit, self.max_positions - sequence.num_tokens)
        count = sequence.draft.length.start_proposal(sequence.tokens, max(limit, 0))
        return DraftRow(sequence, count, [*sequence.tokens], lookahead_rng(sequence)) if count else None

    def _prefill(self, rows: list[DraftRow]) -> list[DraftRow]:
        """Compute the tokens that the cache lacks, a part of them where they are many; return the rows that are complete.

        These have their first draft token then.
        """
        pending = [row.sequence.num_tokens - self._num_computed[row.sequence.slot] for row in rows]
        counts = schedule_tokens(pending, self.max_batched_tokens)
        batch = []
        for row, num_pending, count in zip(rows, pending, counts, strict=True):
            slot = row.sequence.slot
            start = self._num_computed[slot]
            tokens = self._known_ids(row.sequence.slice_tokens(start, start + count))
            batch.append(ScheduledSequence(slot, start, tokens, int(count == num_pending)))
        logits_RV = self._forward([inputs for inputs in batch if inputs.tokens])
        for inputs in batch:
            self._num_computed[inputs.slot] += len(inputs.tokens)
        return self._sample([row for row, inputs in zip(rows, batch, strict=True) if inputs.num_logits], logits_RV)

    def _decode(self, rows: list[DraftRow]) -> None:
        """Propose further tokens, one forward for each."""
        while rows := [row for row in rows if len(row.draft_tokens) < row.count]:
            batch = [
                ScheduledSequence(
                    row.sequence.slot,
                    row.sequence.num_tokens + len(row.draft_tokens) - 1,
                    self._known_ids(row.draft_tokens[-1:]),
                    1,
                )
                for row in rows
            ]
            logits_RV = self._forward(batch)
            for row in rows:
                self._drafted[row.sequence.slot].append(row.draft_tokens[-1])
            rows = self._sample(rows, logits_RV)

    def _forward(self, batch: list[ScheduledSequence]) -> Tensor:
        self.num_forwards += 1
        return self.runner.run(batch)

    def _known_ids(self, tokens: list[int]) -> list[int]:
        """Replace ids that the draft model doesn't have by 0: vocabularies may be padded to different sizes."""
        return [token if token < self.vocab_size else 0 for token in tokens]

    def _sample(self, rows: list[DraftRow], logits_RV: Tensor) -> list[DraftRow]:
        """Append one draft token to each row; return the rows that may get more."""
        if not rows:
            return []
        tokens = sample(
            logits_RV[:, : self.target_vocab_size],
            [row.sequence.sampling for row in rows],
            [row.generated for row in rows],
            [row.rng for row in rows],
        )
        for row, token in zip(rows, tokens, strict=True):
            if token == NOT_FINITE:  # the cache may hold such numbers, too
                self.runner.clear_slot(row.sequence.slot)
                self._num_computed[row.sequence.slot], self._drafted[row.sequence.slot] = 0, []
                row.sequence.draft.length.pause()
            else:
                row.draft_tokens.append(token)
                row.generated.append(token)
        return [row for row, token in zip(rows, tokens, strict=True) if token != NOT_FINITE]


@dataclass
class DraftRow:
    """A sequence that gets draft tokens."""

    sequence: Sequence
    count: int  # draft tokens to propose
    generated: list[int]  # tokens of the sequence, and draft tokens so far
    rng: random.Random

    @property
    def draft_tokens(self) -> list[int]:
        """Draft tokens so far."""
        return self.sequence.draft.length.draft_tokens


def make_proposer(
    runner: ModelRunner,
    model: nn.Module,
    draft_model: nn.Module | None,
    max_batched_tokens: int,
    compiled: bool = False,
) -> Proposer:
    """Return the proposer for a model and its runner. Raises UserError for a draft model that can't be used."""
    if draft_model is None:
        return NgramProposer()
    draft_runner = make_runner(draft_model, compiled=compiled)
    for name, model_runner in (("the bundle", runner), ("serve.draft_model", draft_runner)):
        if not model_runner.has_slot_cache:
            raise UserError(
                f"serve.draft_model: the attention of {name} can't roll back draft tokens: leave serve.draft_model out"
            )
    draft: Any = draft_model.config
    target: Any = model.config
    return DraftModel(draft_runner, max_positions(draft), draft.vocab_size, target.vocab_size, max_batched_tokens)


def check_draft_model(bundle: Bundle, folder: str) -> None:
    """Raise UserError for a draft model (a bundle's folder) that was changed, or has another tokenizer than the bundle."""
    draft = Bundle.open(folder)
    draft.verify()
    for either in (bundle, draft):
        objective = either.objective()
        if not objective.is_causal:
            raise UserError(
                f"serve.draft_model is for causal language models, and {either.folder} is for {objective.options.name}"
            )
    vocabulary, draft_vocabulary = bundle.processor().get_vocab(), draft.processor().get_vocab()
    if vocabulary != draft_vocabulary:
        num_different = sum(draft_vocabulary.get(token) != number for token, number in vocabulary.items())
        raise UserError(
            f"serve.draft_model={folder} has another tokenizer than {bundle.folder} ({len(draft_vocabulary):,} tokens and "
            f"{len(vocabulary):,}, of which {num_different:,} differ): use one that was trained with the same"
        )


def lookahead_rng(sequence: Sequence) -> random.Random:
    """Return a random generator that gives the numbers which the sequence's own will give, and leaves that as it is."""
    if not sequence.sampling.temperature:
        return sequence.rng  # no number is drawn
    rng = random.Random()
    rng.setstate(sequence.rng.getstate())
    return rng
