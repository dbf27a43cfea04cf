"""Pick the next token of every sequence of a batch at once. Shapes: R rows (sequences), V vocabulary, K candidates."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 256  # likeliest tokens that are sorted first; a row whose nucleus is larger has all of its own sorted


@dataclass(frozen=True)
class SamplingParams:
    """How a completion picks its tokens, in OpenAI's terms."""

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # the nucleus's probability (Holtzman et al. 2020)
    top_k: int = 0  # 0: all
    frequency_penalty: float = 0.0  # taken off a logit for each time that its token was written
    presence_penalty: float = 0.0  # taken off once
    bias: dict[int, float] = field(default_factory=dict)  # token -> what is added to its logit

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are not taken as they are."""
        return bool(self.frequency_penalty or self.presence_penalty or self.bias)


class Mask(Protocol):
    """Follows a text that has a given form."""

    def allowed(self, vocabulary: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans."""

    def take(self, token: int) -> bool:
        """Go on by a token; return whether the text is whole, so that nothing may follow."""


def choose(
    logits_RV: Tensor,
    samplings: Sequence[SamplingParams],
    written: Sequence[Sequence[int]],
    dice: Sequence[random.Random],
    masks: Sequence[Mask | None] = (),
) -> list[int]:
    """Pick a token for each row, or -1 where its logits are not finite numbers.

    `written` are the tokens that a row wrote before, `dice` its own source of chance: one number is drawn from it for
    each token and turned into a token by the inverse of the row's cumulative distribution, so that a pick depends on
    its row alone. `masks` are those of the rows whose text has a given form.
    """
    changed = [i for i, sampling in enumerate(samplings) if sampling.changes_logits]
    masked = [i for i, mask in enumerate(masks) if mask]
    if changed or masked:
        logits_RV = logits_RV.clone()
        for i in changed:
            _penalize(logits_RV[i], samplings[i], written[i])
        for i in masked:
            forbidden_V = ~masks[i].allowed(logits_RV.shape[-1])  # type: ignore[union-attr]
            logits_RV[i].masked_fill_(forbidden_V.to(logits_RV.device), -torch.inf)
    picked = _likeliest(logits_RV)
    drawn = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0 and picked[i] >= 0]
    if not drawn:
        return picked
    chances = [dice[i].random() for i in drawn]
    everyone = len(drawn) == len(samplings)
    rows_RV = (logits_RV if everyone else logits_RV[drawn]).double()
    heat_R1 = rows_RV.new_tensor([samplings[i].temperature for i in drawn])[:, None]
    # The largest is taken off first, so that no temperature, however small, overflows.
    p_RV = ((rows_RV - rows_RV.amax(-1, keepdim=True)) / heat_R1).softmax(-1)
    chance_R1 = p_RV.new_tensor(chances)[:, None]
    whole = [j for j, i in enumerate(drawn) if samplings[i].top_p >= 1 and not samplings[i].top_k]
    for j, token in zip(whole, _draw(p_RV[whole], chance_R1[whole]), strict=True):
        picked[drawn[j]] = token
    cut = [j for j, i in enumerate(drawn) if samplings[i].top_p < 1 or samplings[i].top_k]
    if cut:
        limits = [samplings[drawn[j]] for j in cut]
        for j, token in zip(cut, _draw_from_nucleus(p_RV[cut], chance_R1[cut], limits), strict=True):
            picked[drawn[j]] = token
    return picked


def _likeliest(logits_RV: Tensor) -> list[int]:
    """Return the token of each row's largest logit, or -1 where that is no finite number."""
    found: list[int]
    if logits_RV.device.type == "cpu":  # numpy takes a tenth of torch's time for it
        numbers_RV = logits_RV.float().numpy()
        ids = numbers_RV.argmax(-1)  # of one that is not a number, where there is one
        found = np.where(np.isfinite(numbers_RV[np.arange(len(ids)), ids]), ids, -1).tolist()
    else:
        best_R, ids_R = logits_RV.max(-1)
        found = ids_R.masked_fill(~best_R.isfinite(), -1).tolist()
    return found


def _penalize(logits_V: Tensor, sampling: SamplingParams, written: Sequence[int]) -> None:
    """Change a row in place: https://platform.openai.com/docs/api-reference/completions, on the written tokens."""
    if sampling.bias:
        ids = torch.tensor(list(sampling.bias), device=logits_V.device)
        logits_V[ids] += logits_V.new_tensor(list(sampling.bias.values()))
    if written and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(written)
        ids = torch.tensor(list(counts), device=logits_V.device)
        times = logits_V.new_tensor(list(counts.values()))
        logits_V[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty


def _draw(p_RK: Tensor, chance_R1: Tensor) -> list[int]:
    """Return the first place of each row at which the cumulative distribution is over its chance."""
    if not len(p_RK):
        return []
    cumulative_RK = p_RK.cumsum(-1)
    places_R = torch.searchsorted(cumulative_RK, chance_R1 * cumulative_RK[:, -1:], right=True)[:, 0]
    found: list[int] = places_R.clamp(max=p_RK.shape[-1] - 1).tolist()
    return found


def _draw_from_nucleus(p_RV: Tensor, chance_R1: Tensor, limits: Sequence[SamplingParams]) -> list[int]:
    """Draw among each row's `top_k` likeliest tokens, and of these the fewest that make up `top_p` of their sum."""
    vocabulary = p_RV.shape[-1]
    p_RK, ids_RK = p_RV.topk(min(CANDIDATES, vocabulary))
    top_k_R1 = torch.tensor([min(limit.top_k or vocabulary, vocabulary) for limit in limits], device=p_RV.device)[
        :, None
    ]
    top_p_R1 = p_RV.new_tensor([limit.top_p for limit in limits])[:, None]
    all_in_R1 = (top_k_R1 == vocabulary) & (p_RK.sum(-1, keepdim=True) >= top_p_R1)
    enough_R = (all_in_R1 | (top_k_R1 <= p_RK.shape[-1]))[:, 0]
    tokens = _draw_sorted(p_RK, ids_RK, chance_R1, top_k_R1, top_p_R1)
    for i in (~enough_R).nonzero()[:, 0].tolist():
        all_1V, ids_1V = p_RV[i : i + 1].sort(descending=True)
        one = slice(i, i + 1)
        (tokens[i],) = _draw_sorted(all_1V, ids_1V, chance_R1[one], top_k_R1[one], top_p_R1[one])
    return tokens


def _draw_sorted(p_RK: Tensor, ids_RK: Tensor, chance_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> list[int]:
    ranks_K = torch.arange(p_RK.shape[-1], device=p_RK.device)
    p_RK = p_RK.masked_fill(ranks_K >= top_k_R1, 0.0)
    # Of the whole distribution where top_k cuts nothing: what lies beyond the candidates counts too.
    whole_R1 = torch.where(top_k_R1 > p_RK.shape[-1], 1.0, p_RK.sum(-1, keepdim=True))
    before_RK = p_RK.cumsum(-1) - p_RK
    p_RK = p_RK.masked_fill(before_RK >= top_p_R1 * whole_R1, 0.0)
    places = torch.tensor(_draw(p_RK, chance_R1), device=p_RK.device)
    found: list[int] = ids_RK.gather(1, places[:, None])[:, 0].tolist()
    return found
