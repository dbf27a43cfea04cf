"""Sequence parallelism gives the same curve: causal and bidirectional, padded, packed, at each ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.objectives.contract import Batch
from engine.train.job import TrainJob
from engine.train.launch import check_job
from engine.train.process_group import ProcessGroup
from engine.train.sequence_parallel import AllToAll, SequenceParallel
from tests.engine.train.ranks import losses, on_ranks, run_ranks

Lines = list[dict[str, Any]]
# Four heads and two key-value heads, which four ranks cannot split; 61 tokens are not divisible by the group size.
LLAMA: dict[str, object] = {"model.num_attention_heads": 4, "model.num_key_value_heads": 2, "data.sequence_length": 61}
NO_GROUPS: dict[str, object] = {"model.num_attention_heads": 4, "model.num_key_value_heads": None}
BERT: dict[str, object] = {
    **NO_GROUPS, "model.type": "bert", "model.tie_word_embeddings": None, "objective.name": "masked_lm", "data.sequence_length": 61,
}  # fmt: skip
GPT2: dict[str, object] = {**NO_GROUPS, "model.type": "gpt2", "model.intermediate_size": None}
PACKED: dict[str, object] = {"data.packing": "best_fit", "data.within_documents": True}
MODELS = {
    "llama": LLAMA, "gpt2 packed": GPT2 | PACKED, "bert": BERT, "bert packed": BERT | PACKED,
}  # fmt: skip


def run(tiny: Config, world_size: int, layouts: list[tuple[str, int, dict[str, object]]]) -> list[Lines]:
    """Train in each layout: (model name, train.sequence_parallel, other options)."""
    jobs = []
    for model, size, options in layouts:
        name = f"shared-{model.replace(' ', '-')}-{world_size}-{size}"
        changes = {"name": name, "train.workers": world_size, "train.sequence_parallel": size, "train.micro_batch": 3}
        config = with_values(tiny, MODELS[model] | changes | options)
        jobs.append(TrainJob(config, prepare(config)))
    return run_ranks(jobs, world_size)


@pytest.fixture(scope="module")
def alone(tiny: Config) -> dict[str, Lines]:
    """Train each model on one rank."""
    return dict(zip(MODELS, run(tiny, 1, [(model, 1, {"zero.stage": 0}) for model in MODELS]), strict=True))


def assert_same(shared: Lines, alone: Lines) -> None:
    """Compare two curves."""
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)
    for name in ("tokens", "samples_hash"):
        assert [line[name] for line in shared] == [line[name] for line in alone]
    assert [line["grad_norm"] for line in shared] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
    assert shared[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], abs=1e-5)


def test_two_ranks_per_sequence_give_the_same_curve(tiny: Config, alone: dict[str, Lines]) -> None:
    shared = run(tiny, 2, [(model, 2, {"zero.stage": stage}) for stage, model in enumerate(MODELS)])
    for model, lines in zip(MODELS, shared, strict=True):
        assert_same(lines, alone[model])


@pytest.mark.slow
def test_four_ranks_in_groups_of_two_and_four_give_the_same_curve(tiny: Config, alone: dict[str, Lines]) -> None:
    recomputed = {"zero.stage": 2, "train.activation_checkpointing": True}
    for lines in run(tiny, 4, [("llama", 2, {"zero.stage": 3}), ("llama", 4, recomputed)]):
        assert_same(lines, alone["llama"])


def check_all_to_all(rank: int, world_size: int) -> None:
    """Check on a rank that all-to-all sends each block to its rank, and that its gradient sends it back."""
    blocks = (10 * rank + torch.arange(world_size)).float()[:, None].requires_grad_()
    received = AllToAll.apply(blocks, None)
    assert received[:, 0].tolist() == [10 * other + rank for other in range(world_size)]
    (received * (1 + torch.arange(world_size))[:, None]).sum().backward()
    assert blocks.grad[:, 0].tolist() == [1.0 + rank] * world_size
    half = AllToAll.apply(blocks.detach().bfloat16(), None)
    assert half.dtype == torch.bfloat16
    assert half[:, 0].tolist() == received[:, 0].tolist()


def test_all_to_all_is_its_own_gradient() -> None:
    on_ranks(check_all_to_all, 3)


def test_each_rank_has_a_part_of_the_tokens_and_of_the_count() -> None:
    ids = torch.arange(1, 8)[None]
    batch = Batch({"input_ids": ids}, torch.where(ids == 3, -100, ids + 1), count=6, tokens=7)
    parts = []
    for rank in range(2):
        sequence = SequenceParallel(ProcessGroup(0, 1, torch.device("cpu")))
        sequence.size, sequence.rank = 2, rank
        parts.append(sequence.shard(batch))
    assert [part.inputs["input_ids"].tolist() for part in parts] == [[[1, 2, 3, 4]], [[5, 6, 7, 0]]]
    assert [part.inputs["position_ids"].tolist() for part in parts] == [[[0, 1, 2, 3]], [[4, 5, 6, 0]]]
    assert [part.targets.tolist() for part in parts] == [[[2, 3, -100, 5]], [[6, 7, 8, -100]]]
    assert [part.count for part in parts] == [3, 3]
    assert [part.tokens for part in parts] == [7, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.workers": 3, "train.sequence_parallel": 2}, r"use train\.workers=4"),
        ({"train.workers": 2, "train.sequence_parallel": 2, "model.attention": "eager"}, r"leave out model\.attention"),
    ],
)
def test_contradictory_options_are_refused(tiny: Config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_values(tiny, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LLAMA | {"train.workers": 3, "train.sequence_parallel": 3}, "does not divide the model's 4 attention heads"),
        ({"model.type": "bloom", "model.num_key_value_heads": None, "model.intermediate_size": None,
          "model.max_position_embeddings": None, "model.num_attention_heads": 4}, r"not for model\.type=bloom"),
        (NO_GROUPS | {"model.type": "mistral", "model.num_key_value_heads": 4, "model.options": {"sliding_window": 16}},
         r"not for model\.type=mistral"),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused_before_training(tiny: Config, changes: dict[str, object], message: str) -> None:
    config = with_values(tiny, {"train.workers": 2, "train.sequence_parallel": 2} | changes)
    with pytest.raises(UserError, match=message):
        check_job(TrainJob(config, prepare(config)))
