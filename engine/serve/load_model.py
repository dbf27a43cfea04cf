"""Loads a bundle's model for serving: verified, in its precision, on its device, with packed weights."""

from __future__ import annotations

import torch
from torch import nn

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.models.int8 import quantize
from engine.serve.llm.cpu.linear import pack_linear

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(bundle: Bundle, options: ServeConfig) -> nn.Module:
    """Return a bundle's model on its device. Raises UserError if it was changed, or its outputs differ from the recorded ones.

    8-bit weights are made from weights that were verified and replayed, and are then replayed again.
    """
    bundle.verify()
    has_bf16, is_int8 = torch.cuda.is_available() or _cpu_has_bf16(), options.quantize == "int8"
    dtype = PRECISIONS[options.precision]
    if options.precision == "auto" and is_int8 and has_bf16:
        dtype = torch.bfloat16
    model = bundle.model(dtype)
    if options.precision == "auto" and not has_bf16:
        model = model.float()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if is_int8:
        bundle.replay(model)
        quantize(model)
    pack_linear(model)
    bundle.replay(model)
    return model


def dtype_for(bundle: Bundle, options: ServeConfig) -> torch.dtype:
    """Return the precision in which vLLM runs a bundle."""
    has_bf16 = torch.cuda.is_available() or _cpu_has_bf16()
    return PRECISIONS[options.precision] or (bundle.saved_dtype() if has_bf16 else torch.float32)


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
