"""A model's linear layers with weights laid out as oneDNN multiplies them, on a processor.

`F.linear` hands fp32 products to MKL, which on AMD's processors takes two to four times as long as oneDNN for the 4 to
256 rows of a step; and oneDNN reads a weight quickest when it lies in blocks of its own order, made once. Torch's compiler
can't hold such a weight: to it a product is one operation, which knows its weight by a number.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS = 16  # the blocks are chosen for so many rows
SMALL_BYTES = 2**20  # a weight up to here is kept as it was too: for one row, the call costs more than the product


def pack_linear(model: nn.Module) -> nn.Module:
    """Give a model's linear layers their packed weights, and return it; it can only be asked then, not trained or saved.

    What was packed has a weight on the meta device, unless another module uses it too (a tied embedding). On a GPU, and
    in other precisions than fp32 and bf16, nothing changes.
    """
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for layer in model.modules():
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu":
            continue
        if layer.weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
            continue
        weight_OI = (layer.weight if type(layer) is nn.Linear else layer.weight.T).detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS)
        small = weight_OI.nbytes <= SMALL_BYTES
        layer.packed = Packed(packed, layer.bias, weight_OI if small else None)  # type: ignore[arg-type,assignment]
        layer.number, layer.outputs = layer.packed.number, len(weight_OI)  # type: ignore[assignment,union-attr]
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
        if not small and users[id(layer.weight)] == 1:
            layer.weight = nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
    return model


def hand_over(model: nn.Module) -> None:
    """Let the operations of `kernels`, which are loaded, know a model's packed weights for as long as these are in use."""
    for layer in model.modules():
        if isinstance(packed := getattr(layer, "packed", None), Packed) and packed.number not in _HANDED_OVER:
            torch.ops.manta.hold(packed.number, packed.weight, packed.bias_O, packed.small_OI)
            _HANDED_OVER.add(packed.number)
            weakref.finalize(packed, _take_back, packed.number)


def _take_back(number: int) -> None:
    torch.ops.manta.release(number)
    _HANDED_OVER.discard(number)


class Packed:
    """What a layer multiplies by."""

    def __init__(self, weight: Tensor, bias_O: Tensor | None, small_OI: Tensor | None) -> None:
        self.weight, self.bias_O, self.small_OI = weight, bias_O, small_OI
        self.number = next(_NUMBERS)
        _BY_NUMBER[self.number] = self

    def __call__(self, given: Tensor) -> Tensor:
        """Return `given`, [..., I], times the weight, plus the bias: [..., O]."""
        if self.small_OI is not None and given.numel() == given.shape[-1]:
            return F.linear(given, self.small_OI, self.bias_O)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(given, self.weight, self.bias_O, "none", [], "")
        return product


_NUMBERS = itertools.count()
_HANDED_OVER: set[int] = set()
_BY_NUMBER: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_OPERATIONS = torch.library.Library("manta", "FRAGMENT")
_OPERATIONS.define("linear(Tensor given, int number, int outputs) -> Tensor")
_OPERATIONS.impl("linear", lambda given, number, _: _BY_NUMBER[number](given), "CompositeExplicitAutograd")


@torch.library.register_fake("manta::linear", lib=_OPERATIONS)
def _shape_of_linear(given: Tensor, number: int, outputs: int) -> Tensor:
    return given.new_empty((*given.shape[:-1], outputs))


def _linear(layer: nn.Module, given: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.manta.linear(given, layer.number, layer.outputs)
        return product
    return layer.packed(given)  # type: ignore[operator,no-any-return]
