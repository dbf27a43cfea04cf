"""The model compiled by torch: the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import Config, with_values
from engine.errors import UserError
from engine.models.int8 import quantize
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.model_runner import make_runner
from engine.serve.preflight import check_servable
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.engine_harness import EngineHarness, make_requests, model, tokens_of


def unpacked(own_model: nn.Module) -> nn.Module:
    return own_model


def quantized(own_model: nn.Module) -> nn.Module:
    quantize(own_model)
    return own_model


@pytest.mark.slow
# Graphs for one token and for any number of them, of the model and of the draft model; two models of the same structure
# share theirs, and a model that runs as one operation has none.
@pytest.mark.parametrize(
    ("family", "prepare", "num_graphs"),
    [("llama", pack_linear, 2), ("gpt2", pack_linear, 4), ("gpt2", quantized, 4), ("qwen2", unpacked, 2)],
)
def test_compiled_model_generates_the_same(
    family: str, prepare: Callable[[nn.Module], nn.Module], num_graphs: int
) -> None:
    own_model = prepare(copy.deepcopy(model(family)))
    cases = make_requests(own_model)
    ids = torch.tensor([cases[0].prompt])
    with torch.no_grad():
        logits = own_model(ids).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    harness = EngineHarness(
        own_model, compiled=True, num_speculative_tokens=3, draft_model=copy.deepcopy(model(family))
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    alone = [harness.generate([case.sequence()])[0].tokens for case in cases[:4]]
    batched = harness.generate([case.sequence() for case in cases])
    assert alone == [case.expected for case in cases[:4]]
    assert tokens_of(batched) == [case.expected for case in cases]
    assert harness.engine.num_accepted_tokens > 0
    with torch.no_grad():  # outside the engine, its logits are as before
        assert torch.equal(own_model(ids).logits, logits)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    )  # nothing is compiled while clients wait


def test_what_cannot_be_compiled_is_refused(tiny: Config, tiny_functions: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serve\.compile: this model can't be compiled"):
        make_runner(copy.deepcopy(model("bloom")), compiled=True)
    with pytest.raises(UserError, match=r"serve\.compile and serve\.adapters cannot be combined"):
        with_values(tiny, {"serve.compile": True, "serve.adapters": {"poet": "folder"}})
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"serve\.compile is for bundles that generate text"):
        check_servable(namer, with_values(tiny, {"serve.compile": True}).serve)
