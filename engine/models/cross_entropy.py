"""Cross-entropy over a vocabulary without the logits of the whole batch: only those of a chunk of tokens exist at a time.

The output embedding (the LM head) computes the loss itself: its `forward` is replaced during the pass, so that hooks on that
module (ZeRO-3's gather its weight) still run. The gradients of hidden states and weight are computed chunk by chunk in the
forward pass, while the logits exist; the backward pass only scales them.

Shapes: B batch, L length, T tokens, C tokens of a chunk, N tokens of a block in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # a target without a loss, as in torch
CACHED_LOGITS = 2**18  # on a CPU, in fp32: a megabyte
# Default size of a chunk: matrices of fewer tokens are multiplied slowly.
CHUNK_LOGITS, CHUNK_TOKENS = 2**25, 1024


def summed_cross_entropy(
    model: Any,
    inputs: dict[str, Any],
    targets: Tensor,
    count: int,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Run the model and return the cross-entropy in nats, summed over the targets but IGNORE_INDEX: a scalar in fp32.

    `count` is the number of these targets. `chunk_tokens` is the number of tokens whose logits exist at a time: None for a
    default, 0 for all. `z_loss` times the square of each token's log-normalizer is added (Chowdhery et al. 2022, PaLM,
    section 5: 1e-4).
    """

    def loss_from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden_TD, targets_T = hidden.flatten(0, -2), targets.flatten()
        if count < len(targets_T):
            is_target_T = torch.nonzero_static(targets_T != IGNORE_INDEX, size=count)[:, 0]
            hidden_TD, targets_T = hidden_TD[is_target_T], targets_T[is_target_T]
        rows = chunk_tokens or default_chunk_tokens(weight.shape[0])
        needs_grad = torch.is_grad_enabled()
        total: Tensor = ChunkedCrossEntropy.apply(hidden_TD, weight, bias, targets_T, rows, z_loss, needs_grad)
        return total.view(1, 1, 1)  # a model expects logits of three dimensions

    if chunk_tokens != 0 and (loss := run_with_head(model, inputs, loss_from_hidden)) is not None:
        return loss.view(())
    logits_TV = model(**inputs).logits.flatten(0, -2).float()
    total = F.cross_entropy(logits_TV, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    if z_loss:
        total = total + z_loss * (logits_TV[targets.flatten() != IGNORE_INDEX].logsumexp(1) ** 2).sum()
    return total


@torch.no_grad()
def token_scores(
    model: Any, inputs: dict[str, Any], targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the model and return each target's negative log-likelihood in nats and whether it has the highest logit.

    Both have the shape of the targets; they are 0 and False at IGNORE_INDEX.
    """

    def scores_from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden_TD, targets_T = hidden.flatten(0, -2), targets.flatten()
        scores_T2 = torch.zeros(len(targets_T), 2, device=hidden.device)
        rows = chunk_tokens or default_chunk_tokens(weight.shape[0])
        for chunk in (targets_T != IGNORE_INDEX).nonzero()[:, 0].split(rows):
            logits_CV = F.linear(hidden_TD[chunk], weight, bias).float()
            scores_T2[chunk, 0] = F.cross_entropy(logits_CV, targets_T[chunk], reduction="none")
            scores_T2[chunk, 1] = (logits_CV.argmax(1) == targets_T[chunk]).float()
        return scores_T2.view(*targets.shape, 2)

    if chunk_tokens != 0 and (scores := run_with_head(model, inputs, scores_from_hidden)) is not None:
        return scores[..., 0], scores[..., 1] > 0
    logits = model(**inputs).logits.float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return nll.view(targets.shape), logits.argmax(-1) == targets


HeadFunction = Callable[
    [Tensor, Tensor, Tensor | None], Tensor
]  # of hidden states, weight and bias; replaces the logits


def run_with_head(model: Any, inputs: dict[str, Any], head_function: HeadFunction) -> Tensor | None:
    """Run the model with `head_function` in place of its output embedding, and return what that returned.

    Returns None for a model without a linear output embedding, and for one that transforms its logits (Gemma 2 caps them).
    """
    module = getattr(model, "module", model)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return None
    if (override := getattr(head, "override", None)) is None:
        override = head.override = HeadOverride(head)  # type: ignore[assignment]
    return override.run(model, inputs, head_function)


class HeadOverride:
    """Replaces the forward of an output embedding for one pass of its model."""

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.logits_are_final = head, True
        self._head_function: HeadFunction | None = None
        self._head_output: Tensor | None = None
        # Always the same function object, or a compiled model is compiled again.
        self._forward = torch.compiler.disable(self._call_head_function)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model makes an override of its own when it needs one

    def run(self, model: Any, inputs: dict[str, Any], head_function: HeadFunction) -> Tensor | None:
        """Run the model and return the output of `head_function`, or None if the model took it for logits and changed it."""
        if not self.logits_are_final:
            return None
        original = self.head.__dict__.get("forward")
        self._head_function, self.head.forward = head_function, self._forward  # type: ignore[method-assign]
        try:
            logits: Tensor = model(**inputs).logits
            head_output = self._head_output
        finally:
            del self.head.forward
            if original is not None:
                self.head.forward = original  # type: ignore[method-assign]
            self._head_function = self._head_output = None
        self.logits_are_final = head_output is not None and (
            (logits.shape, logits.data_ptr()) == (head_output.shape, head_output.data_ptr())
        )
        return logits if self.logits_are_final else None

    def _call_head_function(self, hidden: Tensor) -> Tensor:
        assert self._head_function is not None
        self._head_output = self._head_function(hidden, self.head.weight, self.head.bias)
        return self._head_output


def default_chunk_tokens(vocab_size: int) -> int:
    """Return the default number of tokens whose logits exist at a time."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocab_size)


def loss_and_logit_gradients(logits_CV: Tensor, targets_C: Tensor, z_loss: float, needs_grad: bool) -> Tensor:
    """Return the summed loss in fp64; if `needs_grad`, overwrite the logits with their gradients."""
    total = torch.zeros((), dtype=torch.float64, device=logits_CV.device)
    tokens, vocab_size = logits_CV.shape
    # Blocks that fit into a CPU's cache: on larger ones these passes take as long as the matrix products.
    block = tokens if logits_CV.is_cuda else max(16, CACHED_LOGITS // vocab_size)
    for start in range(0, tokens, block):
        logits_NV, targets_N1 = logits_CV[start : start + block], targets_C[start : start + block, None]
        p_NV = F.softmax(logits_NV, dim=1, dtype=torch.float32)  # the only pass that computes exponentials
        max_N1, max_p_N1 = logits_NV.amax(1, keepdim=True).float(), p_NV.amax(1, keepdim=True)
        log_normalizer_N1 = max_N1 - max_p_N1.log()  # from the likeliest token, whose probability is never tiny
        nll_N1 = log_normalizer_N1 - logits_NV.gather(1, targets_N1).float()
        total += (nll_N1 + z_loss * log_normalizer_N1.square()).sum(dtype=torch.float64)
        if needs_grad:  # the gradient is the probabilities, minus 1 at the target
            if z_loss:
                p_NV *= 1 + 2 * z_loss * log_normalizer_N1
            logits_NV.copy_(p_NV.scatter_add_(1, targets_N1, torch.full_like(nll_N1, -1.0)))
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden_TD @ weight_VD.T (+ bias_V) against targets_T, summed, in chunks of `rows` tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, rows: int,
        z_loss: float, needs_grad: bool,
    ) -> Tensor:  # fmt: skip
        """Return the sum in fp32, accumulated in fp64, and keep the gradients if `needs_grad`."""
        grad_hidden, grad_weight, grad_bias = (needs_grad and needed for needed in ctx.needs_input_grad[:3])
        gradients = HeadGradients(hidden_TD, weight_VD, grad_hidden, grad_weight, grad_bias, len(targets_T) <= rows)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, max(1, len(targets_T)), rows):  # without a target the gradients are zeros, not missing
            hidden_CD, targets_C = hidden_TD[start : start + rows], targets_T[start : start + rows]
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
            total += loss_and_logit_gradients(logits_CV, targets_C, z_loss, needs_grad)
            if needs_grad:
                gradients.add(start, logits_CV, hidden_CD)
        ctx.gradients = gradients
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        gradients: HeadGradients = ctx.gradients
        ctx.gradients = None  # frees the memory now, not when the loss is freed
        tensors = (gradients.hidden, gradients.weight, gradients.bias)
        return (*(gradients.scaled(tensor, grad_outputs[0]) for tensor in tensors), *[None] * 4)


class HeadGradients:
    """The gradients of hidden states, weight and bias, accumulated over the chunks."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        grad_hidden: bool,
        grad_weight: bool,
        grad_bias: bool,
        is_single: bool,
    ) -> None:
        self._weight_VD: Tensor | None = weight_VD if grad_hidden else None
        self._grad_weight, self._grad_bias, self._is_single = grad_weight, grad_bias, is_single
        self._dtype = weight_VD.dtype
        self.hidden = torch.empty_like(hidden_TD) if grad_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, start: int, grad_logits_CV: Tensor, hidden_CD: Tensor) -> None:
        """Add the gradients of a chunk whose first token is `start`."""
        if self.hidden is not None and self._weight_VD is not None:
            torch.mm(grad_logits_CV, self._weight_VD, out=self.hidden[start : start + len(grad_logits_CV)])
        if self._grad_weight:
            weight_VD = grad_logits_CV.T @ hidden_CD
            if self.weight is not None:
                self.weight += weight_VD
            else:  # several chunks are accumulated in fp32: a sum in bf16 loses its small terms
                self.weight = weight_VD if self._is_single else weight_VD.float()
        if self._grad_bias:
            bias_V = grad_logits_CV.sum(0, dtype=torch.float32)
            self.bias = bias_V if self.bias is None else self.bias + bias_V

    def scaled(self, gradient: Tensor | None, factor: Tensor) -> Tensor | None:
        """Return a gradient times a scalar in fp32, in the weight's dtype."""
        if gradient is None:
            return None
        if gradient.is_cuda:
            gradient = gradient.float()  # on a GPU the scalar would be rounded to the gradient's dtype first
        return (gradient * factor).to(self._dtype)
