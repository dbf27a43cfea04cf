"""The forward of a step: tokens of many sequences, at whatever lengths, through the model at once.

`Packed` lays the new tokens of all sequences end to end in one row, so that every product of the model is done once
for all (Yu et al. 2022, Orca), and does attention itself: keys and values are written in place into lanes of a cache
that is made once, and those that decode read the lanes where they lie. `Apart` runs any other causal model, one sequence
after the other. Shapes: T tokens of the step, N lanes, C tokens a lane, L tokens attended, H heads, G query heads to a
key head, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "manta_lanes"
# What a model may tell its attention without changing what comes out (a window is checked against the lanes' length).
NEUTRAL = {"position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "output_hidden_states"}
PROBES = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8], [6])  # prompts by which a way to run the model is tried out


class Unpackable(Exception):
    """The model's attention does more than lanes can give."""


class Part(NamedTuple):
    """One sequence's part of a forward."""

    lane: int
    past: int  # its tokens in the cache already
    tokens: Sequence[int]  # the next ones
    wanted: int  # of how many of these, from the end, the logits are wanted


class Forward(Protocol):
    """A model with a cache of several lanes."""

    shares: bool  # whether a sequence may go on from what its lane, or another, holds

    @property
    def token_bytes(self) -> int:
        """Bytes of cache for one token; 0: not known."""

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Make the cache anew; `keep` are (lane, tokens) that become lanes 0, 1, ... of the new one."""

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Return the wanted logits, [rows, V], in the parts' order; the tokens are in the cache then."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a lane another's first tokens."""

    def clear(self, lane: int) -> None:
        """Forget what a lane holds."""


class Packed:
    """All tokens of a step in one row, attention over lanes."""

    shares = True

    def __init__(self, model: nn.Module) -> None:
        """Set the model's attention to this one; without a step it stays what it was. Raises Unpackable."""
        if not getattr(model, "_supports_attention_backend", False):
            raise Unpackable(f"{type(model).__name__} has an attention of its own")
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
        self.model = model
        self.before: str = model.config._attn_implementation  # type: ignore[union-attr,assignment]
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.lanes, self.capacity = 0, 0
        self._keys: dict[int, Tensor] = {}  # layer -> [N C, H D]
        self._values: dict[int, Tensor] = {}
        self._no_mask = torch.zeros((1, 1, 1, 1), device=self.device)  # four dimensions: the model makes none itself
        self.shape(len(PROBES), max(map(len, PROBES)) + 1)
        try:
            self._agree()
        except Exception as error:
            model.set_attn_implementation(self.before)  # type: ignore[operator]
            raise error if isinstance(error, Unpackable) else Unpackable(f"{type(error).__name__}: {error}") from error

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values for one token."""
        both = (*self._keys.values(), *self._values.values())
        return sum(cache.shape[1] * cache.element_size() for cache in both)

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Make the cache anew, a layer at a time."""
        for caches in (self._keys, self._values):
            for layer, old in caches.items():
                # Zeros: what lies beyond a sequence's end is masked, and must be a number for that.
                new = old.new_zeros((lanes * capacity, old.shape[1]))
                for lane, (source, tokens) in enumerate(keep):
                    start = source * self.capacity
                    new[lane * capacity : lane * capacity + tokens] = old[start : start + tokens]
                caches[layer] = new
        self.lanes, self.capacity = lanes, capacity

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values of all layers."""
        a, b = source * self.capacity, target * self.capacity
        for cache in (*self._keys.values(), *self._values.values()):
            cache[b : b + tokens] = cache[a : a + tokens]

    def clear(self, lane: int) -> None:
        """Write zeros over a lane."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[lane * self.capacity : (lane + 1) * self.capacity] = 0

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Run one forward for all parts: the decoding ones first, by lane, as they lie in the cache."""
        order = sorted(range(len(parts)), key=lambda i: (len(parts[i].tokens) > 1, parts[i].lane))
        step = Step(self, [parts[i] for i in order])
        at, rows = 0, {}
        for i in order:
            at += len(parts[i].tokens)
            rows[i] = range(at - parts[i].wanted, at)
        wanted = [row for i in range(len(parts)) for row in rows[i]]
        everything = wanted == list(range(at))
        logits_1RV = self.model(
            input_ids=step.ids_1T,
            position_ids=step.positions_1T,
            attention_mask=self._no_mask,
            use_cache=False,
            logits_to_keep=0 if everything else torch.tensor(wanted, dtype=torch.int64, device=self.device),
            lanes=step,
        ).logits
        return logits_1RV[0]

    def write(self, layer: int, places_T: Tensor, keys_TW: Tensor, values_TW: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values into the cache, and return the whole of it: [N C, H D] each."""
        if layer not in self._keys:
            size = self.lanes * self.capacity
            self._keys[layer] = keys_TW.new_zeros((size, keys_TW.shape[1]))
            self._values[layer] = values_TW.new_zeros((size, values_TW.shape[1]))
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, places_T, keys_TW)
        values.index_copy_(0, places_T, values_TW)
        return keys, values

    @torch.inference_mode()
    def _agree(self) -> None:
        """Try the probes, in chunks and together, against the model's own forward. Raises Unpackable."""
        vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        prompts = [[token % vocabulary for token in probe] for probe in PROBES]
        self.run([Part(0, 0, prompts[0][:3], 0), Part(1, 0, prompts[1][:-1], 1)])
        logits_RV = self.run(
            [Part(0, 3, prompts[0][3:], 1), Part(1, 3, prompts[1][-1:], 1), Part(2, 0, prompts[2], 1)]
        ).float()
        for row_V, prompt in zip(logits_RV, prompts, strict=True):
            ids_1L = torch.tensor([prompt], device=self.device)
            own_V = self.model(input_ids=ids_1L, use_cache=False).logits[0, -1].float()
            off, scale = float((row_V - own_V).abs().max()), float(own_V.abs().max())
            if not off <= (1e-3 if self.dtype == torch.float32 else 0.1) * max(scale, 1.0):
                raise Unpackable(f"its logits are off by {off:.2g}")


class Step:
    """Where the tokens of one forward belong, worked out once for all layers."""

    def __init__(self, cache: Packed, parts: Sequence[Part]) -> None:
        """Take the parts: first those of one token, ordered by lane, then those of several."""
        self.cache, capacity, device = cache, cache.capacity, cache.device
        self.singles = sum(1 for part in parts if len(part.tokens) == 1)
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        for part in parts:
            start, count = part.lane * capacity + part.past, len(part.tokens)
            ids += part.tokens
            positions += range(part.past, part.past + count)
            places += range(start, start + count)
        table_3T = torch.tensor([ids, positions, places]).to(device)
        self.ids_1T, self.positions_1T, self.places_T = table_3T[:1], table_3T[1:2], table_3T[2]
        if self.singles:
            self._lay_out_singles(parts[: self.singles])
        self.chunks = [self._chunk(parts, i) for i in range(self.singles, len(parts))]

    def _lay_out_singles(self, parts: Sequence[Part]) -> None:
        """Find the lanes from the first to the last that decodes; those between that don't are computed for nothing."""
        self.first, self.end = parts[0].lane, parts[-1].lane + 1
        lengths = [1] * (self.end - self.first)
        for part in parts:
            lengths[part.lane - self.first] = part.past + 1
        self.length = max(lengths)
        self.rows_S: Tensor | None = None
        if len(parts) < len(lengths):
            self.rows_S = torch.tensor([part.lane - self.first for part in parts]).to(self.cache.device)
        self.mask_N11L: Tensor | None = None
        if min(lengths) < self.length:
            ends_N1 = torch.tensor(lengths).to(self.cache.device)[:, None]
            beyond_NL = torch.arange(self.length, device=self.cache.device) >= ends_N1
            mask_NL = torch.zeros(beyond_NL.shape, dtype=self.cache.dtype, device=self.cache.device)
            self.mask_N11L = mask_NL.masked_fill_(beyond_NL, -torch.inf)[:, None, None]

    def _chunk(self, parts: Sequence[Part], i: int) -> tuple[int, int, int, int, Tensor | None]:
        """Return (first token of the step, count, lane, length attended, mask) of a prompt's chunk."""
        part, count = parts[i], len(parts[i].tokens)
        start = sum(len(before.tokens) for before in parts[:i])
        if part.past == 0:
            return start, count, part.lane, count, None
        length = part.past + count
        mask_TL = torch.full((count, length), -torch.inf, dtype=self.cache.dtype, device=self.cache.device)
        return start, count, part.lane, length, mask_TL.triu_(part.past + 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Write the keys and values [1, H, T, D], and attend to each sequence's own. Returns [1, T, heads, D]."""
        _, heads, tokens, width = query.shape
        key_heads, value_width = key.shape[1], value.shape[3]
        group = heads // key_heads
        keys_TW = key.transpose(1, 2).reshape(tokens, -1)
        keys, values = self.cache.write(layer, self.places_T, keys_TW, value.transpose(1, 2).reshape(tokens, -1))
        keys_NHCD = keys.view(-1, self.cache.capacity, key_heads, width).transpose(1, 2)
        values_NHCD = values.view(-1, self.cache.capacity, key_heads, value_width).transpose(1, 2)
        query_TE = query.transpose(1, 2).reshape(tokens, -1)
        outputs = []
        if self.singles:
            query_SE = query_TE[: self.singles]
            if self.rows_S is not None:
                rows_NE = query_SE.new_zeros((self.end - self.first, query_SE.shape[1]))
                query_SE = rows_NE.index_copy_(0, self.rows_S, query_SE)
            attended = F.scaled_dot_product_attention(
                query_SE.view(-1, key_heads, group, width),
                keys_NHCD[self.first : self.end, :, : self.length],
                values_NHCD[self.first : self.end, :, : self.length],
                attn_mask=self.mask_N11L,
                scale=scaling,
            )
            output = attended.reshape(self.end - self.first, -1)
            outputs.append(output if self.rows_S is None else output[self.rows_S])
        for start, count, lane, length, mask_TL in self.chunks:
            attended = F.scaled_dot_product_attention(
                query_TE[start : start + count].view(1, count, heads, width).transpose(1, 2),
                _repeat(keys_NHCD[lane : lane + 1, :, :length], group),
                _repeat(values_NHCD[lane : lane + 1, :, :length], group),
                attn_mask=mask_TL,
                is_causal=mask_TL is None,
                scale=scaling,
            )
            outputs.append(attended.transpose(1, 2).reshape(count, -1))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(1, tokens, heads, value_width)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lanes: Step | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks it of an attention function; without `lanes`, as its own `sdpa`."""
    if lanes is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    unknown = [name for name, value in others.items() if value is not None and name not in NEUTRAL]
    if unknown:
        raise Unpackable(f"its attention takes {', '.join(unknown)}")
    return lanes.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]


def _repeat(heads_1HLD: Tensor, group: int) -> Tensor:
    """Repeat each key head for its group of query heads."""
    return heads_1HLD if group == 1 else heads_1HLD.repeat_interleave(group, dim=1)


class Apart:
    """Any causal model of transformers, one sequence after the other, each with a cache of transformers' own."""

    shares = False
    token_bytes = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._caches: dict[int, DynamicCache] = {}

    def shape(self, lanes: int, capacity: int, keep: Sequence[tuple[int, int]] = ()) -> None:
        """Keep some lanes under their new numbers."""
        self._caches = {new: self._caches[old] for new, (old, _) in enumerate(keep) if old in self._caches}

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Never called: lanes share nothing."""
        raise NotImplementedError

    def clear(self, lane: int) -> None:
        """Drop a lane's cache."""
        self._caches.pop(lane, None)

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Run a forward for each part."""
        rows = []
        for lane, past, tokens, wanted in parts:
            if past == 0:
                self._caches[lane] = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.device),
                attention_mask=torch.ones((1, past + len(tokens)), dtype=torch.int64, device=self.device),
                past_key_values=self._caches[lane],
                use_cache=True,
            )
            rows.append(output.logits[0, len(tokens) - wanted :])
        return torch.cat(rows)


def make_forward(model: nn.Module) -> Forward:
    """Return the quickest way to run a model that gives what the model itself gives."""
    try:
        return Packed(model)
    except Unpackable:
        return Apart(model)
