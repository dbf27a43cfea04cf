"""Text generation with iteration-level batching (Yu et al. 2022, Orca): sequences join and leave between forwards.

An `LLMEngine` takes sequences of tokens and generates; turning tokens into text is for its listeners (`completions`).
`TransformersEngine` runs a transformers model in a thread of its own: `scheduler` decides what goes into a step,
`speculative` proposes draft tokens, `model_runner` runs the step, and `sampler` picks the tokens. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.serve.llm.kv_cache import KVCacheManager
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import ModelRunner, make_runner
from engine.serve.llm.sampler import NOT_FINITE, TokenLogprobs, compute_logprobs, sample
from engine.serve.llm.scheduler import EngineQueue, ScheduledSequence, Scheduler
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.speculative import Proposer, make_proposer
from engine.serve.short_lived_thread import run_in_short_lived_thread

MEMORY_SHARE = 0.25  # of the free memory, at most, for a KV cache whose size is not given
LOG = logging.getLogger(__name__)

Batch = list[tuple[Sequence, ScheduledSequence]]


class SamplingRow(NamedTuple):
    """A sequence that gets its next token from a row of the logits."""

    sequence: Sequence
    row: int
    draft_tokens: list[int]  # that went through the model after the row's token


class LLMEngine(Protocol):
    """What a replica needs of an engine."""

    max_seq_len: int  # tokens that a sequence may have, its prompt included

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFull; ValueError for one that is too long."""

    def abort(self, sequences: list[Sequence]) -> None:
        """Drop sequences and free their slots before the next step."""

    @property
    def is_alive(self) -> bool:
        """Whether sequences are still processed."""

    @property
    def stats(self) -> dict[str, int]:
        """Load and totals since the start: those of `metrics.REPLICA_METRICS` that the engine knows."""


class TransformersEngine:
    """Owns a transformers model and the thread that runs it."""

    def __init__(
        self,
        model: nn.Module,
        max_positions: int,
        *,
        max_num_seqs: int,
        max_queue: int,
        max_batched_tokens: int,
        kv_cache_tokens: int | None = None,
        num_speculative_tokens: int = 0,
        draft_model: nn.Module | None = None,
        compiled: bool = False,
        on_output: Callable[[list[Sequence]], None] = lambda _: None,
        adapters: LoraAdapters | None = None,
    ) -> None:
        """Run up to `max_num_seqs` sequences of up to `max_positions` tokens at once; `max_queue` more may wait.

        `max_batched_tokens` go into a forward. `kv_cache_tokens` bounds the KV cache (None: by `max_num_seqs` sequences
        of full length and the free memory). Up to `num_speculative_tokens` draft tokens of each sequence are verified in
        a step, where the runner can roll back rejected ones; `draft_model` proposes them if it is given: a smaller model
        with the same tokenizer, whose KV cache has as many tokens. `compiled`: by torch. `on_output` is called from the
        engine's thread, once a step, with the sequences that have something new for their listeners. Raises UserError
        where the draft model, or the compiler, can't be used.
        """
        self.adapters = adapters or LoraAdapters(model)
        self.runner: ModelRunner = run_in_short_lived_thread(lambda: make_runner(model, self.adapters, compiled))
        self.proposer: Proposer = run_in_short_lived_thread(
            lambda: make_proposer(self.runner, model, draft_model, max_batched_tokens, compiled)
        )
        cache_tokens = max_num_seqs * max_positions if kv_cache_tokens is None else kv_cache_tokens
        if kv_cache_tokens is None and self.runner.cache_bytes_per_token:
            bytes_per_token = self.runner.cache_bytes_per_token + self.proposer.cache_bytes_per_token
            cache_tokens = min(cache_tokens, max(int(MEMORY_SHARE * free_memory(model)) // bytes_per_token, 1))
        self.max_seq_len = min(max_positions, cache_tokens)
        self.num_speculative_tokens = num_speculative_tokens if self.runner.has_slot_cache else 0
        generation_config: Any = model.generation_config
        eos = generation_config.eos_token_id if generation_config else None
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        self.num_rows = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.queue = EngineQueue(max_queue, on_output)
        self.kv_cache = run_in_short_lived_thread(
            lambda: KVCacheManager(
                max_num_seqs, cache_tokens, max_positions, (self.runner, self.proposer), self.runner.has_slot_cache
            )
        )
        self.scheduler = Scheduler(self.queue, self.kv_cache, self.adapters, max_batched_tokens)
        self._thread = threading.Thread(target=self._run, name="llm-engine", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFull; ValueError for one that is too long."""
        self.queue.add(sequences, self.max_seq_len)

    def abort(self, sequences: list[Sequence]) -> None:
        """Drop sequences and free their slots before the next step."""
        self.queue.abort(sequences)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs; only an error that is no request's fault ends it."""
        return self._thread.is_alive()

    @property
    def stats(self) -> dict[str, int]:
        """Load and totals since the start."""
        return {
            "waiting": len(self.queue), "running": len(self.scheduler.running),
            "cached_tokens": self.kv_cache.num_used_tokens, "cache_tokens": self.kv_cache.num_total_tokens,
            "steps": self.scheduler.num_steps, "rows": self.num_rows, "reused_tokens": self.scheduler.num_cached_tokens,
            "guessed_tokens": self.num_draft_tokens, "right_tokens": self.num_accepted_tokens,
            "draft_forwards": self.proposer.num_forwards, "adapters": len(self.adapters.loaded),
            "adapter_loads": self.adapters.num_loads,
        }  # fmt: skip

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self.queue.changed:
                while not self.scheduler.running and not len(self.queue):
                    self.queue.changed.wait()
                self.scheduler.drop_aborted()
                adapter = self.scheduler.admit()
            if adapter:
                self._load_adapter(adapter)
            if self.scheduler.running:
                self._step()
            self.queue.flush_outputs()

    def _load_adapter(self, name: str) -> None:
        """Load an adapter; if that fails, fail the sequences that wait for it. Others may be queued meanwhile."""
        try:
            self.adapters.load(name, self.scheduler.adapters_in_use)
        except (UserError, RuntimeError):  # changed or deleted since it was deployed; out of memory
            LOG.exception("adapter '%s' can't be loaded", name)
            error = f"the adapter '{name}' can't be loaded any more"
            self.queue.fail_waiting(error, lambda sequence: sequence.adapter == name)

    def _step(self) -> None:
        """Schedule a step, run it and process the sampled tokens."""
        batch = self.scheduler.schedule(self._propose())
        self.num_rows += len(batch)
        try:
            self._process(batch, self.runner.run([inputs for _, inputs in batch]))
        except Exception:
            self._retry_one_by_one(batch)

    def _propose(self) -> dict[Sequence, list[int]]:
        """Return draft tokens of the sequences that decode."""
        limits = {
            sequence: min(self.num_speculative_tokens, sequence.max_tokens - len(sequence.tokens) - 1)
            for sequence in self.scheduler.running
            if sequence.tokens
        }
        requests = [(sequence, limit) for sequence, limit in limits.items() if limit > 0]
        proposals = self.proposer.propose(requests) if requests else []
        self.num_draft_tokens += sum(map(len, proposals))
        return {sequence: tokens for (sequence, _), tokens in zip(requests, proposals, strict=True)}

    def _retry_one_by_one(self, batch: Batch) -> None:
        """Run a failed step again, one sequence at a time: an error is one request's, and the others continue."""
        for sequence, inputs in batch:
            if sequence.num_computed_tokens != inputs.num_computed_tokens or sequence.finish_reason:
                continue  # it had its token before the step failed
            try:
                self._process([(sequence, inputs)], self.runner.run([inputs]))
            except Exception as error:
                self.scheduler.finish(sequence, "error", f"{type(error).__name__}: {error}")

    def _process(self, batch: Batch, logits_RV: Tensor) -> None:
        """Append a token to each sequence whose last token was computed, and more where draft tokens are accepted."""
        start, rows = 0, []
        for sequence, inputs in batch:
            # Draft tokens behind the sequence's own; negative: tokens of it that are yet to be computed.
            num_draft = inputs.num_computed_tokens + len(inputs.tokens) - sequence.num_tokens
            if sequence.needs_prompt_logprobs and not sequence.tokens:
                self._append_prompt_logprobs(sequence, inputs, logits_RV[start : start + inputs.num_logits])
            start += inputs.num_logits
            if num_draft >= 0 and sequence.max_tokens:
                draft_tokens = inputs.tokens[len(inputs.tokens) - num_draft :]
                rows.append(SamplingRow(sequence, start - 1 - num_draft, draft_tokens))
        tokens = self._sample(rows, logits_RV)
        for sequence, inputs in batch:
            num_computed_tokens = inputs.num_computed_tokens + len(inputs.tokens)
            sequence.num_computed_tokens = min(num_computed_tokens, sequence.num_tokens)
            if not sequence.num_pending_tokens and not sequence.max_tokens:
                self.scheduler.finish(sequence, "length")
        while rows:
            for row, token in zip(rows, tokens, strict=True):
                self.append_token(row.sequence, token)
            accepted = [row for row, token in zip(rows, tokens, strict=True) if row.draft_tokens[:1] == [token]]
            self.num_accepted_tokens += len(accepted)
            rows = [
                SamplingRow(row.sequence, row.row + 1, row.draft_tokens[1:])
                for row in accepted
                if not row.sequence.finish_reason
            ]
            for row in rows:
                row.sequence.num_computed_tokens += 1
            tokens = self._sample(rows, logits_RV)

    def _sample(self, rows: list[SamplingRow], logits_RV: Tensor) -> list[int]:
        """Return the next token of each of these sequences, and append its log-probabilities if they are asked for."""
        if not rows:
            return []
        sequences = [row.sequence for row in rows]
        if len(rows) < len(logits_RV):
            logits_RV = logits_RV[[row.row for row in rows]]
        tokens = sample(
            logits_RV,
            [sequence.sampling for sequence in sequences],
            [sequence.tokens for sequence in sequences],
            [sequence.rng for sequence in sequences],
            [sequence.mask for sequence in sequences],
        )
        self._append_logprobs(sequences, tokens, logits_RV)
        return tokens

    def append_token(self, sequence: Sequence, token: int) -> None:
        """Append a sampled token, and finish the sequence if it was the last."""
        sequence.first_token_at = sequence.first_token_at or time.monotonic()
        if token == NOT_FINITE:
            self.runner.clear_slot(sequence.slot)
            sequence.num_computed_tokens = 0
            self.scheduler.finish(sequence, "error", "the model's output is not a finite number")
        elif token in self.eos_ids:
            self.scheduler.finish(sequence, "stop")
        else:
            is_complete = sequence.mask is not None and sequence.mask.accept_token(token)
            sequence.tokens.append(token)
            if is_complete:
                self.scheduler.finish(sequence, "stop")
            elif len(sequence.tokens) >= sequence.max_tokens:
                self.scheduler.finish(sequence, "length")
            elif sequence.streams:
                self.queue.report(sequence)

    @staticmethod
    def _append_logprobs(sequences: list[Sequence], tokens: list[int], logits_RV: Tensor) -> None:
        """Append the log-probabilities of sampled tokens, before the tokens: a listener reads up to len(tokens) of both."""
        rows = [
            i for i, sequence in enumerate(sequences) if sequence.num_logprobs is not None and tokens[i] != NOT_FINITE
        ]
        if not rows:
            return
        num_top = max(sequences[i].num_logprobs or 0 for i in rows)
        logprobs = compute_logprobs(logits_RV[rows], [tokens[i] for i in rows], num_top)
        for i, entry in zip(rows, logprobs, strict=True):
            top = entry.top[: sequences[i].num_logprobs]
            sequences[i].token_logprobs.append(TokenLogprobs(entry.token, entry.logprob, top))

    @staticmethod
    def _append_prompt_logprobs(sequence: Sequence, inputs: ScheduledSequence, logits_TV: Tensor) -> None:
        """Append the log-probabilities of the prompt's tokens that follow those of a chunk."""
        first = inputs.num_computed_tokens + 1
        following = sequence.prompt[first : first + len(inputs.tokens)]
        if following:
            num_top = sequence.num_logprobs or 0
            sequence.prompt_logprobs += compute_logprobs(logits_TV[: len(following)], following, num_top)


def free_memory(model: nn.Module) -> int:
    """Return the free bytes of memory on a model's device."""
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
