"""Completions with iteration-level batching (Yu et al. 2022, Orca): they join and leave between forwards.

A `Generator` takes completions and gives tokens; text is its readers' affair. The one here runs a transformers model in a
thread of its own: `scheduling` decides what goes into a step, `forward` runs it, `sampling` picks the tokens. Shapes:
R rows (sequences), V vocabulary.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import ModelRunner, ScheduledSequence, make_forward
from engine.serve.llm.sampler import Mask, SamplingParams, choose
from engine.serve.llm.scheduler import (
    CacheShape,
    FairQueue,
    Slot,
    SlotAllocation,
    allocate_slot,
    cache_shape_for,
    schedule_tokens,
)
from engine.serve.llm.speculative import Draft, Proposer, make_guesser
from engine.serve.short_lived_thread import run_in_short_lived_thread

MEMORY_SHARE = 0.25  # of the free memory, at most, for a cache whose size is not given
LOOK_EVERY_S = 0.05  # at the queue, for deadlines
NOTHING = np.zeros(0, dtype=np.int64)
LOG = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many completions wait as may."""


@dataclass(frozen=True)
class Score:
    """The model's own log-probability (nats) of a token, before temperature and penalties, and of the likeliest ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Completion:
    """One sequence under way. The generator's thread appends to it; a reader may cancel it, and reads."""

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    logprobs: int | None = None  # so many of the likeliest are told with each token; None: none, nor the token's own
    score_prompt: bool = False  # the same for the prompt's tokens
    client: str = ""  # whose turn it takes
    adapter: str = ""  # "": the base alone
    deadline: float = float("inf")  # on time.monotonic: a place must be free by then
    stepwise: bool = False  # its reader wants to hear of each token, not of the end alone
    reader: Any = None  # whatever its reader knows it by
    cancelled: bool = False  # by a reader that left; its place is free at the next step
    mask: Mask | None = None  # of a text that has a given form
    schema: str = ""  # the form, in JSON, for a generator with masks of its own

    tokens: list[int] = field(default_factory=list)  # written so far
    scores: list[Score] = field(default_factory=list)  # of the tokens, and of the one that ended it if one did
    prompt_scores: list[Score] = field(default_factory=list)  # of the prompt from its second token on
    reason: str | None = None  # why it ended: stop, length, error, expired
    error: str = ""
    reused: int = 0  # prompt tokens that were in the cache already
    # On time.monotonic; 0: not yet.
    queued_at: float = 0.0
    placed_at: float = 0.0
    first_at: float = 0.0  # token
    ended_at: float = 0.0

    lane: int = -1
    cached: int = 0  # its tokens in the cache
    dice: random.Random = field(default_factory=random.Random)
    draft: Draft = field(default_factory=Draft)

    def __post_init__(self) -> None:
        self.dice = random.Random(secrets.randbits(64) if self.seed is None else self.seed)

    @property
    def need(self) -> int:
        """Tokens that it may come to hold in the cache."""
        return len(self.prompt) + self.max_tokens

    @property
    def known(self) -> int:
        """Tokens it has, of prompt and text."""
        return len(self.prompt) + len(self.tokens)

    def text(self, start: int, end: int) -> list[int]:
        """Return a part of its tokens, prompt and text end to end."""
        before = len(self.prompt)
        return [*self.prompt[start:end], *self.tokens[max(start - before, 0) : max(end - before, 0)]]

    def upcoming(self, count: int) -> list[int]:
        """Return the next tokens to go through the model."""
        if self.cached < len(self.prompt):
            return self.prompt[self.cached : self.cached + count]
        return self.tokens[self.cached - len(self.prompt) :]


class Turn(NamedTuple):
    """A sequence that gets its next token."""

    completion: Completion
    row: int  # of the logits
    guessed: Sequence[int]  # tokens that went through the model after it


class LLMEngine(Protocol):
    """What a replica needs of whatever writes its completions; another engine is another class of this kind."""

    limit: int  # tokens that a completion may have, its prompt included

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue completions, all or none. Raises QueueFull."""

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Let completions go at the next step, whose readers have left."""

    @property
    def alive(self) -> bool:
        """Whether completions still end."""

    @property
    def load(self) -> dict[str, int]:
        """How busy it is, and what it has done: the figures that `metrics.REPLICA` names, those that it knows."""


class Queued:
    """What generators share: who waits, and what their thread has to tell. Its caller holds the generator's lock."""

    limit: int  # tokens that a completion may have, its prompt included

    def __init__(self, max_queue: int, tell: Callable[[list[Completion]], None]) -> None:
        self.max_queue, self.tell = max_queue, tell
        self._waiting: FairQueue[Completion] = FairQueue()
        self._news: list[Completion] = []
        self._left = False  # somebody was cancelled
        self._looked = 0.0  # when the queue was last looked through

    def _queue(self, completions: Sequence[Completion]) -> None:
        """Queue completions, all or none. Raises QueueFull; ValueError for one that is over the limit."""
        if max(completion.need for completion in completions) > self.limit:
            raise ValueError(f"a completion may have {self.limit} tokens, its prompt included")
        if len(self._waiting) + len(completions) > self.max_queue:
            raise QueueFull
        now = time.monotonic()
        for completion in completions:
            completion.queued_at = now
            self._waiting.push(completion.client, completion)

    def _mark(self, completions: Sequence[Completion]) -> None:
        """Note that readers of these have left."""
        for completion in completions:
            completion.cancelled = True
        self._left = True

    def _look(self) -> bool:
        """Take off the queue who left, and whose deadline is over; tell whether one who runs may have left too."""
        now = time.monotonic()
        if self._left or now > self._looked + LOOK_EVERY_S:
            self._looked = now
            for completion in self._waiting.remove(lambda it: it.cancelled or it.deadline < now):
                completion.reason = "expired"
                self._news.append(completion)
        left, self._left = self._left, False
        return left

    def _tell_news(self) -> None:
        if self._news:
            news, self._news = self._news, []
            self.tell(news)


class TransformersEngine(Queued):
    """Owns a transformers model and the thread that runs it."""

    def __init__(
        self,
        model: nn.Module,
        positions: int,
        *,
        max_num_seqs: int,
        max_queue: int,
        max_batched_tokens: int,
        cache_tokens: int | None = None,
        num_speculative_tokens: int = 0,
        draft: nn.Module | None = None,
        compiled: bool = False,
        tell: Callable[[list[Completion]], None] = lambda _: None,
        adapters: LoraAdapters | None = None,
    ) -> None:
        """Run up to `max_num_seqs` sequences of `positions` tokens together, `max_batched_tokens` in a forward; `max_queue` more wait.

        `cache_tokens` bounds the cache (None: by `max_num_seqs` whole sequences and the free memory). `num_speculative_tokens` tokens of
        each sequence are guessed ahead, where the forward can go back on them, by `draft` if it is given: a smaller model
        of the same tokens, whose cache has as much room. `compiled`: by torch. `tell` is called from the thread, once a
        step, with the completions that have something new for their readers. Raises UserError where a draft, or the
        compiler, can't be used.
        """
        super().__init__(max_queue, tell)
        self.adapters = adapters or LoraAdapters(model)
        self.forward: ModelRunner = run_in_short_lived_thread(lambda: make_forward(model, self.adapters, compiled))
        self.guesser: Proposer = run_in_short_lived_thread(
            lambda: make_guesser(self.forward, model, draft, max_batched_tokens, compiled)
        )
        room = max_num_seqs * positions if cache_tokens is None else cache_tokens
        if cache_tokens is None and self.forward.token_bytes:
            token_bytes = self.forward.token_bytes + self.guesser.token_bytes
            room = min(room, max(int(MEMORY_SHARE * free_memory(model)) // token_bytes, 1))
        self.cache_tokens, self.max_num_seqs = room, max_num_seqs
        self.positions, self.max_batched_tokens = positions, max_batched_tokens
        self.limit = min(positions, room)
        self.num_speculative_tokens = num_speculative_tokens if self.forward.shares else 0
        generation: Any = model.generation_config
        eos = generation.eos_token_id if generation else None
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        self.running: list[Completion] = []  # the eldest first
        self.steps = self.rows = self.reused_tokens = self.guessed_tokens = self.right_tokens = 0
        self.shape = cache_shape_for([], max_num_seqs, room, positions)
        run_in_short_lived_thread(lambda: self.forward.shape(self.shape.lanes, self.shape.capacity))
        run_in_short_lived_thread(lambda: self.guesser.shape(self.shape.lanes, self.shape.capacity))
        self._held: list[np.ndarray] = [NOTHING] * self.shape.lanes  # of the lanes that nobody runs in
        self._by = [""] * self.shape.lanes  # adapters by which these were read
        self._used = [0] * self.shape.lanes
        self._work = threading.Condition()
        self._lacks = ""  # adapter that the first of the queue waits for
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue completions, all or none. Raises QueueFull; ValueError for one that is over the limit."""
        with self._work:
            self._queue(completions)
            self._work.notify()

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Let completions go at the next step."""
        with self._work:
            self._mark(completions)
            self._work.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs; it ends only by an error that is nobody's request's."""
        return self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """Completions waiting and running, tokens in the cache and room for them; sums since the start."""
        running = list(self.running)
        held = sum(completion.cached for completion in running)
        return {
            "waiting": len(self._waiting), "running": len(running), "cached_tokens": held,
            "cache_tokens": self.shape.lanes * self.shape.capacity, "steps": self.steps, "rows": self.rows,
            "reused_tokens": self.reused_tokens, "guessed_tokens": self.guessed_tokens, "right_tokens": self.right_tokens,
            "draft_forwards": self.guesser.forwards, "adapters": len(self.adapters.loaded),
            "adapter_loads": self.adapters.loads,
        }  # fmt: skip

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._work:
                while not self.running and not len(self._waiting):
                    self._work.wait()
                self.drop_cancelled()
                self._admit()
            if self._lacks:
                self._load(self._lacks)
            if self.running:
                self._step()
            self._tell_news()

    def drop_cancelled(self) -> None:
        """Take off who left, and whose deadline is over before a place was free."""
        if self._look():
            for completion in [it for it in self.running if it.cancelled]:
                self.finish(completion, "cancelled")

    def _admit(self) -> None:
        """Give lanes to those whose turn it is, until one has to wait: for a lane, or for its adapter."""
        self._lacks = ""
        while turn := self._waiting.first():
            client, completion = turn
            if completion.adapter and completion.adapter not in self.adapters.loaded:
                self._lacks = completion.adapter if self.adapters.has_room(self._in_use) else ""
                return
            if not self._place(completion):
                return
            self._waiting.start(client, completion.need)
            completion.placed_at = time.monotonic()
            self.reused_tokens += completion.reused
            self.running.append(completion)

    @property
    def _in_use(self) -> set[str]:
        return {it.adapter for it in self.running}

    def _load(self, name: str) -> None:
        """Load an adapter, while others may queue; those that wait for one that can't be loaded are told."""
        try:
            self.adapters.load(name, self._in_use)
        except (UserError, RuntimeError):  # changed or gone since it was deployed; no memory
            LOG.exception("adapter '%s' can't be loaded", name)
            with self._work:
                failed = self._waiting.remove(lambda it: it.adapter == name)
            for completion in failed:
                completion.error, completion.reason = f"the adapter '{name}' can't be loaded any more", "error"
            self._news += failed

    def _place(self, completion: Completion) -> bool:
        """Find a lane with room for a completion, and what of its prompt is in the cache; False: not now."""
        if completion.need > self.shape.capacity or len(self.running) >= self.shape.lanes:
            needs = [it.need for it in (*self.running, completion)]
            shape = cache_shape_for(needs, self.max_num_seqs, self.cache_tokens, self.positions)
            if shape == self.shape or shape.lanes <= len(self.running):
                return False
            self._reshape(shape)
        # A prompt to be scored goes through the model whole, for its logits.
        prompt = np.asarray(completion.prompt[: 1 if completion.score_prompt else None])
        found: SlotAllocation | None
        if self.forward.shares:
            found = allocate_slot(prompt, self._lanes(), completion.adapter)
        else:
            busy = {it.lane for it in self.running}
            free = next(lane for lane in range(self.shape.lanes) if lane not in busy)
            found = SlotAllocation(free, free, 0)
        if found is None:
            return False
        if found.source != found.lane and found.shared:
            self.forward.copy(found.source, found.lane, found.shared)
        self.guesser.place(found.source, found.lane, found.shared)
        completion.lane, completion.cached, completion.reused = found.lane, found.shared, found.shared
        return True

    def _reshape(self, shape: CacheShape) -> None:
        """Make the cache anew; what runs is kept, what was only held for its prefix is not."""
        self.forward.shape(shape.lanes, shape.capacity, [(it.lane, it.cached) for it in self.running])
        self.guesser.shape(shape.lanes, shape.capacity, [it.lane for it in self.running])
        for lane, completion in enumerate(self.running):
            completion.lane = lane
        self.shape, self._held, self._used = shape, [NOTHING] * shape.lanes, [0] * shape.lanes
        self._by = [""] * shape.lanes

    def _lanes(self) -> list[Slot]:
        lanes = [Slot(it, it, False, used, by) for it, used, by in zip(self._held, self._used, self._by, strict=True)]
        for it in self.running:
            whole = np.asarray([*it.prompt, *it.tokens])
            lanes[it.lane] = Slot(whole[: it.cached], whole, True, self.steps, it.adapter)
        return lanes

    def _step(self) -> None:
        """Run one forward, and take its tokens."""
        self.steps += 1
        pending = [completion.known - completion.cached for completion in self.running]
        counts = schedule_tokens(pending, self.max_batched_tokens)
        guesses = self._guess()
        batch, parts = [], []
        for completion, left, count in zip(self.running, pending, counts, strict=True):
            if count:
                wanted = count if completion.score_prompt and not completion.tokens else int(count == left)
                guessed = guesses.get(completion, [])
                batch.append(completion)
                upcoming = [*completion.upcoming(count), *guessed]
                parts.append(
                    ScheduledSequence(
                        completion.lane, completion.cached, upcoming, wanted + len(guessed), completion.adapter
                    )
                )
        self.rows += len(parts)
        try:
            logits_RV = self.forward.run(parts)
            self._take(batch, parts, logits_RV)
        except Exception:
            self._one_by_one(batch, parts)

    def _guess(self) -> dict[Completion, list[int]]:
        """Return what the sequences that write may go on with."""
        most = {
            it: min(self.num_speculative_tokens, it.max_tokens - len(it.tokens) - 1) for it in self.running if it.tokens
        }
        writers = [(it, count) for it, count in most.items() if count > 0]
        guesses = self.guesser.guess(writers) if writers else []
        self.guessed_tokens += sum(map(len, guesses))
        return {it: guessed for (it, _), guessed in zip(writers, guesses, strict=True)}

    def _one_by_one(self, batch: Sequence[Completion], parts: Sequence[ScheduledSequence]) -> None:
        """Run a failed step again, part by part: an error is that of one request, and the others go on."""
        for completion, part in zip(batch, parts, strict=True):
            if completion.cached != part.past or completion.reason:
                continue  # it had its token before the step failed
            try:
                self._take([completion], [part], self.forward.run([part]))
            except Exception as error:
                completion.error = f"{type(error).__name__}: {error}"
                self.finish(completion, "error")

    def _take(self, batch: Sequence[Completion], parts: Sequence[ScheduledSequence], logits_RV: Tensor) -> None:
        """Give each sequence whose last token went through its next one, more if it was guessed; and scores if asked."""
        row, turns = 0, []
        for completion, part in zip(batch, parts, strict=True):
            beyond = part.past + len(part.tokens) - completion.known  # tokens guessed, or negative: yet to be read
            if completion.score_prompt and not completion.tokens:
                self._score_prompt(completion, part, logits_RV[row : row + part.wanted])
            row += part.wanted
            if beyond >= 0 and completion.max_tokens:
                turns.append(Turn(completion, row - 1 - beyond, part.tokens[len(part.tokens) - beyond :]))
        picked = self._pick(turns, logits_RV)
        for completion, part in zip(batch, parts, strict=True):
            completion.cached = min(part.past + len(part.tokens), completion.known)
            if completion.cached == completion.known and not completion.max_tokens:
                self.finish(completion, "length")
        while turns:
            for turn, token in zip(turns, picked, strict=True):
                self.append_token(turn.completion, token)
            right = [turn for turn, token in zip(turns, picked, strict=True) if turn.guessed[:1] == [token]]
            turns = [Turn(it.completion, it.row + 1, it.guessed[1:]) for it in right if not it.completion.reason]
            for turn in turns:
                turn.completion.cached += 1
            self.right_tokens += len(right)
            picked = self._pick(turns, logits_RV)

    def _pick(self, turns: Sequence[Turn], logits_RV: Tensor) -> list[int]:
        """Choose the next token of each of these sequences, and score it if that is asked."""
        if not turns:
            return []
        writers = [turn.completion for turn in turns]
        if len(turns) < len(logits_RV):
            logits_RV = logits_RV[[turn.row for turn in turns]]
        picked = choose(
            logits_RV, [it.sampling for it in writers], [it.tokens for it in writers], [it.dice for it in writers],
            [it.mask for it in writers],
        )  # fmt: skip
        self._score(writers, picked, logits_RV)
        return picked

    def append_token(self, completion: Completion, token: int) -> None:
        """Append a token, and finish the sequence where it is the last."""
        completion.first_at = completion.first_at or time.monotonic()
        if token < 0:
            completion.error = "the model's output is not a finite number"
            self.forward.clear(completion.lane)
            completion.cached = 0
            self.finish(completion, "error")
        elif token in self.eos_ids:
            self.finish(completion, "stop")
        else:
            whole = completion.mask is not None and completion.mask.take(token)
            completion.tokens.append(token)
            if whole:
                self.finish(completion, "stop")
            elif len(completion.tokens) >= completion.max_tokens:
                self.finish(completion, "length")
            elif completion.stepwise:
                self._news.append(completion)

    def finish(self, completion: Completion, reason: str) -> None:
        """Free a lane; what it holds stays there for whoever begins with the same tokens."""
        self.running.remove(completion)
        held = np.asarray([*completion.prompt, *completion.tokens])[: completion.cached]
        self._held[completion.lane], self._used[completion.lane] = held, self.steps
        self._by[completion.lane] = completion.adapter
        with self._work:
            self._waiting.end(completion.client, completion.need - completion.known)
        completion.ended_at = time.monotonic()
        completion.reason = reason
        self._news.append(completion)

    def _score(self, writers: Sequence[Completion], picked: Sequence[int], logits_RV: Tensor) -> None:
        """Append the scores of picked tokens, before the tokens themselves: a reader takes as many of both, and the end's."""
        asking = [i for i, it in enumerate(writers) if it.logprobs is not None and picked[i] >= 0]
        if asking:
            most = max(writers[i].logprobs or 0 for i in asking)
            for i, score in zip(asking, scores(logits_RV[asking], [picked[i] for i in asking], most), strict=True):
                writers[i].scores.append(Score(score.token, score.logprob, score.top[: writers[i].logprobs]))

    def _score_prompt(self, completion: Completion, part: ScheduledSequence, logits_TV: Tensor) -> None:
        """Append the scores of the prompt's tokens that follow those of a chunk."""
        following = completion.prompt[part.past + 1 : part.past + 1 + len(part.tokens)]
        if following:
            completion.prompt_scores += scores(logits_TV[: len(following)], following, completion.logprobs or 0)


def scores(logits_RV: Tensor, tokens: Sequence[int], most: int) -> list[Score]:
    """Return the log-probability of a token in each row, and of the `most` likeliest."""
    logits_RV = logits_RV.float()
    log_p_RV = logits_RV.log_softmax(-1)
    own = log_p_RV.gather(1, torch.tensor(tokens, device=log_p_RV.device)[:, None])[:, 0].tolist()
    if not most:
        return [Score(token, logprob, []) for token, logprob in zip(tokens, own, strict=True)]
    best_RK, ids_RK = log_p_RV.topk(min(most, log_p_RV.shape[-1]))
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids_RK.tolist(), best_RK.tolist(), strict=True)]
    return [Score(token, logprob, top) for token, logprob, top in zip(tokens, own, tops, strict=True)]


def free_memory(model: nn.Module) -> int:
    """Return the bytes that are free where a model is."""
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
