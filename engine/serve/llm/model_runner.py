"""Runs the forward of a step: tokens of many sequences, prefill and decode together.

`BatchedRunner` concatenates the new tokens of all sequences into one row, so that each linear layer runs once for all of
them (Yu et al. 2022, Orca), and computes attention itself: keys and values are written in place into the slots of a KV
cache that is allocated once, and sequences that decode attend to them where they are. On a CPU, a model of Llama's kind
then runs as one operation (`cpu.decoder`). `SequentialRunner` runs any other causal model, one sequence after another.
Shapes: T tokens of the step, or of one sequence in it, N slots, C capacity of a slot, L tokens attended to, H key heads,
G query heads to a key head, D width of a head, R rows of queries, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
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
from engine.serve.llm.scheduler import ScheduledSequence

ATTENTION = "manta_slots"  # its name in transformers' registry
# Arguments that a model may pass to its attention without changing the result; a window does only beyond its length.
IGNORED_ARGUMENTS = {
    "position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "output_hidden_states",
}  # fmt: skip
MAX_GROUPED_TOKENS = 16  # of a sequence, for which neighboring slots attend in one call: decode, and draft tokens
MAX_KERNEL_TOKENS = 64  # of a sequence, that `kernels` attends for one by one; for more, it calls torch's attention
# Largest number of elements of the keys for which bf16 attention is computed in fp32: on a CPU, torch's attention takes
# two to four times as long for the same few queries in bf16. More would take much memory, and gain little.
MAX_FP32_ELEMENTS = 2**22
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
LOG = logging.getLogger(__name__)
PROBES = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8], [6])  # prompts for the parity check


class UnsupportedModel(Exception):
    """The model's attention does something that attention over slots doesn't support."""


class ModelRunner(Protocol):
    """A model with a KV cache in slots; a `kv_cache.CacheStorage`."""

    has_slot_cache: bool  # whether a prefix can be copied to another slot, and the last tokens can be rolled back

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the KV cache for one token; 0: not known."""

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Reallocate the cache; `keep` are (slot, tokens) that become slots 0, 1, ... of the new one."""

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Give a slot to a new sequence, whose first tokens are those of slot `source`: copy them unless it is the same."""

    def run(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Run a forward and fill the KV cache; return the logits that are asked for, [rows, V], in the batch's order."""

    def clear_slot(self, slot: int) -> None:
        """Delete what a slot holds."""


class BatchedRunner:
    """All tokens of a step in one row, and attention over slots."""

    has_slot_cache = True

    def __init__(self, model: nn.Module, adapters: LoraAdapters, compiled: bool = False) -> None:
        """Replace the model's attention by one over slots; outside of a step it stays what it was.

        `compiled`: torch compiles what is below the logits, for any number of tokens and for one, unless the model runs
        as one operation. Raises UnsupportedModel.
        """
        if not getattr(model, "_supports_attention_backend", False):
            raise UnsupportedModel(f"{type(model).__name__} has an attention of its own")
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
        self.model, self.adapters = model, adapters
        self.module, self.uses_kernels = model, False
        self.decoder: Decoder | None = None
        original_attention: str = model.config._attn_implementation  # type: ignore[union-attr,assignment]
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.num_slots, self.capacity = 0, 0
        self._keys: dict[int, Tensor] = {}  # layer -> [N, H, C, D]
        self._values: dict[int, Tensor] = {}
        self._no_mask = torch.zeros((1, 1, 1, 1), device=self.device)  # four dimensions: the model makes none itself
        self.reshape(len(PROBES), max(map(len, PROBES)) + 1)
        try:
            self.check_parity()
            self.uses_kernels = self.device.type == "cpu" and self.dtype in KERNEL_DTYPES and kernels.load()
            if self.uses_kernels:
                self.check_parity()
                self._use_decoder()
            if compiled and self.decoder is None:
                self.module = compiled_copy(model)
                self.check_parity()
        except Exception as error:
            model.set_attn_implementation(original_attention)  # type: ignore[operator]
            raise (
                error if isinstance(error, UnsupportedModel) else UnsupportedModel(f"{type(error).__name__}: {error}")
            ) from error

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values for one token."""
        return sum(cache.shape[1] * cache.shape[3] * cache.element_size() for cache in self._caches())

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Reallocate the cache, a layer at a time."""
        kept = list(keep)
        for caches in (self._keys, self._values):
            for layer, old in caches.items():
                # Zeros: what is beyond a sequence's end is masked, and must be finite for that.
                new = old.new_zeros((num_slots, old.shape[1], capacity, old.shape[3]))
                for slot, (source, num_tokens) in enumerate(kept):
                    new[slot, :, :num_tokens] = old[source, :, :num_tokens]
                caches[layer] = new
        self.num_slots, self.capacity = num_slots, capacity

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Copy keys and values of all layers from slot `source`."""
        if slot == source or not num_tokens:
            return
        for cache in self._caches():
            cache[slot, :, :num_tokens] = cache[source, :, :num_tokens]

    def clear_slot(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for cache in self._caches():
            cache[slot] = 0

    def run(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Run one forward for all: sequences with few tokens first, by their number and slot, as they are in the cache."""
        order = sorted(
            range(len(batch)), key=lambda i: (min(len(batch[i].tokens), MAX_GROUPED_TOKENS + 1), batch[i].slot)
        )
        ordered = [batch[i] for i in order]
        end, rows_of = 0, {}
        for i in order:
            end += len(batch[i].tokens)
            rows_of[i] = range(end - batch[i].num_logits, end)
        rows = [row for i in range(len(batch)) for row in rows_of[i]]
        if self.uses_kernels:
            self._begin_in_kernels(ordered)
        if self.decoder is not None and not any(inputs.adapter for inputs in batch):
            return self.decoder.run([token for inputs in ordered for token in inputs.tokens], rows)
        return self._run_modules(ordered, rows, all_rows=rows == list(range(end)))

    def _caches(self) -> tuple[Tensor, ...]:
        return (*self._keys.values(), *self._values.values())

    def _begin_in_kernels(self, batch: Sequence[ScheduledSequence]) -> None:
        """Pass `kernels` the cache, and where the tokens of this thread's next forward belong in it."""
        table: list[int] = []
        row = 0
        for inputs in batch:
            table += (row, len(inputs.tokens), inputs.slot, inputs.num_computed_tokens)
            row += len(inputs.tokens)
        layers = range(len(self._keys))
        keys, values = [self._keys[i] for i in layers], [self._values[i] for i in layers]
        torch.ops.manta.begin(keys, values, table, MAX_KERNEL_TOKENS)

    def _run_modules(self, batch: Sequence[ScheduledSequence], rows: list[int], all_rows: bool) -> Tensor:
        """Run the model's own modules, compiled or not."""
        context = _CURRENT.context = ForwardContext(self, batch)
        try:
            with self.adapters.active([inputs.adapter for inputs in batch for _ in inputs.tokens]):
                logits_1RV = self.module(
                    input_ids=context.ids_1T,
                    position_ids=context.positions_1T,
                    attention_mask=self._no_mask,
                    use_cache=False,
                    logits_to_keep=0 if all_rows else torch.tensor(rows, dtype=torch.int64, device=self.device),
                    over_slots=True,
                ).logits
        finally:
            _CURRENT.context = None
        return logits_1RV[0]

    def write(self, layer: int, context: ForwardContext, keys_HTD: Tensor, values_HTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values into the cache, and return the whole of it: [N, H, C, D] each."""
        heads = len(keys_HTD)
        if layer not in self._keys:
            size = (self.num_slots, heads, self.capacity)
            self._keys[layer] = keys_HTD.new_zeros((*size, keys_HTD.shape[2]))
            self._values[layer] = values_HTD.new_zeros((*size, values_HTD.shape[2]))
        rows = context.cache_rows(heads)
        for cache, new in ((self._keys[layer], keys_HTD), (self._values[layer], values_HTD)):
            cache.view(-1, new.shape[2]).index_copy_(0, rows, new.reshape(-1, new.shape[2]))
        return self._keys[layer], self._values[layer]

    def _use_decoder(self) -> None:
        """Run the whole model as one operation, where that passes the parity check."""
        self.decoder = make_decoder(self.model)
        try:
            if self.decoder is not None:
                self.check_parity()
        except (UnsupportedModel, RuntimeError) as error:
            LOG.warning("the model runs by its own modules: as one operation, %s", error)
            self.decoder = None

    @torch.inference_mode()
    def check_parity(self) -> None:
        """Compare the logits of probes, in chunks and batched, with the model's own forward. Raises UnsupportedModel."""
        vocab_size: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        prompts = [[token % vocab_size for token in probe] for probe in PROBES]
        self.run([ScheduledSequence(0, 0, prompts[0][:3], 0), ScheduledSequence(1, 0, prompts[1][:-1], 1)])
        logits_RV = self.run(
            [
                ScheduledSequence(0, 3, prompts[0][3:], 1),
                ScheduledSequence(1, 3, prompts[1][-1:], 1),
                ScheduledSequence(2, 0, prompts[2], 1),
            ]
        ).float()
        self.run([ScheduledSequence(2, 0, prompts[2], 1)])  # one token alone is a shape of its own for the compiler
        for logits_V, prompt in zip(logits_RV, prompts, strict=True):
            ids_1L = torch.tensor([prompt], device=self.device)
            expected_V = self.model(input_ids=ids_1L, use_cache=False).logits[0, -1].float()
            error, scale = float((logits_V - expected_V).abs().max()), float(expected_V.abs().max())
            if not error <= (1e-3 if self.dtype == torch.float32 else 0.1) * max(scale, 1.0):
                raise UnsupportedModel(f"its logits are off by {error:.2g}")


class SlotGroup(NamedTuple):
    """Neighboring slots with equally many new tokens, a few each, which attend in one call."""

    rows: slice  # of the step's tokens
    slots: slice
    num_new_tokens: int  # of each slot
    length: int  # tokens attended to, at most
    mask_N1TL: Tensor | None  # of later tokens, and those beyond a sequence's end


class PrefillChunk(NamedTuple):
    """A part of one prompt, which attends by itself."""

    rows: slice  # of the step's tokens
    slot: int
    length: int  # tokens attended to
    mask_TL: Tensor | None  # None: causal from its first token on


class ForwardContext:
    """Where the tokens of one forward belong in the cache, and what they attend to: computed once for all layers."""

    def __init__(self, runner: BatchedRunner, batch: Sequence[ScheduledSequence]) -> None:
        """Take the batch in the order of `BatchedRunner.run`."""
        self.runner, self.capacity = runner, runner.capacity
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for inputs in batch:
            start = inputs.num_computed_tokens
            ids += inputs.tokens
            positions += range(start, start + len(inputs.tokens))
            slots += [inputs.slot] * len(inputs.tokens)
        table_3T = torch.tensor([ids, positions, slots]).to(runner.device)
        self.ids_1T, self.positions_1T, self.slots_T = table_3T[:1], table_3T[1:2], table_3T[2]
        self._cache_rows: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.batch = batch
        self.max_len = max(inputs.num_computed_tokens + len(inputs.tokens) for inputs in batch)

    @cached_property
    def groups(self) -> list[SlotGroup | PrefillChunk]:
        """What attends in one call each, in the order of the tokens."""
        groups: list[SlotGroup | PrefillChunk] = []
        start = 0
        for (count, is_short), batch in itertools.groupby(
            self.batch, lambda inputs: (len(inputs.tokens), len(inputs.tokens) <= MAX_GROUPED_TOKENS)
        ):
            equal = list(batch)
            ranges = (
                contiguous_ranges([inputs.slot for inputs in equal])
                if is_short
                else [(i, i + 1) for i in range(len(equal))]
            )
            for first, end in ranges:
                row = start + first * count
                is_group = count == 1 or end > first + 1
                groups.append(self._slot_group(equal[first:end], row) if is_group else self._chunk(equal[first], row))
            start += len(equal) * count
        return groups

    def _slot_group(self, batch: Sequence[ScheduledSequence], start: int) -> SlotGroup:
        count, computed = len(batch[0].tokens), [inputs.num_computed_tokens for inputs in batch]
        length, mask_N1TL = max(computed) + count, None
        if count > 1 or min(computed) < max(computed):
            device = self.runner.device
            last_NT = torch.tensor(computed, device=device)[:, None] + torch.arange(count, device=device)
            beyond_NTL = torch.arange(length, device=device) > last_NT[:, :, None]
            mask_NTL = torch.zeros(beyond_NTL.shape, dtype=self.runner.dtype, device=device)
            mask_N1TL = mask_NTL.masked_fill_(beyond_NTL, -torch.inf)[:, None]
        rows = slice(start, start + len(batch) * count)
        return SlotGroup(rows, slice(batch[0].slot, batch[-1].slot + 1), count, length, mask_N1TL)

    def _chunk(self, inputs: ScheduledSequence, start: int) -> PrefillChunk:
        count, mask_TL = len(inputs.tokens), None
        length = inputs.num_computed_tokens + count
        if inputs.num_computed_tokens:
            mask_TL = torch.full((count, length), -torch.inf, dtype=self.runner.dtype, device=self.runner.device)
            mask_TL.triu_(inputs.num_computed_tokens + 1)
        return PrefillChunk(slice(start, start + count), inputs.slot, length, mask_TL)

    def cache_rows(self, heads: int) -> Tensor:
        """Return the row of a cache seen as [N H C, D] where each head's key of each token belongs: [H T]."""
        if heads not in self._cache_rows:
            head_H1 = torch.arange(heads, device=self.runner.device)[:, None]
            rows_HT = (self.slots_T * heads + head_H1) * self.capacity + self.positions_1T[0]
            self._cache_rows[heads] = rows_HT.flatten()
        return self._cache_rows[heads]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None
    ) -> Tensor:
        """Write the keys and values [1, H, T, D], and attend to each sequence's own. Returns [1, T, heads, D].

        Raises UnsupportedModel where a sequence is longer than the layer's window.
        """
        if window and self.max_len > window:
            raise UnsupportedModel(f"{self.max_len} tokens are over its window of {window}")
        keys, values = self.runner.write(layer, self, key[0], value[0])
        query_THD = query[0].transpose(0, 1)
        outputs = [
            self._attend_group(group, query_THD[group.rows], keys, values, scaling)
            if isinstance(group, SlotGroup)
            else self._attend_chunk(group, query[:, :, group.rows], keys, values, scaling)
            for group in self.groups
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _attend_group(
        self, slots: SlotGroup, query_RHD: Tensor, keys: Tensor, values: Tensor, scaling: float | None
    ) -> Tensor:
        """Attend for R = N T tokens; the query heads of a key head are laid out as if they were tokens."""
        _, heads, width = query_RHD.shape
        key_heads, count = keys.shape[1], slots.num_new_tokens
        group = heads // key_heads
        if count == 1:
            query = query_RHD.reshape(-1, key_heads, group, width)
        else:
            query = query_RHD.view(-1, count, key_heads, group, width).permute(0, 2, 3, 1, 4)
            query = query.reshape(len(query), key_heads, group * count, width)
        keys, values = keys[slots.slots, :, : slots.length], values[slots.slots, :, : slots.length]
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and keys.numel() <= MAX_FP32_ELEMENTS:
            query, keys, values = query.float(), keys.float(), values.float()
        mask = self._mask(slots, group if count > 1 else 1, query.dtype)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        attended = attended.to(query_RHD.dtype)
        if count > 1:
            attended = attended.view(len(query), key_heads, group, count, -1).permute(0, 3, 1, 2, 4)
        return attended.reshape(len(query_RHD), heads, -1)

    def _mask(self, slots: SlotGroup, group: int, dtype: torch.dtype) -> Tensor | None:
        if slots.mask_N1TL is None:
            return None
        key = (slots.rows.start, group, dtype)
        if key not in self._masks:
            self._masks[key] = slots.mask_N1TL.to(dtype).repeat(1, 1, group, 1)
        return self._masks[key]

    def _attend_chunk(
        self, chunk: PrefillChunk, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None
    ) -> Tensor:
        slot, group = slice(chunk.slot, chunk.slot + 1), query.shape[1] // keys.shape[1]
        attended = F.scaled_dot_product_attention(
            query,
            _repeat_heads(keys[slot, :, : chunk.length], group),
            _repeat_heads(values[slot, :, : chunk.length], group),
            attn_mask=chunk.mask_TL,
            is_causal=chunk.mask_TL is None,
            scale=scaling,
        )
        return attended[0].transpose(0, 1)


def contiguous_ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) of the ranges of a rising sequence whose numbers follow each other without a gap."""
    bounds = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    return list(zip(bounds, [*bounds[1:], len(numbers)], strict=False))


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    over_slots: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, with the signature of transformers' attention functions; unless `over_slots`, as its own `sdpa`."""
    if not over_slots:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    unknown = [name for name, value in others.items() if value is not None and name not in IGNORED_ARGUMENTS]
    if unknown:
        raise UnsupportedModel(f"its attention takes {', '.join(unknown)}")
    is_operation = torch.compiler.is_compiling() or forward_context().runner.uses_kernels
    attend = torch.ops.manta.attend if is_operation else attend_in_context
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend(query, key, value, layer, scaling, others.get("sliding_window")), None


def attend_in_context(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attend by the context of the forward that runs in this thread."""
    return forward_context().attend(query, key, value, layer, scaling, window)


def forward_context() -> ForwardContext:
    """Return the context of the forward that runs in this thread."""
    assert _CURRENT.context is not None
    return _CURRENT.context


class _Current(threading.local):
    context: ForwardContext | None = None


_CURRENT = _Current()
# One operation that the compiler doesn't look into: which slots attend together changes from step to step. On a CPU,
# `kernels` replaces it.
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("attend(Tensor query, Tensor key, Tensor value, int layer, float? scaling, int? window) -> Tensor")
_OPERATIONS.impl("attend", attend_in_context, "CompositeExplicitAutograd")


@torch.library.register_fake("manta::attend", lib=_OPERATIONS)
def _attend_shape(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None) -> Tensor:  # fmt: skip
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def compiled_copy(model: nn.Module) -> nn.Module:
    """Return a model with the same weights whose base is compiled; the given one stays as it is."""
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    compiled, base = copy.copy(model), copy.copy(model.get_submodule(prefix))
    compiled._modules = {**model._modules, prefix: base}
    base.compile(dynamic=True)
    return compiled


def _repeat_heads(heads_1HLD: Tensor, group: int) -> Tensor:
    """Repeat each key head for its group of query heads."""
    return heads_1HLD if group == 1 else heads_1HLD.repeat_interleave(group, dim=1)


class SequentialRunner:
    """Any causal model of transformers, one sequence after another, each with a `DynamicCache` of its own."""

    has_slot_cache = False
    cache_bytes_per_token = 0

    def __init__(self, model: nn.Module, adapters: LoraAdapters) -> None:
        self.model, self.adapters = model, adapters
        self.device = next(model.parameters()).device
        self._caches: dict[int, DynamicCache] = {}

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Keep some slots' caches under their new numbers."""
        self._caches = {new: self._caches[old] for new, (old, _) in enumerate(keep) if old in self._caches}

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Give a slot to a new sequence; it can't share tokens."""
        assert num_tokens == 0, f"slot {slot} can't share {num_tokens} tokens of slot {source}: each has its own cache"

    def clear_slot(self, slot: int) -> None:
        """Delete a slot's cache."""
        self._caches.pop(slot, None)

    def run(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Run a forward for each sequence."""
        rows = []
        for slot, num_computed_tokens, tokens, num_logits, adapter in batch:
            if num_computed_tokens == 0:
                self._caches[slot] = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
            elif (excess := self._caches[slot].get_seq_length() - num_computed_tokens) > 0:  # a failed step is retried
                self._caches[slot].crop(-excess)
            with self.adapters.active([adapter] * len(tokens)):
                output = self.model(
                    input_ids=torch.tensor([tokens], device=self.device),
                    attention_mask=torch.ones((1, num_computed_tokens + len(tokens)), dtype=torch.int64, device=self.device),
                    past_key_values=self._caches[slot],
                    use_cache=True,
                )  # fmt: skip
            rows.append(output.logits[0, len(tokens) - num_logits :])
        return torch.cat(rows)


def max_positions(config: Any) -> int | None:
    """Return how many tokens a sequence may have; at most a sliding window, beyond which keys would be dropped."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(positions, window) if positions and window else positions


def make_runner(model: nn.Module, adapters: LoraAdapters | None = None, compiled: bool = False) -> ModelRunner:
    """Return the fastest runner whose logits are the model's own. Raises UserError where it can't be compiled as asked."""
    adapters = adapters or LoraAdapters(model)
    try:
        return BatchedRunner(model, adapters, compiled)
    except UnsupportedModel as error:
        if compiled:
            raise UserError(
                f"serve.compile: this model can't be compiled ({error}): leave serve.compile out"
            ) from error
        return SequentialRunner(model, adapters)
