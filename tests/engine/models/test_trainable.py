"""Trainable parameters: frozen layers, and LoRA's initialization, merging and adapter files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.config import Config, LoraConfig, ModelConfig, ObjectiveConfig
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.models.build import build_model
from engine.models.lora import add_lora, merge_lora, write_adapter
from engine.models.size import flops_per_token, matmul_parameter_count
from engine.models.trainable import freeze_layers, select_trainable

LORA = LoraConfig(rank=4)
BERT = ModelConfig(type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GPT2 = ModelConfig(type="gpt2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer(tiny: Config) -> Any:
    return load_tokenizer(prepare(tiny) / "tokenizer")


def build_causal_lm(model: ModelConfig, tokenizer: object) -> Any:
    return build_model(model, tokenizer, "AutoModelForCausalLM", {}, 0).eval()


def ids() -> torch.Tensor:
    return torch.arange(7, 37).reshape(2, 15)


def test_frozen_layers_are_the_embedding_and_the_first_blocks(tiny: Config, tokenizer: Any) -> None:
    model = build_model(tiny.model, tokenizer, "AutoModelForSequenceClassification", {"num_labels": 3}, 0)
    freeze_layers(model, 1)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if "layers" not in name} == {"model.embed_tokens.weight"}
    assert {name.split(".")[2] for name in frozen if "layers" in name} == {"0"}
    with pytest.raises(UserError, match="more than the model's 2 blocks: use 2 or less"):
        freeze_layers(model, 3)


def test_lora_starts_as_the_identity_and_depends_on_the_seed_alone(tiny: Config, tokenizer: Any) -> None:
    plain = build_causal_lm(tiny.model, tokenizer)
    before, state = plain(input_ids=ids()).logits, torch.get_rng_state()
    models = []
    for seed in (3, 3, 4):
        model = copy.deepcopy(plain)
        torch.rand(len(models))  # the global random state does not matter
        add_lora(model, LORA, seed, train_head=False)
        assert torch.equal(model(input_ids=ids()).logits, before)
        models.append(dict(model.named_parameters()))
    torch.set_rng_state(state)
    a, b, other = models
    names = [name for name, p in a.items() if p.requires_grad]
    assert len(names) == 2 * 2 * 7  # A and B of the seven linear layers of two blocks
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], other[name]) == ("lora_B" in name) for name in names)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_model_and_adapter_loaded_by_peft_equal_the_adapted_model(
    kind: str, tiny: Config, tokenizer: Any, tmp_path: Path
) -> None:
    base = build_causal_lm(tiny.model if kind == "llama" else GPT2, tokenizer)
    base.save_pretrained(tmp_path / "base")
    model, lora = copy.deepcopy(base), LoraConfig(rank=4, alpha=12.0)
    add_lora(model, lora, 0, train_head=False)
    perturb_trained(model)
    adapted = model(input_ids=ids()).logits
    assert not torch.allclose(adapted, base(input_ids=ids()).logits, atol=1e-2)
    write_adapter(model, lora, str(tmp_path / "base"), tmp_path / "adapter", "CAUSAL_LM")
    merge_lora(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base.named_parameters()}
    torch.testing.assert_close(model(input_ids=ids()).logits, adapted, rtol=0, atol=2e-5)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids()).logits, adapted, rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].lora_alpha == 12.0


def test_task_head_is_trained_in_full_and_saved_in_the_adapter(tokenizer: Any, tmp_path: Path) -> None:
    base = build_model(BERT, tokenizer, "AutoModelForSequenceClassification", {"num_labels": 3}, 0).eval()
    base.save_pretrained(tmp_path / "base")
    model = select_trainable(copy.deepcopy(base), ObjectiveConfig("classification", lora=LORA), 0, train_head=True)
    fully_trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert fully_trained == {
        f"{layer}.{part}" for layer in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")
    }
    perturb_trained(model)
    adapted = model(input_ids=ids()).logits
    write_adapter(model, LORA, str(tmp_path / "base"), tmp_path / "adapter", "SEQ_CLS")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids()).logits, adapted, rtol=0, atol=1e-6)
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, adapted, rtol=0, atol=2e-5)


def test_flops_exclude_gradients_of_frozen_weights(tiny: Config, tokenizer: Any) -> None:
    model = build_causal_lm(tiny.model, tokenizer)
    vocab_size, width = model.get_input_embeddings().weight.shape
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    attention = 12 * 2 * width * 32
    frozen = copy.deepcopy(model)
    freeze_layers(frozen, 1)  # the first block: forward only; the tied output layer: no weight gradient
    assert (
        flops_per_token(frozen, model.config, 32) - attention
        == 2 * block + 6 * (block + width) + 4 * vocab_size * width
    )
    add_lora(model, LORA, 0, train_head=False)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = matmul_parameter_count(model) - added
    before = model.model.layers[
        0
    ].self_attn.q_proj.base_layer.weight.numel()  # the gradient of its inputs is not computed
    assert flops_per_token(model, model.config, 32) - attention == 4 * base + 6 * added - 2 * before


def test_lora_targets_are_suffixes_and_an_unknown_one_raises_a_clear_error(tiny: Config, tokenizer: Any) -> None:
    model = build_causal_lm(tiny.model, tokenizer)
    add_lora(model, LoraConfig(rank=2, targets=["q_proj", "mlp.up_proj"]), 0, train_head=False)
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.up_proj")}
    with pytest.raises(UserError, match="no block has a linear layer 'query'; this model has down_proj, gate_proj"):
        add_lora(build_causal_lm(tiny.model, tokenizer), LoraConfig(rank=2, targets=["query"]), 0, train_head=False)


@torch.no_grad()
def perturb_trained(model: nn.Module) -> None:
    """Change the trained parameters, as training would."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn_like(p))
