"""Optimizers over parameter groups: AdamW for all parameters, or Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from engine.config import OptimConfig
from engine.errors import UserError

MOMENTS = {False: ("exp_avg", "exp_avg_sq"), True: ("momentum_buffer",)}  # by whether Muon updates the parameter
# Coefficients of the quintic iteration that brings all singular values close to 1: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class MatrixSlice:
    """A matrix's slice of this rank's flat tensor: `numel` elements at `offset` are the matrix's elements from `start`."""

    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by their options: weight decay applies to matrices, not to vectors (biases, norms).

    The first pattern of optim.groups that matches a parameter's name overrides options. Raises UserError for a pattern
    that matches none.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is not None:
        embeddings |= {id(p) for p in head.parameters()}
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    matched = set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        pattern = next((pattern for pattern in optim.groups if re.search(pattern, name)), None)
        matched.add(pattern)
        overrides = optim.groups[pattern] if pattern is not None else {}
        decay = overrides.get("weight_decay", optim.weight_decay if p.ndim >= 2 else 0.0)
        muon = optim.name == "muon" and p.ndim == 2 and id(p) not in embeddings
        groups.setdefault((p.ndim < 2, muon, decay, overrides.get("lr", 1.0)), []).append(p)
    for pattern in optim.groups:
        if pattern not in matched:
            names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise UserError(f"optim.groups: '{pattern}' matches no trained parameter; names are like {names}")
    return [
        {"params": groups[key], "muon": key[1], "weight_decay": float(key[2]), "lr_factor": float(key[3])}
        for key in sorted(groups)
    ]


def make_optimizer(model: nn.Module, optim: OptimConfig, dtype: torch.dtype) -> Optimizer:
    """Create the optimizer of optim.name; `dtype` is the precision of Muon's matrix products."""
    groups = parameter_groups(model, optim)
    betas = (optim.beta1, optim.beta2)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    return Muon(groups, lr=optim.lr, momentum=optim.momentum, betas=betas, eps=optim.eps, dtype=dtype)


class Muon(Optimizer):
    """Orthogonalized momentum for matrices; AdamW for embeddings, output head and vectors.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. A matrix's update is scaled to the size of AdamW's, so
    that both share a learning rate: Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2. Where a matrix is
    sharded, every rank assembles the full matrix and orthogonalizes it: all get the same result.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, betas: tuple[float, float], eps: float,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """`groups`: each has a flag "muon"; `dtype`: precision of the orthogonalization."""
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self.dtype = dtype
        self.matrix_slices: Callable[[Tensor], list[MatrixSlice]] = whole_matrix  # of the matrices in a flat tensor
        self.all_reduce: Callable[[Tensor], Tensor] = lambda full: full  # sums a tensor over the ranks
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=lr, betas=betas, eps=eps, fused=True)
        self._adamw.state = self.state
        for group in self.param_groups:
            if not group["muon"]:
                group.update({key: value for key, value in self._adamw.param_groups[0].items() if key not in group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._step_matrices(p, group)

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        momentum, gradient = state["momentum_buffer"], flat.grad
        assert gradient is not None
        momentum.mul_(group["momentum"]).add_(gradient)
        nesterov = gradient.add(momentum, alpha=group["momentum"]).view(-1)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for piece in self.matrix_slices(flat):
            full = torch.zeros(piece.shape, dtype=torch.float32, device=flat.device)
            full.view(-1)[piece.start : piece.start + piece.numel] = nesterov[piece.offset : piece.offset + piece.numel]
            update = orthogonalize(self.all_reduce(full), self.dtype).view(-1)
            scale = 0.2 * max(piece.shape) ** 0.5
            flat.view(-1)[piece.offset : piece.offset + piece.numel].add_(
                update[piece.start : piece.start + piece.numel].float(), alpha=-group["lr"] * scale
            )


def whole_matrix(matrix: Tensor) -> list[MatrixSlice]:
    """Return the single slice of a matrix that is not sharded."""
    return [MatrixSlice(tuple(matrix.shape), 0, 0, matrix.numel())]


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix with all singular values brought close to 1, by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    x = x.T if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).contiguous()
