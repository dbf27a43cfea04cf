"""Packs a model's linear layers for the few rows of a step, on a CPU.

`F.linear` passes fp32 products to MKL, which on AMD's CPUs takes two to four times as long as oneDNN for the 4 to 256
rows of a step; and oneDNN reads a weight fastest in blocks of its own layout, made once. For fp32 and 8-bit weights,
`kernels` has products of its own: for one row they take a quarter of oneDNN's time, for sixteen two thirds of it. Torch's
compiler can't hold such a weight: to it a product is one operation, which finds its weight by a number.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.models.int8 import Int8Linear
from engine.serve.llm.cpu import kernels

ROWS = 16  # for which oneDNN chooses its blocks
SMALL_BYTES = 2**20  # up to this size a weight is also kept as it was, for one row, where calling oneDNN costs more


def pack_linear(model: nn.Module) -> nn.Module:
    """Give a model's linear layers packed weights, and return it; it can then only run, not be trained or saved.

    A layer that was packed has its weight on the meta device, unless it is also kept as it was, or another module uses it
    (a tied embedding). On a GPU, and in other precisions than fp32, bf16 and 8 bits, nothing changes.
    """
    modules = list(model.modules())
    num_users = Counter(
        id(tensor) for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())
    )
    for layer in modules:
        packed = _pack(layer)
        if packed is None:
            continue
        layer.packed = layer.forward = packed  # type: ignore[assignment,method-assign]
        if packed.small_OI is None and num_users[id(layer.weight)] == 1:
            weight: Tensor = layer.weight.detach().to("meta")  # type: ignore[union-attr,operator]
            layer.weight = weight if isinstance(layer, Int8Linear) else nn.Parameter(weight, requires_grad=False)
    return model


def is_packable(dtype: torch.dtype) -> bool:
    """Return whether weights of this dtype can be packed on this machine: oneDNN's bf16 products need more than AVX2."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(layer: nn.Module) -> PackedWeight | None:
    """Return a layer's packed weight; None for one that isn't packed."""
    if isinstance(layer, Int8Linear):
        has_kernels = layer.weight.device.type == "cpu" and kernels.load()
        return PackedWeight(layer.weight, layer.bias, layer.scale) if has_kernels else None
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu":
        return None
    if not is_packable(layer.weight.dtype):
        return None
    weight_OI = (layer.weight if type(layer) is nn.Linear else layer.weight.T).detach()
    return PackedWeight(weight_OI, layer.bias)  # type: ignore[arg-type]


class PackedWeight:
    """A linear layer's weight in the layout of `kernels` or oneDNN; called, it is the layer's forward."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None = None) -> None:
        """Pack a weight in fp32 or bf16, or one in 8 bits with its scales, which needs `kernels`."""
        self.number, self.outputs, self.bias_O = next(_NUMBERS), len(weight_OI), bias_O
        has_kernels = kernels.load()
        is_kernel_layout = has_kernels and weight_OI.dtype != torch.bfloat16  # else oneDNN's
        self.small_OI = weight_OI if weight_OI.nbytes <= SMALL_BYTES and not is_kernel_layout else None
        if is_kernel_layout:
            self.weight = torch.ops.manta.pack(weight_OI)
            bias_O, scale_O = (None if tensor is None else tensor.detach().float() for tensor in (bias_O, scale_O))
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS)
        if has_kernels:
            torch.ops.manta.hold(self.number, self.weight, bias_O, self.small_OI, scale_O, self.outputs)
            weakref.finalize(self, torch.ops.manta.release, self.number)
        else:
            _WEIGHTS[self.number] = self

    def __call__(self, given: Tensor) -> Tensor:
        """Return `given`, [..., I], times the weight, plus the bias: [..., O]."""
        product: Tensor = torch.ops.manta.linear(given, self.number, self.outputs)
        return product

    def onednn_linear(self, given: Tensor) -> Tensor:
        """Return the same by oneDNN, where the C++ operations are missing."""
        if self.small_OI is not None and given.numel() == given.shape[-1]:
            return F.linear(given, self.small_OI, self.bias_O)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(given, self.weight, self.bias_O, "none", [], "")
        return product


_NUMBERS = itertools.count()
_WEIGHTS: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()  # by number
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("linear(Tensor given, int number, int outputs) -> Tensor")
_OPERATIONS.impl("linear", lambda given, number, _: _WEIGHTS[number].onednn_linear(given), "CompositeExplicitAutograd")


@torch.library.register_fake("manta::linear", lib=_OPERATIONS)
def _linear_shape(given: Tensor, number: int, outputs: int) -> Tensor:
    return given.new_empty((*given.shape[:-1], outputs))
