"""The plan's figures: exact parameter counts, optimizer memory as in DeepSpeed, activations as autograd saves them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers

from engine.config import Config, replace
from engine.errors import UserError
from engine.plan.memory import ModelSizes, block_activation_widths, peak_memory, step_memory
from engine.plan.plan import layout_options, plan, plan_and_show
from jobs.entry import compose
from tests.engine.train.ranks import on_ranks

P = 5_065_472  # parameters of llama_5m with 4,096 tokens: 4096*256 + 5*(4*256*256 + 3*256*704 + 2*256) + 256


def plan_config(*overrides: str) -> Config:
    return compose("plan", list(overrides))


def test_parameter_and_flop_counts_are_exact() -> None:
    small = plan(
        plan_config("model=llama_5m", "train.global_batch=8", "data.sequence_length=128", "train.max_steps=50")
    )
    assert small.sizes.parameters == small.sizes.trainable == P
    assert small.flops_per_token == 6 * P + 12 * 5 * 256 * 128
    assert small.tokens_per_step == 1024
    assert small.checkpoint_bytes == 12 * P
    assert small.total_s == pytest.approx(50 * small.step_s)
    assert small.step_s == pytest.approx(1024 * small.flops_per_token / (0.4 * small.peak_flops))
    assert plan(plan_config("model=gpt2_124m", "model.vocab_size=50257")).sizes.parameters == 124_439_808


@pytest.mark.parametrize(
    ("precision", "stage", "weights", "gradients", "optimizer"),
    [
        ("fp32", 0, 4, 4, 8), ("fp32", 1, 4, 4, 12 / 4), ("fp32", 2, 4, 4 / 4, 12 / 4), ("fp32", 3, 4 / 4, 4 / 4, 12 / 4),
        ("bf16", 0, 2, 2, 12), ("bf16", 1, 2, 2, 12 / 4), ("bf16", 2, 2, 2 / 4, 12 / 4), ("bf16", 3, 2 / 4, 2 / 4, 12 / 4),
    ],
)  # fmt: skip
def test_bytes_per_parameter_of_weights_gradients_and_optimizer_states(
    precision: str, stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """In the forward pass of a later micro-batch of a step, when gradients of earlier ones are held."""
    config = plan_config("train.workers=4", f"train.precision={precision}", "train.micro_batch=1")
    need = next(iter(step_memory(config, plan(config).sizes, stage, precision)))
    assert need.phase == "loss"
    assert (need.weights, need.gradients, need.optimizer) == (weights * P, gradients * P, optimizer * P)
    assert need.total == pytest.approx(
        need.weights + need.gradients + need.optimizer + need.activations + need.logits + need.buffers
    )


def test_offload_moves_weights_and_optimizer_states_to_main_memory() -> None:
    result = plan(plan_config("train.workers=2", "train.precision=bf16"))
    layout, away = result.stages["3 offload"]
    assert (layout.zero.offload_optimizer, layout.zero.offload_param) == ("cpu", "cpu")
    assert away.optimizer == away.weights == away.gradients == 0
    assert away.host == (12 + 4 + 2 + 2) * P / 2  # states, fp32 gradients, gradients as they add up, weights
    assert result.stages["2 offload"][1].host == (12 + 4 + 2) * P / 2
    assert result.stages["2"][1].host == 0
    assert "0 offload" not in result.stages


def test_sequence_parallelism_divides_activations_and_logits() -> None:
    common = ("train.workers=4", "train.precision=bf16", "train.micro_batch=2", "objective.logits_chunk=0")
    whole, shared = (plan_config(*common, f"train.sequence_parallel={size}") for size in (1, 4))
    sizes = plan(whole).sizes
    for before, after in zip(step_memory(whole, sizes, 2, "bf16"), step_memory(shared, sizes, 2, "bf16"), strict=False):
        assert after.activations == before.activations / 4
        assert after.logits == before.logits / 4
        assert after.optimizer == before.optimizer
    assert (whole.samples_per_worker, shared.samples_per_worker) == (8, 32)


def test_frozen_layers_have_no_gradients() -> None:
    result = plan(plan_config("objective.frozen_layers=2", "train.precision=fp32", "zero.stage=0"))
    block = 4 * 256 * 256 + 3 * 256 * 704 + 2 * 256
    assert result.sizes.trainable == P - 4096 * 256 - 2 * block
    assert result.stages["0"][1].optimizer == 8 * result.sizes.trainable
    assert result.checkpoint_bytes == 4 * P + 8 * result.sizes.trainable


def test_muon_moments_and_the_moving_average_are_counted() -> None:
    result = plan(plan_config("optim.name=muon", "train.ema=0.999", "train.precision=bf16"))
    matrices = 5 * (4 * 256 * 256 + 3 * 256 * 704)
    assert result.sizes.moment_elements == matrices + 2 * (P - matrices)
    assert result.stages["0"][1].optimizer == 4 * (2 * P + result.sizes.moment_elements)
    assert result.checkpoint_bytes == 4 * (2 * P + result.sizes.moment_elements)


def test_a_checkpoint_is_written_at_the_rate_that_is_stated(tmp_path: Path) -> None:
    far = plan(plan_config("plan.device=h100_80gb", "train.workers=8"))
    assert (far.write_rate, far.write_s) == (1e9, 12 * P / 8e9)
    here = plan(plan_config(f"runs_dir={tmp_path}", "train.workers=2"))
    assert 1e6 < here.write_rate < 1e11
    assert here.write_s == pytest.approx(12 * P / (2 * here.write_rate))
    assert plan(plan_config("plan.write_rate=5e8")).write_s == 12 * P / 5e8
    assert not list(tmp_path.iterdir())


def test_the_same_figures_as_json(tmp_path: Path) -> None:
    config = plan_config(f"plan.json={tmp_path}/plan.json", "plan.device=a100_80gb", "train.workers=8")
    plan_and_show(config)
    written, result = json.loads((tmp_path / "plan.json").read_text()), plan(config)
    assert written["parameters"] == P
    assert written["step_s"] == result.step_s
    assert written["fits"] == "zero.stage=0"
    assert written["memory"].keys() == {"0", "1", "1 offload", "2", "2 offload", "3", "3 offload"}
    assert written["memory"]["3"]["total"] == result.stages["3"][1].total
    assert written["memory"]["3 offload"]["host"] == result.stages["3 offload"][1].host > 0


NAMED = [  # published: 124 M, 1.5 B, 335 M, 176,247,271,424 (the model card's figure), 175 B, 178 B
    ("model=gpt2_124m model.vocab_size=50257", 124_439_808),
    ("model=gpt2_1.5b model.vocab_size=50257", 1_557_611_200),
    ("model=bert_large objective=masked_lm model.vocab_size=30522", 335_174_458),
    ("model=bloom_176b", 176_247_271_424),
    ("model=gpt3_175b", 174_604_259_328),
    ("model=jurassic1_178b", 177_866_855_424),
]


@pytest.mark.parametrize(("overrides", "parameters"), NAMED)
def test_named_models_have_their_published_size(overrides: str, parameters: int) -> None:
    assert plan(plan_config(*overrides.split(), "plan.device=a100_80gb")).sizes.parameters == parameters


def test_the_fastest_layout_that_fits() -> None:
    big = ["model=bloom_176b", "data.sequence_length=2048", "train.global_batch=2048", "train.micro_batch=1"]
    result = plan(
        plan_config(*big, "plan.device=a100_80gb", "plan.tokens=3.66e11", "plan.mfu=0.45", "train.workers=384")
    )
    assert result.layout is not None
    assert layout_options(result.layout) == "zero.stage=3 train.activation_checkpointing=true"
    assert result.layout_memory is not None
    assert result.layout_memory.total < result.device_bytes == pytest.approx(80e9 * 0.92)
    step_s = 2048 * 2048 * result.flops_per_token * 4 / 3 / (0.45 * 312e12 * 384)
    assert result.step_s == pytest.approx(step_s)
    assert result.total_s == pytest.approx(step_s * 3.66e11 / 2048**2)
    assert plan(plan_config(*big, "plan.device=a100_80gb", "train.workers=8")).layout is None
    small = plan(plan_config("model=llama_5m", "plan.device=a100_80gb", "train.workers=8"))
    assert small.layout is not None
    assert layout_options(small.layout) == "zero.stage=0"


FAMILIES = [  # with the tokens of a sample: text; text and its target spans; patches and a class token; the same and a caption; patches
    ("model=bert_5m objective=masked_lm", 256),
    ("model=t5_5m objective=span_corruption", 256 + 58),
    ("model=vit_5m objective=image_classification", 65),
    ("model=clip_5m objective=contrastive data.sequence_length=32", 65 + 32),
    ("model=dit_5m objective=diffusion", 64),
]


@pytest.mark.parametrize(("overrides", "tokens"), FAMILIES)
def test_every_model_family_can_be_planned(overrides: str, tokens: int) -> None:
    result = plan(plan_config(*overrides.split(), "plan.device=a100_80gb", "train.global_batch=8"))
    assert 4e6 < result.sizes.parameters < 7e6
    assert result.tokens_per_step == pytest.approx(8 * tokens, rel=0.02)
    assert 2 * result.sizes.parameters < result.flops_per_token < 9 * result.sizes.parameters
    need = result.stages["0"][1]
    assert 16 * result.sizes.parameters < need.total < 4e9


def test_a_model_without_a_class_for_the_objective_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.type=vit is not for this objective \(transformers has no AutoModelForCausalLM"
    ):
        plan(plan_config("model=vit_5m"))


def test_a_sequence_longer_than_the_models_positions_is_refused() -> None:
    with pytest.raises(UserError, match="sequence length 4,096 is over the model's 512 positions"):
        plan(plan_config("data.sequence_length=4096"))


def test_the_printed_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan_and_show(plan_config("zero.stage=1"))
    shown = capsys.readouterr().out
    assert "5,065,472 parameters" in shown
    assert "computed from the measured matmul peak" in " ".join(shown.split())
    assert "1*" in shown
    assert "/s per worker (measured)" in " ".join(shown.split())


SHAPES = {
    "llama": transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=4, intermediate_size=352, vocab_size=64
    ),
    "grouped": transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=1, intermediate_size=352, vocab_size=64
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=128, n_head=4, vocab_size=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_activation_bytes_match_what_autograd_saves(name: str, dtype: torch.dtype) -> None:
    def saved_bytes(layers: int) -> int:
        shape = SHAPES[name]
        shape.num_hidden_layers = layers
        model = transformers.AutoModel.from_config(shape, attn_implementation="sdpa").to(dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(2, 64, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    measured = (saved_bytes(3) - saved_bytes(1)) / 2
    assert 2 * 64 * dtype.itemsize * block_activation_widths(SHAPES[name]) == pytest.approx(measured, rel=0.12)


def test_weight_and_optimizer_bytes_match_deepspeed() -> None:
    on_ranks(_compare_with_deepspeed, 2)


def _compare_with_deepspeed(_rank: int, _world: int) -> None:
    """Compare the bytes of weights and optimizer of one of two ranks with the plan, at every stage."""
    from engine.train.zero import ZeroModel

    for stage, precision in itertools.product(range(4), ("fp32", "bf16")):
        config = replace(Config(), train__workers=2, zero__stage=stage, train__precision=precision)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 64, bias=False))
        parameters = 2 * 64 * 32
        need = peak_memory(config, ModelSizes(parameters, parameters, 2 * parameters, stacks=[]), stage, precision)
        sharded = ZeroModel(model, config, 2, precision)
        sharded.init_optimizer_state(0)
        weights = bytes_of([getattr(p, "ds_tensor", p) for p in model.parameters()])
        optimizer: dict[int, int] = {}
        for master, state in sharded.optimizer.state.items():
            optimizer |= bytes_of([master, state["exp_avg"], state["exp_avg_sq"]])
        held = sum(weights.values()), sum(size for at, size in optimizer.items() if at not in weights)
        assert held == (need.weights, need.optimizer), f"at stage {stage} in {precision}"


def bytes_of(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
