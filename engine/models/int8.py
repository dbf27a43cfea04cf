"""Weight-only int8 quantization with one scale per output channel; activations and sums stay in floating point.

The weights of an output channel are divided by their largest magnitude over 127 and rounded to the nearest integer (Dettmers
et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1, row-wise), so that the error of a weight is at most half a step. They
take a quarter of the memory of fp32 and half that of bf16; decoding a small batch is bound by reading its weights from memory.

Shapes: R rows, I input features and O output features of a layer, V vocabulary, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

INT8_MAX = 127
# torch's kernel multiplies the integers without conversion, and each row by itself. With more than a few rows, and with fp32
# activations always, it is faster to convert the weights to floats first (measured on a processor with AVX-512).
KERNEL_MAX_ROWS = 16
KERNEL_DTYPES = torch.bfloat16, torch.float16
KERNEL_INPUT_MULTIPLE = 32  # the kernel needs a multiple of so many input features


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; also the output embedding."""

    weight: Tensor  # [O, I] int8
    scale: Tensor  # [O], in the activations' dtype
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", bias_O)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        rows_RI = inputs.reshape(-1, self.in_features)
        outputs_RO: Tensor = torch.ops.manta.int8_matmul(rows_RI, self.weight, self.scale)
        if self.bias is not None:
            outputs_RO += self.bias
        return outputs_RO.view(*inputs.shape[:-1], self.out_features)


def _int8_matmul(rows_RI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    has_kernel = rows_RI.device.type == "cpu" and rows_RI.dtype in KERNEL_DTYPES and len(rows_RI) <= KERNEL_MAX_ROWS
    if has_kernel and weight_OI.shape[1] % KERNEL_INPUT_MULTIPLE == 0:
        return torch._weight_int8pack_mm(rows_RI.contiguous(), weight_OI, scale_O)
    return F.linear(rows_RI, weight_OI.to(rows_RI.dtype)) * scale_O


# One custom operator, or torch.compile would compile one program for few rows and another for more.
_LIBRARY = torch.library.Library("manta", "FRAGMENT")
_LIBRARY.define("int8_matmul(Tensor rows, Tensor weight, Tensor scale) -> Tensor")
_LIBRARY.impl("int8_matmul", _int8_matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("manta::int8_matmul", lib=_LIBRARY)
def _int8_matmul_fake(rows_RI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    return rows_RI.new_empty((rows_RI.shape[0], weight_OI.shape[0]))  # `len` would specialize on the number of rows


class Int8Embedding(nn.Module):
    """A token embedding with int8 weights; it may share its matrix with the output embedding."""

    weight: Tensor  # [V, D] int8
    scale: Tensor  # [V]

    def __init__(self, weight_VD: Tensor, scale_V: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight_VD.shape
        self.register_buffer("weight", weight_VD)
        self.register_buffer("scale", scale_V)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [...] to [..., D]."""
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][..., None]


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights [O, I] and scales [O], in the weights' dtype, whose product is nearest to the weights."""
    absmax_O = weight_OI.float().abs().amax(1)
    scale_O = (absmax_O / INT8_MAX).to(weight_OI.dtype)  # rounded before it divides: the integers absorb its error
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    int8_OI = (weight_OI.float() / scale_O.float()[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return int8_OI.to(torch.int8), scale_O


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Replace a model's linear layers and its tied token embedding by int8 ones, one at a time to save memory.

    Layers that share a matrix keep sharing it. Norms, biases, positions and convolutions are not quantized.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    layers = {path: layer for path, layer in model.named_modules(remove_duplicate=False) if is_linear(layer)}
    quantized_weights = {id(layer.weight) for layer in layers.values()} | {id(getattr(embedding, "weight", None))}
    layers |= {
        path: layer for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer) is nn.Embedding and id(layer.weight) in quantized_weights
    }  # fmt: skip
    int8_weights: dict[int, tuple[Tensor, Tensor]] = {}
    int8_layers: dict[int, nn.Module] = {}
    for path, layer in layers.items():
        if id(layer) not in int8_layers:
            int8_layers[id(layer)] = _quantize_layer(layer, int8_weights)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, int8_layers[id(layer)])


def is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is exactly a linear layer; a subclass may compute something else."""
    return type(layer) in (nn.Linear, Conv1D)


def _quantize_layer(layer: nn.Module, int8_weights: dict[int, tuple[Tensor, Tensor]]) -> nn.Module:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if id(weight) not in int8_weights:
        int8_weights[id(weight)] = quantize_weight(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
    int8_weight, scale = int8_weights[id(weight)]
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(int8_weight, scale)
    bias = layer.bias
    return Int8Linear(int8_weight, scale, bias.detach() if isinstance(bias, Tensor) else None)


def is_quantized(model: nn.Module) -> bool:
    """Tell whether a model has int8 layers."""
    return any(isinstance(layer, Int8Linear) for layer in model.modules())


def input_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of the inputs of a linear layer."""
    weight: Tensor = layer.scale if isinstance(layer, Int8Linear) else layer.weight  # type: ignore[assignment]
    return weight.dtype


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, counting shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
