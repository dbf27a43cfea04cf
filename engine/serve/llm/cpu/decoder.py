"""A model of Llama's kind as one operation of `kernels`, where it is one: llama, mistral, qwen2, qwen3 and their like."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.serve.llm.cpu.linear import PackedWeight

PRODUCTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the same at each length


class Decoder(Protocol):
    """`torch.classes.manta.Decoder`, to whose thread `manta.begin` has told where a step's tokens belong."""

    def run(self, ids: list[int], wanted: list[int]) -> Tensor:
        """Return the logits [rows, V] of the wanted ones of the tokens."""


def make_decoder(model: Any) -> Decoder | None:
    """Return the operation for a model with packed weights; None: it is of another kind.

    What its names don't tell (a norm's form, a factor somewhere), its logits do: whoever runs it compares them.
    """
    base = model.base_model
    rotary: Any = getattr(base, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in FIXED_ROTATIONS or getattr(model.config, "hidden_act", None) != "silu":
        return None
    theirs = {name.rpartition(".")[0] for name in base.state_dict()}
    norms = NORMS + HEAD_NORMS * ("layers.0.self_attn.q_norm" in theirs)
    layers = range(model.config.num_hidden_layers)
    if theirs != {f"layers.{i}.{part}" for i in layers for part in (*PRODUCTS, *norms)} | {"embed_tokens", "norm"}:
        return None
    products = [layer.get_submodule(part) for layer in base.layers for part in PRODUCTS] + [model.lm_head]
    packed: list[Any] = [getattr(product, "packed", None) for product in products]
    if not all(isinstance(it, PackedWeight) for it in packed):
        return None
    none = torch.empty(0)
    made: Decoder = torch.classes.manta.Decoder(
        [
            base.embed_tokens.weight.detach(), getattr(base.embed_tokens, "scale", none).float(), base.norm.weight.detach().float(),
            rotary.inv_freq.float(),
        ],
        [layer.get_submodule(it).weight.detach().float() if it in norms else none for layer in base.layers for it in NORMS + HEAD_NORMS],
        [it.number for it in packed],
        model.config.rms_norm_eps,
        rotary.attention_scaling,
    )  # fmt: skip
    return made
