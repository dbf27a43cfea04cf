"""What a generator runs, compiled by torch: the same tokens."""

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
from engine.serve.preflight import check_servable
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.model_runner import make_runner
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.test_lora import greedy
from tests.engine.serve.llm.test_engine import EngineHarness, model, requests


def whole(own: nn.Module) -> nn.Module:
    return own


def in_8_bits(own: nn.Module) -> nn.Module:
    quantize(own)
    return own


@pytest.mark.slow
# For one token, and for any number of them, of the model and of the draft; two models of one structure share theirs, and a
# model that runs as one operation has none.
@pytest.mark.parametrize(
    ("kind", "weights", "graphs"),
    [("llama", pack_linear, 2), ("gpt2", pack_linear, 4), ("gpt2", in_8_bits, 4), ("qwen2", whole, 2)],
)
def test_compiled_it_writes_the_same(kind: str, weights: Callable[[nn.Module], nn.Module], graphs: int) -> None:
    own = weights(copy.deepcopy(model(kind)))
    asked = [(prompt, most, greedy(own, prompt, most)) for prompt, most, _ in requests(kind)]
    ids = torch.tensor([asked[0][0]])
    with torch.no_grad():
        before = own(ids).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    harness = EngineHarness(own, compiled=True, num_speculative_tokens=3, draft_model=copy.deepcopy(model(kind)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    alone = [harness.generate([Sequence(prompt, most)])[0].tokens for prompt, most, _ in asked[:4]]
    together = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
    assert alone == [right for *_, right in asked[:4]]
    assert [it.tokens for it in together] == [right for *_, right in asked]
    assert harness.engine.num_accepted_tokens > 0
    with torch.no_grad():  # by itself it answers as before
        assert torch.equal(own(ids).logits, before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing was compiled while clients wait


def test_what_cannot_be_compiled_is_refused(tiny: Config, tiny_functions: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serve\.compile: this model can't be compiled"):
        make_runner(copy.deepcopy(model("bloom")), compiled=True)
    with pytest.raises(UserError, match=r"serve\.compile and serve\.adapters can't go together"):
        with_values(tiny, {"serve.compile": True, "serve.adapters": {"poet": "folder"}})
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"serve\.compile is for bundles that generate text"):
        check_servable(namer, with_values(tiny, {"serve.compile": True}).serve)
