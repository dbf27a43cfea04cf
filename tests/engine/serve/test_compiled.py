"""What a generator runs, compiled by torch: the same tokens."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.config import Config, with_values
from engine.errors import UserError
from engine.serve.deploy import refuse_what_cannot_serve
from engine.serve.forward import make_forward
from engine.serve.generation import Completion
from tests.engine.bundles.making import fresh_bundle
from tests.engine.serve.test_generation import Run, model, requests


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_compiled_it_writes_the_same(kind: str) -> None:
    asked = requests(kind)
    own = copy.deepcopy(model(kind))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run(own, compiled=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # for one token, and for any number of them
    alone = [run.all([Completion(prompt, most)])[0].tokens for prompt, most, _ in asked[:4]]
    together = run.all([Completion(prompt, most) for prompt, most, _ in asked])
    assert alone == [right for *_, right in asked[:4]]
    assert [it.tokens for it in together] == [right for *_, right in asked]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing is compiled while clients wait
    ids = torch.tensor([asked[0][0]])
    with torch.no_grad():  # by itself it answers as before
        assert torch.allclose(own(ids).logits, model(kind)(ids).logits, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_cannot_be_compiled_is_refused(tiny: Config, tiny_functions: Config, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"serve\.compile: this model can't be compiled"):
        make_forward(copy.deepcopy(model("bloom")), compiled=True)
    with pytest.raises(UserError, match=r"serve\.compile and serve\.adapters can't go together"):
        with_values(tiny, {"serve.compile": True, "serve.adapters": {"poet": "folder"}})
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"serve\.compile is for bundles that write"):
        refuse_what_cannot_serve(namer, with_values(tiny, {"serve.compile": True}).serve)
