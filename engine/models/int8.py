"""Weights as 8-bit integers with a scale for each output; activations and sums stay floating-point numbers.

Each output's weights are divided by their largest over 127 and rounded to the nearest integer (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339, section 2.1, row-wise), so that no weight is off by more than half a step. They take a
quarter of the memory of fp32, half of that of bf16, and whatever writes for few waits for its weights to come from there.

Shapes: R rows, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

STEPS = 127  # on either side of zero
# Torch's kernel multiplies the integers as they lie, and each row by itself. For more rows than a few it is quicker to lay
# them out as floats first, and with fp32 activations for any (measured: a processor with AVX-512).
FEW_ROWS = 16
KERNEL = torch.bfloat16, torch.float16
GRAIN = 32  # inputs of which the kernel takes a multiple


class Int8Linear(nn.Module):
    """A linear layer, or the one that gives the logits."""

    weight: Tensor  # [O, I] int8
    scale: Tensor  # [O], in the activations' precision
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", bias_O)

    def forward(self, given: Tensor) -> Tensor:
        """Return [..., O] of [..., I]."""
        rows_RI = given.reshape(-1, self.in_features)
        found_RO: Tensor = torch.ops.manta.int8_product(rows_RI, self.weight, self.scale)
        if self.bias is not None:
            found_RO += self.bias
        return found_RO.view(*given.shape[:-1], self.out_features)


def _product(rows_RI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    few = rows_RI.device.type == "cpu" and rows_RI.dtype in KERNEL and len(rows_RI) <= FEW_ROWS
    if few and weight_OI.shape[1] % GRAIN == 0:
        return torch._weight_int8pack_mm(rows_RI.contiguous(), weight_OI, scale_O)
    return F.linear(rows_RI, weight_OI.to(rows_RI.dtype)) * scale_O


# One operation to torch's compiler, which would make a program for few rows and another for more.
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("int8_product(Tensor rows, Tensor weight, Tensor scale) -> Tensor")
_OPERATIONS.impl("int8_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("manta::int8_product", lib=_OPERATIONS)
def _shape_of_product(rows_RI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    return rows_RI.new_empty((len(rows_RI), len(weight_OI)))


class Int8Embedding(nn.Module):
    """A table of tokens; it may be the matrix that gives the logits too."""

    weight: Tensor  # [V, D] int8
    scale: Tensor  # [V]

    def __init__(self, weight_VD: Tensor, scale_V: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight_VD.shape
        self.register_buffer("weight", weight_VD)
        self.register_buffer("scale", scale_V)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., D] of [...] token ids."""
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][..., None]


def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return [O, I] int8 and the scales [O], in the weights' precision, whose product is nearest to the weights."""
    largest_O = weight_OI.float().abs().amax(1)
    scale_O = (largest_O / STEPS).to(weight_OI.dtype)  # rounded first: the integers make up for it
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    steps_OI = (weight_OI.float() / scale_O.float()[:, None]).round_().clamp_(-STEPS, STEPS)
    return steps_OI.to(torch.int8), scale_O


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Put 8-bit weights in place of a model's linear layers and its table of tokens, one after the other.

    Layers that share a matrix go on sharing it. What else there is (norms, biases, positions, convolutions) stays.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    layers = {path: layer for path, layer in model.named_modules(remove_duplicate=False) if is_linear(layer)}
    shared = {id(layer.weight) for layer in layers.values()} | {id(getattr(table, "weight", None))}
    layers |= {
        path: layer for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer) is nn.Embedding and id(layer.weight) in shared
    }  # fmt: skip
    matrices: dict[int, tuple[Tensor, Tensor]] = {}
    made: dict[int, nn.Module] = {}
    for path, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = _in_8_bits(layer, matrices)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made[id(layer)])


def is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is a plain matrix product; a class of its own may do more."""
    return type(layer) in (nn.Linear, Conv1D)


def _in_8_bits(layer: nn.Module, matrices: dict[int, tuple[Tensor, Tensor]]) -> nn.Module:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if id(weight) not in matrices:
        matrices[id(weight)] = rounded(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
    matrix, scale = matrices[id(weight)]
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(matrix, scale)
    bias = layer.bias
    return Int8Linear(matrix, scale, bias.detach() if isinstance(bias, Tensor) else None)


def is_quantized(model: nn.Module) -> bool:
    """Tell whether `quantize` was here."""
    return any(isinstance(layer, Int8Linear) for layer in model.modules())


def precision(layer: nn.Module) -> torch.dtype:
    """Return the precision of what goes into a linear layer."""
    weight: Tensor = layer.scale if isinstance(layer, Int8Linear) else layer.weight  # type: ignore[assignment]
    return weight.dtype


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
