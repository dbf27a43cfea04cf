"""Ulysses sequence parallelism: ranks share a sequence, each with a part of its tokens; within attention, each with a part of the heads.

Jacobs et al. 2023, https://arxiv.org/abs/2309.14509. An exchange among the ranks of a group lies before the attention
(queries, keys and values at once) and another one after it; all else in a model works on each token alone. The loss is a
sum over tokens, so that nothing else changes: each rank sums over its own.

Shapes: B batch, S ranks of a group, L length of a sequence, P of a rank's part of it (L = S P), H heads, K of keys and
values, D width of a head.
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
from engine.objectives.contract import Batch, Objective, Scores
from engine.train.process_group import Group

ATTENTION = "ulysses"  # its name among transformers' implementations of attention


class Exchange(torch.autograd.Function):
    """Give block i of blocks [S, ...] to rank i of the group and take its: its own inverse, so its own derivative too."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Any) -> Tensor:
        """Exchange the blocks."""
        ctx.group = group
        taken = torch.empty_like(blocks)
        dist.all_to_all_single(taken, blocks, group=group)
        return taken

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Exchange their gradients."""
        return Exchange.apply(gradients[0].contiguous(), ctx.group), None


class SequenceParallel:
    """This rank's place among those that share each sequence. Alone, it has the whole of it."""

    def __init__(self, group: Group, size: int = 1, causal: bool = True) -> None:
        """Make groups of `size` neighbouring ranks, on all ranks at once; after a loss of some, of as many as divide both."""
        self.size = math.gcd(size, group.world)
        self.rank = group.rank % self.size
        self.share, self.shares = group.rank // self.size, group.world // self.size  # of the samples
        self._causal = causal
        self._group: Any = None
        if self.size > 1:
            groups = [dist.new_group(list(range(i, i + self.size))) for i in range(0, group.world, self.size)]
            self._group = groups[self.share]

    def attach(self, model: Any) -> None:
        """Let the model's attention be this one."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(self.attend))
        model.set_attn_implementation(ATTENTION)

    def part(self, batch: Batch) -> Batch:
        """Return this rank's part of each sequence, with a mask for the whole of it where one is needed."""
        if self.size == 1:
            return batch
        length = batch.targets.shape[1]
        missing = -length % self.size
        inputs = dict(batch.inputs)
        known = inputs.pop("attention_mask", None)  # [B, L], or [B, 1, L, L]
        starts_over = inputs.get("position_ids") if self._causal else None
        mask = self._whole_mask(known, starts_over, missing)
        inputs.setdefault("position_ids", torch.arange(length, device=batch.targets.device).expand_as(batch.targets))
        parts = {name: self._own(F.pad(tensor, (0, missing))) for name, tensor in inputs.items()}
        if mask is not None:  # of four dimensions: transformers hands such a one to the attention as it is
            parts["attention_mask"] = mask
        targets = self._own(F.pad(batch.targets, (0, missing), value=IGNORE_INDEX))
        tokens = batch.tokens if self.rank == 0 else 0
        return replace(batch, inputs=parts, targets=targets, count=int((targets != IGNORE_INDEX).sum()), tokens=tokens)

    def _own(self, full: Tensor) -> Tensor:
        return full.chunk(self.size, dim=1)[self.rank].contiguous()

    def _whole_mask(self, known: Tensor | None, position_BL: Tensor | None, missing: int) -> Tensor | None:
        """Return which key each query may look at, bool [B, 1, L or 1, L]; None where being causal says it all."""
        mask = None
        if known is not None:
            mask = known.bool() if known.ndim == 4 else known.bool()[:, None, None, :]
            mask = F.pad(mask, (0, missing, 0, missing if known.ndim == 4 else 0))
        if position_BL is not None:
            document_BL = F.pad(position_BL, (0, missing)).eq(0).cumsum(1)
            apart = document_BL[:, None, :, None] == document_BL[:, None, None, :]
            mask = apart if mask is None else mask & apart
        if mask is not None and self._causal:
            mask = mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend from query [B, H, P, D] to key and value [B, K, P, D] of the whole sequence; return [B, P, H, D].

        The mask, bool [B, 1, L or 1, L], is of the whole sequence too.
        """
        heads = query.shape[1]
        if key.shape[1] % self.size:  # too few to be shared out
            key, value = (full.repeat_interleave(heads // full.shape[1], dim=1) for full in (key, value))
        query, key, value = self._whole_sequence(query, key, value)
        if key.shape[1] < query.shape[1]:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        causal = self._causal and attention_mask is None
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        return self._whole_heads(attended), None

    def _whole_sequence(self, *parts: Tensor) -> list[Tensor]:
        """Turn parts of a sequence with all heads [B, H, P, D], of several tensors, into whole ones with some [B, H/S, L, D]."""
        if self.size == 1:
            return list(parts)
        blocks = [part.unflatten(1, (self.size, -1)).movedim(1, 0) for part in parts]  # [S, B, H/S, P, D]
        counts = [block.shape[2] for block in blocks]
        taken = Exchange.apply(torch.cat(blocks, dim=2), self._group)
        return [block.movedim(0, 2).flatten(2, 3) for block in taken.split(counts, dim=2)]

    def _whole_heads(self, whole: Tensor) -> Tensor:
        """Turn a whole sequence with some heads [B, H/S, L, D] into a part of it with all, [B, P, H, D]."""
        if self.size > 1:
            blocks = whole.unflatten(2, (self.size, -1)).movedim(2, 0)  # [S, B, H/S, P, D]
            whole = Exchange.apply(blocks.contiguous(), self._group).movedim(0, 1).flatten(1, 2)
        return whole.transpose(1, 2).contiguous()

    def scores(self, scores: Scores) -> Scores:
        """Add up what the parts of each sequence have scored; return it to one rank of the group, and nothing to the others."""
        if self.size == 1:
            return scores
        for name, array in scores.items():
            total = torch.as_tensor(array)
            dist.all_reduce(total, group=self._group)
            scores[name] = np.asarray(total)
        return scores if self.rank == 0 else {}


@torch.no_grad()
def check_divisible(config: Any, objective: type[Objective], size: int, length: int) -> None:
    """Raise UserError for an architecture whose sequences of `length` tokens cannot be shared out among `size` ranks.

    Tried on one block of it, with a vocabulary of 16: with this attention it must give what it gives with torch's.
    """
    import transformers

    if not objective.supports_sequence_parallel:
        raise UserError("train.sequence_parallel is for objective=causal_lm and masked_lm: leave it out")
    heads = getattr(config, "num_attention_heads", size)
    if heads % size:
        raise UserError(
            f"train.sequence_parallel={size} does not divide the model's {heads} attention heads: use a divisor of {heads}"
        )
    causal = objective.auto_class == "AutoModelForCausalLM"
    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers = 16, 1
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    ids, place_L = torch.tensor([[3, 4, 5, 6, 7, 8, 9]]), torch.arange(7)[None]
    whole = SequenceParallel(Group(0, 1, torch.device("cpu")), causal=causal)
    try:
        kind = getattr(transformers, objective.auto_class)
        model = kind.from_config(small, dtype=torch.float32, attn_implementation="sdpa").eval()
        expected = model(input_ids=ids).logits
        whole.attach(model)
        found = model(input_ids=ids, position_ids=place_L).logits
        turned = model(input_ids=ids, position_ids=place_L.flip(1)).logits
        alone = torch.eye(7, dtype=torch.bool)[None, None]
        blinded = model(input_ids=ids, position_ids=place_L, attention_mask=alone).logits
        fit = [torch.allclose(logits, expected, atol=1e-5) for logits in (found, turned, blinded)] == [
            True,
            False,
            False,
        ]
    except (TypeError, ValueError):
        fit = False
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or length
    if not fit or window < length:
        raise UserError(
            f"train.sequence_parallel is not for model.type={config.model_type}, whose attention or positions in transformers "
            "work on a whole sequence only: leave it out, or use another model.type (llama, gpt2, bert)"
        )
