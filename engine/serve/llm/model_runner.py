"""The forward of a step: tokens of many sequences, at whatever lengths, through the model at once.

`Packed` lays the new tokens of all sequences end to end in one row, so that every product of the model is done once
for all (Yu et al. 2022, Orca), and does attention itself: keys and values are written in place into lanes of a cache
that is made once, and those that decode read the lanes where they lie. On a processor a model of Llama's kind then runs as
one operation (`decoder`). `Apart` runs any other causal model, one sequence after the other. Shapes: T tokens of the step,
or of one sequence in it, N lanes, C tokens a lane, L tokens attended, H heads, G query heads to a key head, D width of a
head, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.errors import UserError
from engine.serve.llm.cpu import kernels
from engine.serve.llm.cpu.decoder import Decoder, make_decoder
from engine.serve.llm.lora import LoraAdapters

ATTENTION = "manta_lanes"
# What a model may tell its attention without changing what comes out; a window does so only past its length.
NEUTRAL = {"position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "output_hidden_states"}
SHORT = 16  # tokens of a sequence, at most, for which neighbours attend together: those that decode, and their guesses
FEW = 64  # tokens of a sequence, at most, that `kernels` has attend one by one; of more, torch's attention takes all at once
# Numbers of the keys, at most, that are attended to as fp32 where they are bf16: torch's attention takes two to four times
# as long for the same few queries in bf16, on a processor. More would take much memory, and gain little.
AS_FLOATS = 2**22
IN_KERNELS = (torch.float32, torch.bfloat16)
LOG = logging.getLogger(__name__)
PROBES = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8], [6])  # prompts by which a way to run the model is tried out


class UnsupportedModel(Exception):
    """The model's attention does more than lanes can give."""


class ScheduledSequence(NamedTuple):
    """One sequence's part of a forward."""

    lane: int
    past: int  # its tokens in the cache already
    tokens: Sequence[int]  # the next ones
    wanted: int  # of how many of these, from the end, the logits are wanted
    adapter: str = ""


class ModelRunner(Protocol):
    """A model with a cache of several lanes."""

    shares: bool  # whether a sequence may go on from what its lane, or another, holds

    @property
    def token_bytes(self) -> int:
        """Bytes of cache for one token; 0: not known."""

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Make the cache anew; `keep` are (lane, tokens) that become lanes 0, 1, ... of the new one."""

    def run(self, parts: Sequence[ScheduledSequence]) -> Tensor:
        """Return the wanted logits, [rows, V], in the parts' order; the tokens are in the cache then."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a lane another's first tokens."""

    def clear(self, lane: int) -> None:
        """Forget what a lane holds."""


class BatchedRunner:
    """All tokens of a step in one row, attention over lanes."""

    shares = True

    def __init__(self, model: nn.Module, adapters: LoraAdapters, compiled: bool = False) -> None:
        """Set the model's attention to this one; without a step it stays what it was. Raises Unpackable.

        `compiled` has torch compile what lies below the logits, for any number of tokens and for one, unless it runs as
        one operation anyway.
        """
        if not getattr(model, "_supports_attention_backend", False):
            raise UnsupportedModel(f"{type(model).__name__} has an attention of its own")
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
        self.model, self.adapters = model, adapters
        self.runs, self.in_kernels = model, False
        self.decoder: Decoder | None = None
        self.before: str = model.config._attn_implementation  # type: ignore[union-attr,assignment]
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.lanes, self.capacity = 0, 0
        self._keys: dict[int, Tensor] = {}  # layer -> [N, H, C, D]
        self._values: dict[int, Tensor] = {}
        self._no_mask = torch.zeros((1, 1, 1, 1), device=self.device)  # four dimensions: the model makes none itself
        self.shape(len(PROBES), max(map(len, PROBES)) + 1)
        try:
            self.check_parity()
            self.in_kernels = self.device.type == "cpu" and self.dtype in IN_KERNELS and kernels.load()
            if self.in_kernels:
                self.check_parity()
                self._take_decoder()
            if compiled and self.decoder is None:
                self.runs = compiled_twin(model)
                self.check_parity()
        except Exception as error:
            model.set_attn_implementation(self.before)  # type: ignore[operator]
            raise (
                error if isinstance(error, UnsupportedModel) else UnsupportedModel(f"{type(error).__name__}: {error}")
            ) from error

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values for one token."""
        both = (*self._keys.values(), *self._values.values())
        return sum(cache.shape[1] * cache.shape[3] * cache.element_size() for cache in both)

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Make the cache anew, a layer at a time."""
        for caches in (self._keys, self._values):
            for layer, old in caches.items():
                # Zeros: what lies beyond a sequence's end is masked, and must be a number for that.
                new = old.new_zeros((lanes, old.shape[1], capacity, old.shape[3]))
                for lane, (source, tokens) in enumerate(keep):
                    new[lane, :, :tokens] = old[source, :, :tokens]
                caches[layer] = new
        self.lanes, self.capacity = lanes, capacity

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values of all layers."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[target, :, :tokens] = cache[source, :, :tokens]

    def clear(self, lane: int) -> None:
        """Write zeros over a lane."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[lane] = 0

    def run(self, parts: Sequence[ScheduledSequence]) -> Tensor:
        """Run one forward for all parts: the short ones first, by length and lane, as they lie in the cache."""
        order = sorted(range(len(parts)), key=lambda i: (min(len(parts[i].tokens), SHORT + 1), parts[i].lane))
        ordered = [parts[i] for i in order]
        at, rows = 0, {}
        for i in order:
            at += len(parts[i].tokens)
            rows[i] = range(at - parts[i].wanted, at)
        wanted = [row for i in range(len(parts)) for row in rows[i]]
        if self.in_kernels:
            self._begin_in_kernels(ordered)
        if self.decoder is not None and not any(part.adapter for part in parts):
            return self.decoder.run([token for part in ordered for token in part.tokens], wanted)
        return self._run_modules(ordered, wanted, whole=wanted == list(range(at)))

    def _begin_in_kernels(self, parts: Sequence[ScheduledSequence]) -> None:
        """Tell `kernels` where the tokens of this thread's next forward belong."""
        table: list[int] = []
        row = 0
        for part in parts:
            table += (row, len(part.tokens), part.lane, part.past)
            row += len(part.tokens)
        layers = range(len(self._keys))
        torch.ops.manta.begin([self._keys[i] for i in layers], [self._values[i] for i in layers], table, FEW)

    def _run_modules(self, parts: Sequence[ScheduledSequence], wanted: list[int], whole: bool) -> Tensor:
        """Run the model itself, on its own modules or compiled."""
        step = _UNDER_WAY.step = Step(self, parts)
        try:
            with self.adapters.applied([part.adapter for part in parts for _ in part.tokens]):
                logits_1RV = self.runs(
                    input_ids=step.ids_1T,
                    position_ids=step.positions_1T,
                    attention_mask=self._no_mask,
                    use_cache=False,
                    logits_to_keep=0 if whole else torch.tensor(wanted, dtype=torch.int64, device=self.device),
                    lanes=True,
                ).logits
        finally:
            _UNDER_WAY.step = None
        return logits_1RV[0]

    def write(self, layer: int, step: Step, keys_HTD: Tensor, values_HTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values into the cache, and return the whole of it: [N, H, C, D] each."""
        heads = len(keys_HTD)
        if layer not in self._keys:
            size = (self.lanes, heads, self.capacity)
            self._keys[layer] = keys_HTD.new_zeros((*size, keys_HTD.shape[2]))
            self._values[layer] = values_HTD.new_zeros((*size, values_HTD.shape[2]))
        places = step.places(heads)
        for cache, new in ((self._keys[layer], keys_HTD), (self._values[layer], values_HTD)):
            cache.view(-1, new.shape[2]).index_copy_(0, places, new.reshape(-1, new.shape[2]))
        return self._keys[layer], self._values[layer]

    def _take_decoder(self) -> None:
        """Run the whole model as one operation, where that gives the same."""
        self.decoder = make_decoder(self.model)
        try:
            if self.decoder is not None:
                self.check_parity()
        except (UnsupportedModel, RuntimeError) as reason:
            LOG.warning("the model runs by its own modules, since as one operation %s", reason)
            self.decoder = None

    @torch.inference_mode()
    def check_parity(self) -> None:
        """Try the probes, in chunks and together, against the model's own forward. Raises Unpackable."""
        vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        prompts = [[token % vocabulary for token in probe] for probe in PROBES]
        self.run([ScheduledSequence(0, 0, prompts[0][:3], 0), ScheduledSequence(1, 0, prompts[1][:-1], 1)])
        logits_RV = self.run(
            [
                ScheduledSequence(0, 3, prompts[0][3:], 1),
                ScheduledSequence(1, 3, prompts[1][-1:], 1),
                ScheduledSequence(2, 0, prompts[2], 1),
            ]
        ).float()
        self.run([ScheduledSequence(2, 0, prompts[2], 1)])  # one token alone is a shape of its own for the compiler
        for row_V, prompt in zip(logits_RV, prompts, strict=True):
            ids_1L = torch.tensor([prompt], device=self.device)
            own_V = self.model(input_ids=ids_1L, use_cache=False).logits[0, -1].float()
            off, scale = float((row_V - own_V).abs().max()), float(own_V.abs().max())
            if not off <= (1e-3 if self.dtype == torch.float32 else 0.1) * max(scale, 1.0):
                raise UnsupportedModel(f"its logits are off by {off:.2g}")


class Run(NamedTuple):
    """Neighbouring lanes with equally many new tokens, a few, which attend together."""

    rows: slice  # of the step's tokens
    lanes: slice
    new: int  # tokens of each
    length: int  # tokens attended, at most
    mask_N1TL: Tensor | None  # what comes later, or is beyond a sequence's end


class Chunk(NamedTuple):
    """A part of a prompt, which attends by itself."""

    rows: slice
    lane: int
    length: int
    mask_TL: Tensor | None  # None: causal from its first token on


class Step:
    """Where the tokens of one forward belong, worked out once for all layers."""

    def __init__(self, cache: BatchedRunner, parts: Sequence[ScheduledSequence]) -> None:
        """Take the parts, the short ones first, these by length and lane."""
        self.cache, self.capacity = cache, cache.capacity
        ids: list[int] = []
        positions: list[int] = []
        lanes: list[int] = []
        for part in parts:
            ids += part.tokens
            positions += range(part.past, part.past + len(part.tokens))
            lanes += [part.lane] * len(part.tokens)
        table_3T = torch.tensor([ids, positions, lanes]).to(cache.device)
        self.ids_1T, self.positions_1T, self.lanes_T = table_3T[:1], table_3T[1:2], table_3T[2]
        self._places: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.parts = parts
        self.longest = max(part.past + len(part.tokens) for part in parts)

    @cached_property
    def pieces(self) -> list[Run | Chunk]:
        """What attends together."""
        pieces: list[Run | Chunk] = []
        start = 0
        for (count, short), group in itertools.groupby(
            self.parts, lambda part: (len(part.tokens), len(part.tokens) <= SHORT)
        ):
            alike = list(group)
            bounds = neighbours([part.lane for part in alike]) if short else [(i, i + 1) for i in range(len(alike))]
            for first, end in bounds:
                at = start + first * count
                together = count == 1 or end > first + 1
                pieces.append(self._run(alike[first:end], at) if together else self._chunk(alike[first], at))
            start += len(alike) * count
        return pieces

    def _run(self, parts: Sequence[ScheduledSequence], start: int) -> Run:
        count, pasts = len(parts[0].tokens), [part.past for part in parts]
        longest, mask_N1TL = max(pasts) + count, None
        if count > 1 or min(pasts) < max(pasts):
            device = self.cache.device
            last_NT = torch.tensor(pasts, device=device)[:, None] + torch.arange(count, device=device)
            beyond_NTL = torch.arange(longest, device=device) > last_NT[:, :, None]
            mask_NTL = torch.zeros(beyond_NTL.shape, dtype=self.cache.dtype, device=device)
            mask_N1TL = mask_NTL.masked_fill_(beyond_NTL, -torch.inf)[:, None]
        rows = slice(start, start + len(parts) * count)
        return Run(rows, slice(parts[0].lane, parts[-1].lane + 1), count, longest, mask_N1TL)

    def _chunk(self, part: ScheduledSequence, start: int) -> Chunk:
        count, mask_TL = len(part.tokens), None
        length = part.past + count
        if part.past:
            mask_TL = torch.full((count, length), -torch.inf, dtype=self.cache.dtype, device=self.cache.device)
            mask_TL.triu_(part.past + 1)
        return Chunk(slice(start, start + count), part.lane, length, mask_TL)

    def places(self, heads: int) -> Tensor:
        """Return the row of a cache seen as [N H C, D] where each head's key of each token belongs: [H T]."""
        if heads not in self._places:
            of_head_H1 = torch.arange(heads, device=self.cache.device)[:, None]
            places_HT = (self.lanes_T * heads + of_head_H1) * self.capacity + self.positions_1T[0]
            self._places[heads] = places_HT.flatten()
        return self._places[heads]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None
    ) -> Tensor:
        """Write the keys and values [1, H, T, D], and attend to each sequence's own. Returns [1, T, heads, D].

        Raises Unpackable where a sequence is longer than the layer's window.
        """
        if window and self.longest > window:
            raise UnsupportedModel(f"{self.longest} tokens are over its window of {window}")
        keys, values = self.cache.write(layer, self, key[0], value[0])
        query_THD = query[0].transpose(0, 1)
        outputs = [
            self._together(piece, query_THD[piece.rows], keys, values, scaling)
            if isinstance(piece, Run)
            else self._alone(piece, query[:, :, piece.rows], keys, values, scaling)
            for piece in self.pieces
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _together(self, run: Run, query_RHD: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Attend for R = N T tokens; the query heads of a key head are laid out as if they were tokens."""
        _, heads, width = query_RHD.shape
        key_heads, count = keys.shape[1], run.new
        group = heads // key_heads
        if count == 1:
            query = query_RHD.reshape(-1, key_heads, group, width)
        else:
            query = query_RHD.view(-1, count, key_heads, group, width).permute(0, 2, 3, 1, 4)
            query = query.reshape(len(query), key_heads, group * count, width)
        own_keys, own_values = keys[run.lanes, :, : run.length], values[run.lanes, :, : run.length]
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and own_keys.numel() <= AS_FLOATS:
            query, own_keys, own_values = query.float(), own_keys.float(), own_values.float()
        mask = self._mask(run, group if count > 1 else 1, query.dtype)
        attended = F.scaled_dot_product_attention(query, own_keys, own_values, attn_mask=mask, scale=scaling)
        attended = attended.to(query_RHD.dtype)
        if count > 1:
            attended = attended.view(len(query), key_heads, group, count, -1).permute(0, 3, 1, 2, 4)
        return attended.reshape(len(query_RHD), heads, -1)

    def _mask(self, run: Run, group: int, dtype: torch.dtype) -> Tensor | None:
        if run.mask_N1TL is None:
            return None
        key = (run.rows.start, group, dtype)
        if key not in self._masks:
            self._masks[key] = run.mask_N1TL.to(dtype).repeat(1, 1, group, 1)
        return self._masks[key]

    def _alone(self, chunk: Chunk, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        lane, group = slice(chunk.lane, chunk.lane + 1), query.shape[1] // keys.shape[1]
        attended = F.scaled_dot_product_attention(
            query,
            _repeat(keys[lane, :, : chunk.length], group),
            _repeat(values[lane, :, : chunk.length], group),
            attn_mask=chunk.mask_TL,
            is_causal=chunk.mask_TL is None,
            scale=scaling,
        )
        return attended[0].transpose(0, 1)


def neighbours(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) of the stretches of a rising sequence whose numbers follow each other."""
    bounds = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    return list(zip(bounds, [*bounds[1:], len(numbers)], strict=False))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lanes: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks it of an attention function; without `lanes`, as its own `sdpa`."""
    if not lanes:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    unknown = [name for name, value in others.items() if value is not None and name not in NEUTRAL]
    if unknown:
        raise UnsupportedModel(f"its attention takes {', '.join(unknown)}")
    in_one = torch.compiler.is_compiling() or under_way().cache.in_kernels
    attend = torch.ops.manta.attend if in_one else attend_in_step
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend(query, key, value, layer, scaling, others.get("sliding_window")), None


def attend_in_step(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attend as the step asks it that is under way in this thread."""
    return under_way().attend(query, key, value, layer, scaling, window)


def under_way() -> Step:
    """Return this thread's step."""
    assert _UNDER_WAY.step is not None
    return _UNDER_WAY.step


class _UnderWay(threading.local):
    step: Step | None = None


_UNDER_WAY = _UnderWay()
# One operation that the compiler doesn't look into: which lanes attend together is another matter at each step. On a
# processor `kernels` takes its place.
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("attend(Tensor query, Tensor key, Tensor value, int layer, float? scaling, int? window) -> Tensor")
_OPERATIONS.impl("attend", attend_in_step, "CompositeExplicitAutograd")


@torch.library.register_fake("manta::attend", lib=_OPERATIONS)
def _shape_of_attended(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None) -> Tensor:  # fmt: skip
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def compiled_twin(model: nn.Module) -> nn.Module:
    """Return a model of the same weights whose base is compiled; the given one stays as it is."""
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    twin, base = copy.copy(model), copy.copy(model.get_submodule(prefix))
    twin._modules = {**model._modules, prefix: base}
    base.compile(dynamic=True)
    return twin


def _repeat(heads_1HLD: Tensor, group: int) -> Tensor:
    """Repeat each key head for its group of query heads."""
    return heads_1HLD if group == 1 else heads_1HLD.repeat_interleave(group, dim=1)


class SequentialRunner:
    """Any causal model of transformers, one sequence after the other, each with a cache of transformers' own."""

    shares = False
    token_bytes = 0

    def __init__(self, model: nn.Module, adapters: LoraAdapters) -> None:
        self.model, self.adapters = model, adapters
        self.device = next(model.parameters()).device
        self._caches: dict[int, DynamicCache] = {}

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Keep some lanes under their new numbers."""
        self._caches = {new: self._caches[old] for new, (old, _) in enumerate(keep) if old in self._caches}

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let a lane go on from another's first tokens: none, since lanes share nothing."""
        assert tokens == 0, f"lane {target} asks lane {source} for {tokens} tokens, and each has a cache of its own"

    def clear(self, lane: int) -> None:
        """Drop a lane's cache."""
        self._caches.pop(lane, None)

    def run(self, parts: Sequence[ScheduledSequence]) -> Tensor:
        """Run a forward for each part."""
        rows = []
        for lane, past, tokens, wanted, adapter in parts:
            if past == 0:
                self._caches[lane] = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
            elif (over := self._caches[lane].get_seq_length() - past) > 0:  # a step that failed is run again
                self._caches[lane].crop(-over)
            with self.adapters.applied([adapter] * len(tokens)):
                output = self.model(
                    input_ids=torch.tensor([tokens], device=self.device),
                    attention_mask=torch.ones((1, past + len(tokens)), dtype=torch.int64, device=self.device),
                    past_key_values=self._caches[lane],
                    use_cache=True,
                )
            rows.append(output.logits[0, len(tokens) - wanted :])
        return torch.cat(rows)


def positions(config: Any) -> int | None:
    """Return how many tokens a sequence may have; a sliding window's length, where only newer keys would be kept."""
    most: int | None = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(most, window) if most and window else most


def make_forward(model: nn.Module, adapters: LoraAdapters | None = None, compiled: bool = False) -> ModelRunner:
    """Return the quickest way to run a model that gives what the model itself gives.

    Raises UserError where it is to be compiled and can't.
    """
    adapters = adapters or LoraAdapters(model)
    try:
        return BatchedRunner(model, adapters, compiled)
    except UnsupportedModel as reason:
        if compiled:
            raise UserError(
                f"serve.compile: this model can't be compiled ({reason}): leave serve.compile out"
            ) from reason
        return SequentialRunner(model, adapters)
