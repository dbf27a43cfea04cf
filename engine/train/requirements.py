"""Checks options that need certain hardware or packages, before any resource is taken. Imports torch only where needed."""

from __future__ import annotations

from importlib.util import find_spec

from engine.config import Config
from engine.errors import UserError

FLASH = {"flash_attention_2": "flash_attn"}  # attention implementation -> the package that provides it


def check_machine(config: Config) -> None:
    """Raise UserError for an option that this machine does not support."""
    attention, package = config.model.attention, FLASH.get(config.model.attention)
    if package and find_spec(package) is None:
        raise UserError(
            f"model.attention={attention} needs the package {package}, which is not installed: use model.attention=sdpa"
        )
    if package and not has_gpu():
        raise UserError(
            f"model.attention={attention} runs on GPUs only, and this machine has none: use model.attention=sdpa"
        )
    if attention == "flex_attention" and not has_gpu():
        raise UserError(
            "model.attention=flex_attention trains on GPUs only, and this machine has none: use model.attention=sdpa"
        )
    quantized = [name for name, value in config.zero.options.items() if "quantized" in name and value]
    if quantized and not has_gpu():
        raise UserError(f"zero.options.{quantized[0]} needs a GPU, and this machine has none: leave it out")
    if config.train.precision == "fp16" and not has_fp16():
        raise UserError(
            "train.precision=fp16 needs a GPU, or a CPU with fp16, and this machine has neither: use train.precision=bf16"
        )


def has_gpu() -> bool:
    """Return whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def has_fp16() -> bool:
    """Return whether the GPU or CPU (AMX-FP16, AVX512-FP16) multiplies fp16 in hardware."""
    import torch

    return has_gpu() or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
