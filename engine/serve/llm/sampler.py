"""Sample the next token of every sequence of a batch at once, and compute log-probabilities.

Shapes: R rows (sequences), V vocabulary, K candidates.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.serve.jobs import SamplingParams

NUM_CANDIDATES = 256  # likeliest tokens that are sorted first; a row whose nucleus is larger has all of its own sorted
NOT_FINITE = -1  # in place of a token, where a row's logits are not finite


class Mask(Protocol):
    """The tokens that a grammar allows next in one sequence."""

    def allowed_tokens(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans."""

    def accept_token(self, token: int) -> bool:
        """Advance by a token; return whether the text is complete, so that no token may follow."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own log-probability (nats) of a token, before temperature and penalties, and of the likeliest ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # (token, log-probability), the likeliest first


def sample(
    logits_RV: Tensor,
    samplings: Sequence[SamplingParams],
    generated: Sequence[Sequence[int]],
    rngs: Sequence[random.Random],
    masks: Sequence[Mask | None] = (),
) -> list[int]:
    """Return a token for each row, or NOT_FINITE where its logits are not finite.

    `generated` are the tokens that each row's sequence has generated, `rngs` its own generators: one number is drawn
    for each token and mapped to a token by the inverse of the row's cumulative distribution, so that the result depends
    on the row alone, not on the batch. `masks` are those of the sequences that follow a grammar.
    """
    changed = [i for i, sampling in enumerate(samplings) if sampling.changes_logits]
    masked = [i for i, mask in enumerate(masks) if mask]
    if changed or masked:
        logits_RV = logits_RV.clone()
        for i in changed:
            _apply_penalties(logits_RV[i], samplings[i], generated[i])
        for i in masked:
            forbidden_V = ~masks[i].allowed_tokens(logits_RV.shape[-1])  # type: ignore[union-attr]
            logits_RV[i].masked_fill_(forbidden_V.to(logits_RV.device), -torch.inf)
    tokens = _argmax(logits_RV)
    random_rows = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0 and tokens[i] != NOT_FINITE]
    if not random_rows:
        return tokens
    uniforms = [rngs[i].random() for i in random_rows]
    all_rows = len(random_rows) == len(samplings)
    logits_RV = (logits_RV if all_rows else logits_RV[random_rows]).double()
    temperature_R1 = logits_RV.new_tensor([samplings[i].temperature for i in random_rows])[:, None]
    # The largest logit is subtracted first, so that no temperature, however small, overflows.
    p_RV = ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1).softmax(-1)
    uniform_R1 = p_RV.new_tensor(uniforms)[:, None]
    full = [j for j, i in enumerate(random_rows) if samplings[i].top_p >= 1 and not samplings[i].top_k]
    for j, token in zip(full, _inverse_cdf(p_RV[full], uniform_R1[full]), strict=True):
        tokens[random_rows[j]] = token
    truncated = [j for j, i in enumerate(random_rows) if samplings[i].top_p < 1 or samplings[i].top_k]
    if truncated:
        limits = [samplings[random_rows[j]] for j in truncated]
        drawn = _sample_top_k_top_p(p_RV[truncated], uniform_R1[truncated], limits)
        for j, token in zip(truncated, drawn, strict=True):
            tokens[random_rows[j]] = token
    return tokens


def compute_logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of one token in each row, and of the `num_top` likeliest."""
    logits_RV = logits_RV.float()
    log_p_RV = logits_RV.log_softmax(-1)
    logprobs = log_p_RV.gather(1, torch.tensor(tokens, device=log_p_RV.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [TokenLogprobs(token, logprob, []) for token, logprob in zip(tokens, logprobs, strict=True)]
    top_RK, ids_RK = log_p_RV.topk(min(num_top, log_p_RV.shape[-1]))
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids_RK.tolist(), top_RK.tolist(), strict=True)]
    return [TokenLogprobs(token, logprob, top) for token, logprob, top in zip(tokens, logprobs, tops, strict=True)]


def _argmax(logits_RV: Tensor) -> list[int]:
    """Return the token of each row's largest logit, or NOT_FINITE where that is not finite."""
    tokens: list[int]
    if logits_RV.device.type == "cpu":  # numpy takes a tenth of torch's time for it
        array_RV = logits_RV.float().numpy()
        ids = array_RV.argmax(-1)  # of a NaN, where there is one
        tokens = np.where(np.isfinite(array_RV[np.arange(len(ids)), ids]), ids, NOT_FINITE).tolist()
    else:
        max_R, ids_R = logits_RV.max(-1)
        tokens = ids_R.masked_fill(~max_R.isfinite(), NOT_FINITE).tolist()
    return tokens


def _apply_penalties(logits_V: Tensor, sampling: SamplingParams, generated: Sequence[int]) -> None:
    """Apply biases and penalties in place: https://platform.openai.com/docs/api-reference/completions."""
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits_V.device)
        logits_V[ids] += logits_V.new_tensor(list(sampling.logit_bias.values()))
    if generated and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(generated)
        ids = torch.tensor(list(counts), device=logits_V.device)
        frequencies = logits_V.new_tensor(list(counts.values()))
        logits_V[ids] -= sampling.frequency_penalty * frequencies + sampling.presence_penalty


def _inverse_cdf(p_RK: Tensor, uniform_R1: Tensor) -> list[int]:
    """Return the first index of each row at which the cumulative distribution is over a number from [0, 1)."""
    if not len(p_RK):
        return []
    cumulative_RK = p_RK.cumsum(-1)
    index_R = torch.searchsorted(cumulative_RK, uniform_R1 * cumulative_RK[:, -1:], right=True)[:, 0]
    indices: list[int] = index_R.clamp(max=p_RK.shape[-1] - 1).tolist()
    return indices


def _sample_top_k_top_p(p_RV: Tensor, uniform_R1: Tensor, limits: Sequence[SamplingParams]) -> list[int]:
    """Sample from each row's `top_k` likeliest tokens, and of these the fewest that make up `top_p` of their sum."""
    vocab_size = p_RV.shape[-1]
    p_RK, ids_RK = p_RV.topk(min(NUM_CANDIDATES, vocab_size))
    top_k_R1 = torch.tensor([min(limit.top_k or vocab_size, vocab_size) for limit in limits], device=p_RV.device)[
        :, None
    ]
    top_p_R1 = p_RV.new_tensor([limit.top_p for limit in limits])[:, None]
    has_nucleus_R1 = (top_k_R1 == vocab_size) & (p_RK.sum(-1, keepdim=True) >= top_p_R1)
    enough_R = (has_nucleus_R1 | (top_k_R1 <= p_RK.shape[-1]))[:, 0]
    tokens = _sample_sorted(p_RK, ids_RK, uniform_R1, top_k_R1, top_p_R1)
    for i in (~enough_R).nonzero()[:, 0].tolist():
        sorted_1V, ids_1V = p_RV[i : i + 1].sort(descending=True)
        row = slice(i, i + 1)
        (tokens[i],) = _sample_sorted(sorted_1V, ids_1V, uniform_R1[row], top_k_R1[row], top_p_R1[row])
    return tokens


def _sample_sorted(p_RK: Tensor, ids_RK: Tensor, uniform_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> list[int]:
    """Sample from rows that are sorted, the likeliest first."""
    ranks_K = torch.arange(p_RK.shape[-1], device=p_RK.device)
    p_RK = p_RK.masked_fill(ranks_K >= top_k_R1, 0.0)
    # Where top_k drops nothing, top_p is a share of the whole distribution: tokens beyond the candidates count, too.
    total_R1 = torch.where(top_k_R1 > p_RK.shape[-1], 1.0, p_RK.sum(-1, keepdim=True))
    before_RK = p_RK.cumsum(-1) - p_RK
    p_RK = p_RK.masked_fill(before_RK >= top_p_R1 * total_R1, 0.0)
    indices = torch.tensor(_inverse_cdf(p_RK, uniform_R1), device=p_RK.device)
    tokens: list[int] = ids_RK.gather(1, indices[:, None])[:, 0].tolist()
    return tokens
