"""The initial model: at stage 3 a node holds the full model only once, and all ranks have equal weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.models.attention import ATTENTION_NAME
from engine.train.init_model import (
    apply_optimizations,
    attach_mmap,
    empty_model,
    make_model,
    named_tensors,
    start_model,
    write_mmap,
)
from engine.train.job import TrainJob
from engine.train.process_group import ProcessGroup
from tests.engine.objectives.conftest import FAMILIES
from tests.engine.train.ranks import on_ranks

NO_GROUPS = {"model.num_key_value_heads": None, "model.intermediate_size": None}
MODELS: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {**NO_GROUPS, "model.type": "gpt2"},
    "bert": {**NO_GROUPS, "model.type": "bert", "model.tie_word_embeddings": None, "objective.name": "masked_lm"},
    "t5": {**FAMILIES["span_corruption"], "objective.name": "span_corruption"},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_model_takes_no_memory_and_attaches_the_weights_of_a_full_one(
    tiny: Config, tmp_path: Path, name: str
) -> None:
    config = with_values(tiny, MODELS[name])
    job = TrainJob(config, prepare(config))
    objective = job.objective()
    full, other = make_model(job, objective), empty_model(job, objective)
    assert {p.untyped_storage().nbytes() for p in other.parameters()} == {4}
    write_mmap(full, tmp_path / "full.safetensors")
    attach_mmap(other, tmp_path / "full.safetensors")
    expected = dict(named_tensors(full))
    assert expected.keys() == dict(named_tensors(other)).keys()
    for key, tensor in named_tensors(other):
        assert torch.equal(tensor, expected[key]), key
    samples = objective.samples(Split.open(job.data_folder, "train"))
    batch = objective.collate([samples[0] | {"draw": 0}])
    assert float(objective.loss(other.eval(), batch).sum) == float(objective.loss(full.eval(), batch).sum)


def test_blockwise_attention_is_for_bf16_on_a_cpu_only(tiny: Config) -> None:
    job = TrainJob(tiny, prepare(tiny))
    implementations = {}
    for device, precision in (("cpu", "bf16"), ("cpu", "fp32"), ("cuda", "bf16")):
        model = make_model(job, job.objective())
        apply_optimizations(model, tiny.train, torch.device(device), precision)
        implementations[device, precision] = model.config._attn_implementation
    assert implementations == {("cpu", "bf16"): ATTENTION_NAME, ("cpu", "fp32"): "sdpa", ("cuda", "bf16"): "sdpa"}


def private_bytes() -> int:
    """Return the memory of this process without memory-mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def start_and_measure(rank: int, world_size: int, spec: str) -> None:
    """Make the initial model on a rank, and check its memory and that all ranks have equal weights."""
    job = TrainJob.from_dict(json.loads(spec))
    objective = job.objective()
    make_model(
        TrainJob(with_values(job.config, {"model.num_hidden_layers": 1}), job.data_folder), objective
    )  # imports, once
    bytes_before = private_bytes()
    model = start_model(job, objective, ProcessGroup(rank, world_size, torch.device("cpu")), None)
    used, size = private_bytes() - bytes_before, sum(4 * p.numel() for p in model.parameters())
    assert size > 90e6
    if rank > 0:
        assert used < size / 4
    weight = model.get_output_embeddings().weight.detach().clone()
    dist.broadcast(weight, 0)
    assert torch.equal(weight, model.get_output_embeddings().weight)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)


def test_at_stage_3_a_node_holds_the_model_once(tiny: Config) -> None:
    shape = {"model.hidden_size": 512, "model.num_hidden_layers": 8, "model.intermediate_size": 1376}
    config = with_values(tiny, {**shape, "zero.stage": 3, "train.workers": 2})
    on_ranks(start_and_measure, 2, json.dumps(TrainJob(config, prepare(config)).to_dict()))
