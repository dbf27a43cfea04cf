"""The options of the model and of the objective."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Optional

from engine.config.option import Frozen, option, option_group
from engine.errors import UserError


@dataclass
class ModelConfig(Frozen):
    """An architecture of transformers, or dit of diffusers, in transformers' own names. None leaves the architecture's default."""

    type: str = option(
        "llama", "model type of transformers (llama, gpt2, bert, t5, vit, clip, whisper, ...), or dit of diffusers"
    )
    hidden_size: Optional[int] = option(None, "width of the residual stream", least=1)
    num_hidden_layers: Optional[int] = option(None, "number of transformer blocks", least=1)
    num_attention_heads: Optional[int] = option(None, "number of attention heads; must divide hidden_size", least=1)
    num_key_value_heads: Optional[int] = option(
        None, "number of key/value heads (grouped-query attention); must divide num_attention_heads", least=1
    )
    intermediate_size: Optional[int] = option(None, "width of the MLP", least=1)
    max_position_embeddings: Optional[int] = option(None, "maximum sequence length, in tokens", least=1)
    tie_word_embeddings: Optional[bool] = option(None, "share the input and output embeddings")
    vocab_size: Optional[int] = option(None, "vocabulary size, in tokens; None: the tokenizer's", least=2)
    dropout: float = option(
        0.0,
        "dropout probability, everywhere in the model; the loss is independent of the layout (workers, ZeRO stage) only at 0",
        least=0, most=0.9, start_weights=False,
    )  # fmt: skip
    options: dict[str, Any] = option({}, "any other field of the architecture's config, by its own name")
    attention: str = option(
        "sdpa",
        "attention implementation: PyTorch's, or flash_attention_2, which needs the package flash-attn",
        choices=("sdpa", "eager", "flex_attention", "flash_attention_2"),
        start_weights=False,
    )

    def check(self) -> None:
        """Check that the heads divide the width."""
        if self.hidden_size and self.num_attention_heads and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} cannot be divided among model.num_attention_heads "
                f"{self.num_attention_heads}: use a multiple of {self.num_attention_heads}"
            )
        if self.num_key_value_heads and self.num_attention_heads and self.num_attention_heads % self.num_key_value_heads:  # fmt: skip
            raise UserError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of model.num_key_value_heads "
                f"{self.num_key_value_heads}: use a divisor of {self.num_attention_heads}"
            )


@dataclass
class LoraConfig(Frozen):
    """Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): `pip install 'manta-train[lora]'`."""

    rank: int = option(
        0, "finetune: rank of the adapters trained beside each frozen weight of the blocks; 0: no LoRA", least=0
    )
    alpha: Optional[float] = option(
        None, "scaling: the adapters' output is multiplied by alpha / rank; None: twice the rank", above=0
    )
    dropout: float = option(0.0, "dropout probability of the adapters' inputs", least=0, most=0.9)
    targets: list[str] = option(
        [], "linear layers of the blocks that get adapters, by the ends of their names: [q_proj,v_proj]; []: all "
        "(Dettmers et al. 2023, QLoRA: all are needed to match full fine-tuning)",
    )  # fmt: skip


def _objective_names() -> str:
    """List the objectives: a file in conf/objective each, as in engine/objectives (importing those takes seconds)."""
    return ", ".join(sorted(f.name[:-5] for f in (files("conf") / "objective").iterdir() if f.name.endswith(".yaml")))


@dataclass
class ObjectiveConfig(Frozen):
    """The task that a model is trained for. Each is one file in engine/objectives/."""

    name: str = option("causal_lm", f"file in engine/objectives/: {_objective_names()}", start_weights=True)
    frozen_layers: int = option(
        0, "freeze the embeddings and this many of the first blocks; 0: everything is trained", least=0
    )
    lora: LoraConfig = option_group(LoraConfig)
    mask_rate: float = option(
        0.15, "masked_lm: fraction of the tokens that are predicted (Devlin et al. 2019)", above=0, most=0.9
    )
    noise_density: float = option(
        0.15, "span_corruption: fraction of the tokens that are corrupted (Raffel et al. 2020)", above=0, most=0.9
    )
    mean_span: float = option(
        3.0, "span_corruption: mean length of a corrupted span, in tokens (Raffel et al. 2020)", least=1
    )
    noise_steps: int = option(1000, "diffusion: timesteps from an image to pure noise (Ho et al. 2020)", least=2)
    noise_schedule: str = option(
        "linear", "diffusion: how the noise grows over the timesteps: linear (Ho et al. 2020), or squared cosine (Nichol & Dhariwal 2021)",
        choices=("linear", "squaredcos_cap_v2"),
    )  # fmt: skip
    label_dropout: float = option(
        0.1, "diffusion: fraction of the samples trained without their label, for classifier-free guidance (Ho & Salimans 2022)", least=0, most=0.9
    )  # fmt: skip
    sampling_steps: int = option(
        25, "diffusion: denoising steps for an image (Song et al. 2020, DDIM); at most noise_steps", least=1
    )
    guidance: float = option(
        1.5, "diffusion: classifier-free guidance scale; 1: no guidance, at half the computation "
        "(Peebles & Xie 2023: 1.5 for the best FID, 4 for single images)", least=1, most=20,
    )  # fmt: skip
    images_together: int = option(
        4, "diffusion: images in a forward pass, padded with copies to this number, so that an image doesn't depend on the others in its batch", least=1
    )  # fmt: skip
    z_loss: float = option(
        0.0,
        "objectives with an LM head: weight of the squared log-normalizer (Chowdhery et al. 2022, PaLM: 1e-4)",
        least=0,
    )
    logits_chunk: Optional[int] = option(
        None,
        "objectives with an LM head: tokens whose logits are held at a time; None: 1,024, or as many as fit in 128 MiB; 0: all",
        least=0, identity=False,
    )  # fmt: skip
    language: Optional[str] = option(
        None,
        "speech_recognition: spoken language (ISO 639: en), for a multilingual tokenizer such as Whisper's",
    )

    def check(self) -> None:
        """Check LoRA, and the options of diffusion."""
        if self.lora.rank and self.frozen_layers:
            raise UserError("objective.lora freezes all layers: leave out objective.frozen_layers")
        if self.sampling_steps > self.noise_steps:
            raise UserError(
                f"objective.sampling_steps {self.sampling_steps} is more than objective.noise_steps {self.noise_steps}: "
                f"use objective.sampling_steps={self.noise_steps} or less"
            )
        if self.name == "diffusion" and self.guidance != 1 and not self.label_dropout:
            raise UserError(
                f"objective.guidance {self.guidance:g} needs a model that was trained without labels, too, and objective.label_dropout=0 "
                "trains none: use objective.guidance=1, or label_dropout=0.1"
            )
