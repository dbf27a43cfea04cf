"""Runs a model of Llama's kind as one operation of `kernels`: llama, mistral, qwen2, qwen3 and others of the same structure."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.serve.llm.cpu.linear import PackedWeight

LINEAR_LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the same at each sequence length


class Decoder(Protocol):
    """`torch.classes.manta.Decoder`; `manta.begin`, in the same thread, has said where the tokens belong in the cache."""

    def run(self, ids: list[int], rows: list[int]) -> Tensor:
        """Run the tokens; return the logits of those at `rows`, [rows, V]."""


def make_decoder(model: Any) -> Decoder | None:
    """Return the operation for a model with packed weights; None: the model has another structure.

    Only names and options are compared here. What they don't show (the form of a norm, an extra factor) shows in the
    logits, which the caller compares with the model's own.
    """
    base = model.base_model
    rotary: Any = getattr(base, "rotary_emb", None)
    if (
        getattr(rotary, "rope_type", None) not in FIXED_ROPE_TYPES
        or getattr(model.config, "hidden_act", None) != "silu"
    ):
        return None
    modules = {name.rpartition(".")[0] for name in base.state_dict()}
    norms = NORMS + HEAD_NORMS * ("layers.0.self_attn.q_norm" in modules)
    layers = range(model.config.num_hidden_layers)
    expected = {f"layers.{i}.{name}" for i in layers for name in (*LINEAR_LAYERS, *norms)} | {"embed_tokens", "norm"}
    if modules != expected:
        return None
    linear_layers = [layer.get_submodule(name) for layer in base.layers for name in LINEAR_LAYERS] + [model.lm_head]
    weights: list[Any] = [getattr(layer, "packed", None) for layer in linear_layers]
    if not all(isinstance(weight, PackedWeight) for weight in weights):
        return None
    none = torch.empty(0)
    decoder: Decoder = torch.classes.manta.Decoder(
        [
            base.embed_tokens.weight.detach(), getattr(base.embed_tokens, "scale", none).float(), base.norm.weight.detach().float(),
            rotary.inv_freq.float(),
        ],
        [
            layer.get_submodule(name).weight.detach().float() if name in norms else none
            for layer in base.layers
            for name in NORMS + HEAD_NORMS
        ],
        [weight.number for weight in weights],
        model.config.rms_norm_eps,
        rotary.attention_scaling,
    )  # fmt: skip
    return decoder
