"""Parameter counts, FLOPs, determinism, dropout, and clear errors."""

from __future__ import annotations

import pytest
import torch

from engine.config import Config, ModelConfig, with_values
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.models.build import build_model
from engine.models.size import flops_per_token, matmul_parameter_count, parameter_count
from jobs.entry import compose


@pytest.fixture(scope="module")
def tokenizer(tiny: Config) -> object:
    return load_tokenizer(prepare(tiny) / "tokenizer")


def test_weights_depend_on_the_seed_alone(tiny: Config, tokenizer: object) -> None:
    a, b, c = (build_model(tiny.model, tokenizer, "AutoModelForCausalLM", {}, seed) for seed in (3, 3, 4))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert torch.equal(x, z) == ("norm" in name), name


def test_parameter_count_and_flops_by_hand(tiny: Config, tokenizer: object) -> None:
    model = build_model(tiny.model, tokenizer, "AutoModelForCausalLM", {}, 0)
    vocab_size, width, inner, kv = 512, 32, 64, 16
    block = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    assert parameter_count(model) == vocab_size * width + 2 * block + width
    assert matmul_parameter_count(model) == parameter_count(model)  # tied: the embedding is the output product too
    assert flops_per_token(model, model.config, 32) == 6 * parameter_count(model) + 12 * 2 * width * 32


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(type="lama"), "did you mean 'llama'?"),
        (ModelConfig(options={"rope_thetas": 1}), "model.rope_thetas is no option of LlamaConfig"),
        (ModelConfig(vocab_size=10), "is less than the tokenizer's"),
    ],
)
def test_invalid_model_option_raises_a_clear_error(model: ModelConfig, message: str, tokenizer: object) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        build_model(model, tokenizer, "AutoModelForCausalLM", {}, 0)


def test_default_model_has_five_million_parameters() -> None:
    from engine.plan.plan import plan

    assert 4.5e6 < plan(compose("plan", [])).sizes.parameters < 5.5e6


def test_gpt2_has_its_published_size_and_zero_stages_their_memory() -> None:
    from engine.plan.plan import plan

    config = compose(
        "plan",
        [
            "model=gpt2_124m",
            "model.vocab_size=50257",
            "data.sequence_length=1024",
            "train.workers=4",
            "train.precision=bf16",
        ],
    )
    size_plan = plan(config)
    n = size_plan.sizes.parameters
    assert n == 124_439_808
    needs = [size_plan.memory_of(with_values(config, {"zero.stage": stage})) for stage in range(4)]
    assert [need.weights for need in needs] == [2 * n, 2 * n, 2 * n, n / 2]
    assert [need.optimizer for need in needs] == [12 * n, 3 * n, 3 * n, 3 * n]
    assert size_plan.checkpoint_bytes == 12 * n
    single = with_values(config, {"train.precision": "fp32", "train.workers": 1, "zero.stage": 0})
    assert plan(single).memory_of(single).optimizer == 8 * n


@pytest.mark.parametrize(("kind", "auto_class"), [("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForMaskedLM")])
def test_dropout_is_zero_by_default(tiny: Config, tokenizer: object, kind: str, auto_class: str) -> None:
    def dropout_rates(**changes: object) -> set[float]:
        values = {"model.type": kind, "model.num_key_value_heads": None, "model.intermediate_size": None}
        config = with_values(tiny, values | {f"model.{name}": value for name, value in changes.items()})
        model = build_model(config.model, tokenizer, auto_class, {}, 0)
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    assert dropout_rates() == {0.0}
    assert dropout_rates(dropout=0.2) == {0.2}
