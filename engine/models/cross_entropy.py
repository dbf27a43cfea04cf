"""The cross-entropy over a vocabulary without the logits of the whole batch: only those of some tokens at a time are held.

The output embedding itself gives the loss: its `forward` is another one while a loss is asked for, so that whatever hangs
on that module (ZeRO-3's hooks gather its weight) works as ever. The gradients of hidden states and weight are computed
chunk by chunk in the forward pass, when the logits are at hand; the backward pass only scales them.

Shapes: B batch, L length, T tokens, C tokens of a chunk, N of a block in it, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that isn't one, as in torch
CACHED_LOGITS = 2**18  # on a processor, in fp32: a megabyte
# In a chunk, unless told otherwise: matrices of fewer tokens are multiplied slowly.
CHUNK_LOGITS, CHUNK_TOKENS = 2**25, 1024


def summed_cross_entropy(
    model: Any, inputs: dict[str, Any], targets: Tensor, count: int, z_loss: float = 0.0, chunk: int | None = None
) -> Tensor:
    """Run the model and return the cross-entropy in nats, summed over the targets that aren't IGNORED: a scalar in fp32.

    `count` is how many these are. `chunk` is how many tokens' logits are held at a time: None chooses, 0 is all. `z_loss`
    times the square of each token's log-normalizer is added (Chowdhery et al. 2022, PaLM, section 5: 1e-4).
    """

    def give(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden_TD, targets_T = hidden.flatten(0, -2), targets.flatten()
        if count < len(targets_T):
            chosen_T = torch.nonzero_static(targets_T != IGNORED, size=count)[:, 0]
            hidden_TD, targets_T = hidden_TD[chosen_T], targets_T[chosen_T]
        rows = chunk or chunk_rows(weight.shape[0])
        graded = torch.is_grad_enabled()
        total: Tensor = ChunkedCrossEntropy.apply(hidden_TD, weight, bias, targets_T, rows, z_loss, graded)
        return total.view(1, 1, 1)  # as many dimensions as a model expects of logits

    if chunk != 0 and (found := ask(model, inputs, give)) is not None:
        return found.view(())
    logits_TV = model(**inputs).logits.flatten(0, -2).float()
    total = F.cross_entropy(logits_TV, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if z_loss:
        total = total + z_loss * (logits_TV[targets.flatten() != IGNORED].logsumexp(1) ** 2).sum()
    return total


@torch.no_grad()
def token_scores(
    model: Any, inputs: dict[str, Any], targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the model and return, for each target, its negative log-likelihood in nats and whether it was the likeliest.

    Both have the targets' shape; an IGNORED target has 0 and False.
    """

    def give(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden_TD, targets_T = hidden.flatten(0, -2), targets.flatten()
        scores_T2 = torch.zeros(len(targets_T), 2, device=hidden.device)
        for part in (targets_T != IGNORED).nonzero()[:, 0].split(chunk or chunk_rows(weight.shape[0])):
            logits_CV = F.linear(hidden_TD[part], weight, bias).float()
            scores_T2[part, 0] = F.cross_entropy(logits_CV, targets_T[part], reduction="none")
            scores_T2[part, 1] = (logits_CV.argmax(1) == targets_T[part]).float()
        return scores_T2.view(*targets.shape, 2)

    if chunk != 0 and (found := ask(model, inputs, give)) is not None:
        return found[..., 0], found[..., 1] > 0
    logits = model(**inputs).logits.float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets.shape), logits.argmax(-1) == targets


Give = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # from hidden states, weight and bias to what is asked for


def ask(model: Any, inputs: dict[str, Any], give: Give) -> Tensor | None:
    """Run the model with an output embedding that gives something else than logits, and return that.

    None for a model without such a linear layer, and for one that does something to its logits (Gemma 2 squashes them).
    """
    module = getattr(model, "module", model)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return None
    if (desk := getattr(head, "desk", None)) is None:
        desk = head.desk = Desk(head)  # type: ignore[assignment]
    return desk.ask(model, inputs, give)


class Desk:
    """Stands at an output embedding and gives what is asked for."""

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.logits_are_final = head, True
        self._give: Give | None = None
        self._given: Tensor | None = None
        # Always the same function, or a compiled model starts over.
        self._forward = torch.compiler.disable(self._answer)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model gets a desk of its own when it is asked

    def ask(self, model: Any, inputs: dict[str, Any], give: Give) -> Tensor | None:
        """Run the model, and return what `give` gave, unless the model took that for logits and changed it."""
        if not self.logits_are_final:
            return None
        own = self.head.__dict__.get("forward")
        self._give, self.head.forward = give, self._forward  # type: ignore[method-assign]
        try:
            found: Tensor = model(**inputs).logits
            given = self._given
        finally:
            del self.head.forward
            if own is not None:
                self.head.forward = own  # type: ignore[method-assign]
            self._give = self._given = None
        self.logits_are_final = given is not None and (found.shape, found.data_ptr()) == (given.shape, given.data_ptr())
        return found if self.logits_are_final else None

    def _answer(self, hidden: Tensor) -> Tensor:
        assert self._give is not None
        self._given = self._give(hidden, self.head.weight, self.head.bias)
        return self._given


def chunk_rows(vocabulary: int) -> int:
    """Return how many tokens' logits are worth holding at a time."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)


def losses_and_slopes(logits_CV: Tensor, targets_C: Tensor, z_loss: float, graded: bool) -> Tensor:
    """Return the summed loss in fp64; if `graded`, put its derivative by the logits in their place."""
    total = torch.zeros((), dtype=torch.float64, device=logits_CV.device)
    tokens, vocabulary = logits_CV.shape
    # A processor works on what its cache holds: beyond that these passes take as long as the matrix products.
    block = tokens if logits_CV.is_cuda else max(16, CACHED_LOGITS // vocabulary)
    for start in range(0, tokens, block):
        logits_NV, targets_N1 = logits_CV[start : start + block], targets_C[start : start + block, None]
        p_NV = F.softmax(logits_NV, dim=1, dtype=torch.float32)  # each exponential is taken once
        top_N1, top_p_N1 = logits_NV.amax(1, keepdim=True).float(), p_NV.amax(1, keepdim=True)
        normalizer_N1 = top_N1 - top_p_N1.log()  # of the likeliest token, whose probability is never small
        nll_N1 = normalizer_N1 - logits_NV.gather(1, targets_N1).float()
        total += (nll_N1 + z_loss * normalizer_N1.square()).sum(dtype=torch.float64)
        if graded:  # the slopes are the probabilities, less 1 at the target
            if z_loss:
                p_NV *= 1 + 2 * z_loss * normalizer_N1
            logits_NV.copy_(p_NV.scatter_add_(1, targets_N1, torch.full_like(nll_N1, -1.0)))
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden_TD @ weight_VD.T (+ bias_V) against targets_T, summed, in chunks of `rows` tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, rows: int,
        z_loss: float, graded: bool,
    ) -> Tensor:  # fmt: skip
        """Return the sum in fp32, added up in fp64, and keep the gradients if `graded`."""
        of_hidden, of_weight, of_bias = (graded and needed for needed in ctx.needs_input_grad[:3])
        gradients = Gradients(hidden_TD, weight_VD, of_hidden, of_weight, of_bias, single=len(targets_T) <= rows)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, max(1, len(targets_T)), rows):  # without a target there are gradients too: zeros
            hidden_CD, targets_C = hidden_TD[start : start + rows], targets_T[start : start + rows]
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
            total += losses_and_slopes(logits_CV, targets_C, z_loss, graded)
            if graded:
                gradients.add(start, logits_CV, hidden_CD)
        ctx.gradients = gradients
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass has found."""
        found: Gradients = ctx.gradients
        ctx.gradients = None  # freed now, and not with the loss
        return (*(found.scaled(part, outer[0]) for part in (found.hidden, found.weight, found.bias)), *[None] * 4)


class Gradients:
    """The gradients of hidden states, weight and bias, as the chunks add to them."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool, single: bool
    ) -> None:
        self._weight_VD: Tensor | None = weight_VD if of_hidden else None
        self._of_weight, self._of_bias, self._single, self._dtype = of_weight, of_bias, single, weight_VD.dtype
        self.hidden = torch.empty_like(hidden_TD) if of_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, start: int, slope_CV: Tensor, hidden_CD: Tensor) -> None:
        """Add a chunk, the first of whose tokens is `start`."""
        if self.hidden is not None and self._weight_VD is not None:
            torch.mm(slope_CV, self._weight_VD, out=self.hidden[start : start + len(slope_CV)])
        if self._of_weight:
            part_VD = slope_CV.T @ hidden_CD
            if self.weight is not None:
                self.weight += part_VD
            else:  # several chunks add up in fp32: in bf16 a sum loses its small parts
                self.weight = part_VD if self._single else part_VD.float()
        if self._of_bias:
            part_V = slope_CV.sum(0, dtype=torch.float32)
            self.bias = part_V if self.bias is None else self.bias + part_V

    def scaled(self, gradient: Tensor | None, factor: Tensor) -> Tensor | None:
        """Return a gradient times a scalar in fp32, in the weight's type."""
        if gradient is None:
            return None
        if gradient.is_cuda:
            gradient = gradient.float()  # a scalar there would be rounded to the other's type first
        return (gradient * factor).to(self._dtype)
