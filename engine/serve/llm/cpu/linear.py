"""A model's linear layers with weights laid out for the few rows of a step, on a processor.

`F.linear` hands fp32 products to MKL, which on AMD's processors takes two to four times as long as oneDNN for the 4 to
256 rows of a step; and oneDNN reads a weight quickest when it lies in blocks of its own order, made once. In fp32, and
with weights in 8 bits, `kernels` has products of its own: for one row in a quarter of oneDNN's time, for sixteen in two
thirds of it. Torch's compiler can't hold such a weight: to it a product is one operation, which knows its weight by a number.
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

ROWS = 16  # oneDNN's blocks are chosen for so many rows
SMALL_BYTES = 2**20  # a weight up to here is kept for oneDNN as it was, too: for one row, its call costs more


def pack_linear(model: nn.Module) -> nn.Module:
    """Give a model's linear layers their packed weights, and return it; it can only be asked then, not trained or saved.

    What was packed has a weight on the meta device, unless it is kept as it was too, or another module uses it (a tied
    embedding). On a GPU, and in other precisions than fp32, bf16 and 8 bits, nothing changes.
    """
    modules = list(model.modules())
    users = Counter(id(it) for module in modules for it in (*module._parameters.values(), *module._buffers.values()))
    for layer in modules:
        packed = _packed(layer)
        if packed is None:
            continue
        layer.packed = layer.forward = packed  # type: ignore[assignment,method-assign]
        if packed.small_OI is None and users[id(layer.weight)] == 1:
            there: Tensor = layer.weight.detach().to("meta")  # type: ignore[union-attr,operator]
            layer.weight = there if isinstance(layer, Int8Linear) else nn.Parameter(there, requires_grad=False)
    return model


def _packed(layer: nn.Module) -> PackedWeight | None:
    """Return a layer's packed weight; None where it has none."""
    if isinstance(layer, Int8Linear):
        on_cpu = layer.weight.device.type == "cpu" and kernels.load()
        return PackedWeight(layer.weight, layer.bias, layer.scale) if on_cpu else None
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu":
        return None
    if layer.weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return None
    weight_OI = (layer.weight if type(layer) is nn.Linear else layer.weight.T).detach()
    return PackedWeight(weight_OI, layer.bias)  # type: ignore[arg-type]


class PackedWeight:
    """What a layer multiplies by."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None = None) -> None:
        """Lay out a weight in fp32 or bf16, or one in 8 bits with its scales, for which `kernels` must be there."""
        self.number, self.outputs, self.bias_O = next(_NUMBERS), len(weight_OI), bias_O
        in_kernels = kernels.load()
        own = in_kernels and weight_OI.dtype != torch.bfloat16  # laid out by `kernels`, not for oneDNN
        self.small_OI = weight_OI if weight_OI.nbytes <= SMALL_BYTES and not own else None
        if own:
            self.weight = torch.ops.manta.pack(weight_OI)
            bias_O, scale_O = (None if it is None else it.detach().float() for it in (bias_O, scale_O))
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS)
        if in_kernels:
            torch.ops.manta.hold(self.number, self.weight, bias_O, self.small_OI, scale_O, self.outputs)
            weakref.finalize(self, torch.ops.manta.release, self.number)
        else:
            _BY_NUMBER[self.number] = self

    def __call__(self, given: Tensor) -> Tensor:
        """Return `given`, [..., I], times the weight, plus the bias: [..., O]."""
        product: Tensor = torch.ops.manta.linear(given, self.number, self.outputs)
        return product

    def by_onednn(self, given: Tensor) -> Tensor:
        """Return the same where there is no C++."""
        if self.small_OI is not None and given.numel() == given.shape[-1]:
            return F.linear(given, self.small_OI, self.bias_O)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(given, self.weight, self.bias_O, "none", [], "")
        return product


_NUMBERS = itertools.count()
_BY_NUMBER: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("linear(Tensor given, int number, int outputs) -> Tensor")
_OPERATIONS.impl("linear", lambda given, number, _: _BY_NUMBER[number].by_onednn(given), "CompositeExplicitAutograd")


@torch.library.register_fake("manta::linear", lib=_OPERATIONS)
def _shape_of_linear(given: Tensor, number: int, outputs: int) -> Tensor:
    return given.new_empty((*given.shape[:-1], outputs))
