"""Ulysses sequence parallelism: a sequence is split among ranks by tokens; within attention, by heads.

Jacobs et al. 2023, https://arxiv.org/abs/2309.14509. One all-to-all among the ranks of a group precedes attention
(queries, keys and values together) and another one follows it; all other layers work on each token separately. The loss is
a sum over tokens, so nothing else changes: each rank sums over its own.

Shapes: B batch, S ranks of a group, L sequence length, P length of a rank's part (L = S P), H query heads, K key and value
heads, D head width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.cross_entropy import IGNORE_INDEX
from engine.objectives.contract import Batch, Objective, Scores, objectives_with
from engine.train.process_group import ProcessGroup

ATTENTION = "ulysses"  # name of this attention implementation in transformers


class AllToAll(torch.autograd.Function):
    """Send block i of blocks [S, ...] to rank i of the group, receive its block. It is its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Any) -> Tensor:
        """All-to-all of the blocks."""
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """All-to-all of the gradients."""
        return AllToAll.apply(gradients[0].contiguous(), ctx.group), None


class SequenceParallel:
    """This rank's position in its sequence parallel group. With size 1 each rank has whole sequences."""

    def __init__(self, group: ProcessGroup, size: int = 1, causal: bool = True) -> None:
        """Create groups of `size` adjacent ranks, on all ranks at once; of the greatest common divisor if size does not fit."""
        self.size = math.gcd(size, group.world_size)
        self.rank = group.rank % self.size
        self.data_rank = group.rank // self.size  # ranks of a group process the same samples
        self.data_world_size = group.world_size // self.size
        self._causal = causal
        self._group: Any = None
        if self.size > 1:
            groups = [dist.new_group(list(range(i, i + self.size))) for i in range(0, group.world_size, self.size)]
            self._group = groups[self.data_rank]

    def attach(self, model: Any) -> None:
        """Make the model use this attention."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(self.attention))
        model.set_attn_implementation(ATTENTION)

    def shard(self, batch: Batch) -> Batch:
        """Return this rank's part of each sequence, with an attention mask for the full sequence if one is needed."""
        if self.size == 1:
            return batch
        length = batch.targets.shape[1]
        padding = -length % self.size
        inputs = dict(batch.inputs)
        input_mask = inputs.pop("attention_mask", None)  # [B, L], or [B, 1, L, L]
        position_ids = inputs.get("position_ids") if self._causal else None
        mask = self._full_mask(input_mask, position_ids, padding)
        inputs.setdefault("position_ids", torch.arange(length, device=batch.targets.device).expand_as(batch.targets))
        parts = {name: self._local(F.pad(tensor, (0, padding))) for name, tensor in inputs.items()}
        if mask is not None:  # 4-D: transformers passes such a mask to the attention unchanged
            parts["attention_mask"] = mask
        targets = self._local(F.pad(batch.targets, (0, padding), value=IGNORE_INDEX))
        tokens = batch.tokens if self.rank == 0 else 0
        return replace(batch, inputs=parts, targets=targets, count=int((targets != IGNORE_INDEX).sum()), tokens=tokens)

    def _local(self, full: Tensor) -> Tensor:
        return full.chunk(self.size, dim=1)[self.rank].contiguous()

    def _full_mask(self, input_mask: Tensor | None, position_BL: Tensor | None, padding: int) -> Tensor | None:
        """Return which keys each query may attend to, bool [B, 1, L or 1, L]; None if a causal mask suffices."""
        mask = None
        if input_mask is not None:
            mask = input_mask.bool() if input_mask.ndim == 4 else input_mask.bool()[:, None, None, :]
            mask = F.pad(mask, (0, padding, 0, padding if input_mask.ndim == 4 else 0))
        if position_BL is not None:
            document_BL = F.pad(position_BL, (0, padding)).eq(0).cumsum(1)
            same_document = document_BL[:, None, :, None] == document_BL[:, None, None, :]
            mask = same_document if mask is None else mask & same_document
        if mask is not None and self._causal:
            mask = mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        return mask

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend from query [B, H, P, D] to key and value [B, K, P, D] of the full sequence; return [B, P, H, D].

        The mask, bool [B, 1, L or 1, L], covers the full sequence.
        """
        heads = query.shape[1]
        if key.shape[1] % self.size:  # too few to be split among the ranks
            key, value = (full.repeat_interleave(heads // full.shape[1], dim=1) for full in (key, value))
        query, key, value = self._gather_sequence(query, key, value)
        if key.shape[1] < query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        causal = self._causal and attention_mask is None
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        return self._gather_heads(output), None

    def _gather_sequence(self, *parts: Tensor) -> list[Tensor]:
        """Exchange tensors from part of the sequence, all heads [B, H, P, D], to full sequence, some heads [B, H/S, L, D]."""
        if self.size == 1:
            return list(parts)
        blocks = [part.unflatten(1, (self.size, -1)).movedim(1, 0) for part in parts]  # [S, B, H/S, P, D]
        counts = [block.shape[2] for block in blocks]
        received = AllToAll.apply(torch.cat(blocks, dim=2), self._group)
        return [block.movedim(0, 2).flatten(2, 3) for block in received.split(counts, dim=2)]

    def _gather_heads(self, output: Tensor) -> Tensor:
        """Exchange from full sequence, some heads [B, H/S, L, D] to part of the sequence, all heads [B, P, H, D]."""
        if self.size > 1:
            blocks = output.unflatten(2, (self.size, -1)).movedim(2, 0)  # [S, B, H/S, P, D]
            output = AllToAll.apply(blocks.contiguous(), self._group).movedim(0, 1).flatten(1, 2)
        return output.transpose(1, 2).contiguous()

    def reduce_scores(self, scores: Scores) -> Scores:
        """Sum the scores over the parts of each sequence; return them on the first rank of the group, and none on the others."""
        if self.size == 1:
            return scores
        for name, array in scores.items():
            total = torch.as_tensor(array)
            dist.all_reduce(total, group=self._group)
            scores[name] = np.asarray(total)
        return scores if self.rank == 0 else {}


@torch.no_grad()
def check_sequence_parallel(config: Any, objective: type[Objective], size: int, length: int) -> None:
    """Raise UserError for an architecture whose sequences of `length` tokens cannot be split among `size` ranks.

    Tests a model of one block with a vocabulary of 16: with this attention it must compute what it computes with sdpa.
    """
    import transformers

    if not objective.supports_sequence_parallel:
        supporting = " and ".join(objectives_with("supports_sequence_parallel"))
        raise UserError(f"train.sequence_parallel is for objective={supporting}: leave it out")
    heads = getattr(config, "num_attention_heads", size)
    if heads % size:
        raise UserError(
            f"train.sequence_parallel={size} does not divide the model's {heads} attention heads: use a divisor of {heads}"
        )
    causal = objective.is_causal
    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers = 16, 1
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    ids, position_L = torch.tensor([[3, 4, 5, 6, 7, 8, 9]]), torch.arange(7)[None]
    single = SequenceParallel(ProcessGroup(0, 1, torch.device("cpu")), causal=causal)
    try:
        auto_class = getattr(transformers, objective.auto_class)
        model = auto_class.from_config(small, dtype=torch.float32, attn_implementation="sdpa").eval()
        expected = model(input_ids=ids).logits
        single.attach(model)
        same = model(input_ids=ids, position_ids=position_L).logits
        reversed_positions = model(input_ids=ids, position_ids=position_L.flip(1)).logits
        diagonal = torch.eye(7, dtype=torch.bool)[None, None]
        masked = model(input_ids=ids, position_ids=position_L, attention_mask=diagonal).logits
        matches = [torch.allclose(logits, expected, atol=1e-5) for logits in (same, reversed_positions, masked)]
        is_supported = matches == [True, False, False]
    except (TypeError, ValueError):
        is_supported = False
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or length
    if not is_supported or window < length:
        raise UserError(
            f"train.sequence_parallel is not for model.type={config.model_type}, whose attention or positions in transformers "
            "work on a whole sequence only: leave it out, or use another model.type (llama, gpt2, bert)"
        )
