"""Iteration-level batching (Yu et al. 2022, Orca): completions join and leave a running batch between decode steps.

Each sequence is prefilled alone and then decoded with the others in one left-padded key/value cache, with positions and
masks of its own; so greedy output is that of `model.generate`, whatever shares the batch. Shapes: B batch, L length.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


class QueueFull(Exception):
    """As many completions wait as may."""


@dataclass(eq=False)
class Completion:
    """One sequence under way. `tell(text, reason)` hears each new text, and at the end why it ended (else None)."""

    prompt: list[int]
    max_tokens: int
    tell: Callable[[str, str | None], None]
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    cancelled: bool = False  # set by a client that hung up; its place is free at the next step
    tokens: list[int] = field(default_factory=list)  # generated so far
    told: int = 0  # characters told so far
    sampler: torch.Generator | None = None

    def say(self, text: str, reason: str | None) -> None:
        """Tell the client; one that cannot hear any more has hung up."""
        try:
            self.tell(text, reason)
        except Exception:
            self.cancelled = True

    def choose(self, logits_V: Tensor) -> int:
        """Pick the next token: the likeliest, or a draw from the nucleus (Holtzman et al. 2020)."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        if self.sampler is None:
            self.sampler = torch.Generator().manual_seed(torch.seed() if self.seed is None else self.seed)
        logits_V = logits_V.float().cpu()
        # The largest is taken off first, so that no temperature, however small, overflows.
        probabilities_V, ids_V = ((logits_V - logits_V.max()) / self.temperature).softmax(0).sort(descending=True)
        outside_V = probabilities_V.cumsum(0) - probabilities_V >= self.top_p
        pick = torch.multinomial(probabilities_V.masked_fill(outside_V, 0.0), 1, generator=self.sampler)
        return int(ids_V[pick])


class Generator:
    """Owns a model and the thread that runs it."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_batch: int, max_queue: int) -> None:
        """Decode up to `max_batch` sequences together; up to `max_queue` more wait."""
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.device = next(model.parameters()).device
        eos = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id  # type: ignore[union-attr]
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        self.waiting: queue.Queue[Completion] = queue.Queue(max_queue)
        self.running: list[Completion] = []
        self._cache: list[tuple[Tensor, Tensor]] = []  # a (key, value) [B, heads, L, width] a layer
        self._mask_BL = torch.zeros((0, 0), dtype=torch.int64, device=self.device)
        self._last_B: list[int] = []  # each sequence's newest token, not in the cache yet
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def submit(self, completion: Completion) -> None:
        """Queue a completion. Raises QueueFull."""
        try:
            self.waiting.put_nowait(completion)
        except queue.Full as error:
            raise QueueFull from error

    @property
    def alive(self) -> bool:
        """Whether the thread still runs; it ends only by an error that is nobody's request's."""
        return self._thread.is_alive()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            while len(self.running) < self.max_batch and (not self.running or not self.waiting.empty()):
                new = self.waiting.get()
                try:
                    self._join(new)
                except Exception as error:  # of this one request; the others go on
                    new.say(f"{type(error).__name__}: {error}", "error")
            try:
                self._step()
            except Exception as error:  # told to every client of the batch; the thread lives on for the next
                for completion in self.running:
                    completion.say(f"{type(error).__name__}: {error}", "error")
                self._keep([])

    def _join(self, new: Completion) -> None:
        """Prefill a newcomer and lay its cache beside the others'; nothing of theirs changes before all of it has worked."""
        if new.cancelled:
            return
        ids_BL = torch.tensor([new.prompt], device=self.device)
        output = self.model(input_ids=ids_BL, use_cache=True, logits_to_keep=1)
        token = new.choose(output.logits[0, -1])
        if self._took(new, token):
            return
        cache = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        mask_BL = torch.ones_like(ids_BL)
        if self.running:
            length = max(self._mask_BL.shape[1], ids_BL.shape[1])
            cache = [
                (_beside(keys, new_keys, length, 2), _beside(values, new_values, length, 2))
                for (keys, values), (new_keys, new_values) in zip(self._cache, cache, strict=True)
            ]
            mask_BL = _beside(self._mask_BL, mask_BL, length, 1)
        self._cache, self._mask_BL = cache, mask_BL
        self.running.append(new)
        self._last_B.append(token)

    def _step(self) -> None:
        """Decode one token of every running sequence; let those that end go."""
        self._keep([i for i, completion in enumerate(self.running) if not completion.cancelled])
        if not self.running:
            return
        positions_B1 = self._mask_BL.sum(1, keepdim=True)
        self._mask_BL = F.pad(self._mask_BL, (0, 1), value=1)
        output = self.model(
            input_ids=torch.tensor(self._last_B, device=self.device)[:, None],
            attention_mask=self._mask_BL,
            position_ids=positions_B1,
            past_key_values=DynamicCache(self._cache),
            use_cache=True,
        )
        self._cache = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        self._last_B = [c.choose(logits_V) for c, logits_V in zip(self.running, output.logits[:, -1], strict=True)]
        ended = [self._took(completion, token) for completion, token in zip(self.running, self._last_B, strict=True)]
        if any(ended):
            self._keep([i for i, over in enumerate(ended) if not over])

    def _took(self, completion: Completion, token: int) -> bool:
        """Take a token into a completion, tell its client the new text, and say whether that was its end."""
        if token in self.eos_ids:
            self._tell(completion, "stop")
            return True
        completion.tokens.append(token)
        over = len(completion.tokens) >= completion.max_tokens
        return self._tell(completion, "length" if over else None)

    def _tell(self, completion: Completion, reason: str | None) -> bool:
        text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        found = min((at for word in completion.stop if (at := text.find(word)) >= 0), default=-1)
        if found >= 0:
            text, reason = text[:found], "stop"
        # Hold back what may yet become a stop text, or is half a character.
        held = 0 if reason else max((len(word) - 1 for word in completion.stop), default=0)
        safe = len(text) - held if reason or not text.endswith("\ufffd") else completion.told
        if safe > completion.told or reason:
            completion.say(text[completion.told : max(safe, completion.told)], reason)
            completion.told = max(safe, completion.told)
        return reason is not None

    def _keep(self, rows: list[int]) -> None:
        """Drop all rows but these, and the columns that were padding in all that stay."""
        if len(rows) == len(self.running):
            return
        self.running = [self.running[i] for i in rows]
        self._last_B = [self._last_B[i] for i in rows]
        if not rows:
            self._cache, self._mask_BL = [], self._mask_BL[:0, :0]
            return
        mask_BL = self._mask_BL[rows]
        first = int(mask_BL.any(0).int().argmax())
        self._mask_BL = mask_BL[:, first:]
        self._cache = [(keys[rows, :, first:], values[rows, :, first:]) for keys, values in self._cache]


def _beside(running: Tensor, new: Tensor, length: int, dim: int) -> Tensor:
    """Lay a newcomer's row under the running ones, all padded to `length`."""
    return torch.cat([_pad_left(running, length, dim), _pad_left(new, length, dim)])


def _pad_left(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Pad a dimension with zeros on the left, up to `length`."""
    missing = length - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
