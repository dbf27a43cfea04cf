"""Generation with weights of 8 bits: in any company the same, and a replica that checks what they answer."""

from __future__ import annotations

import asyncio
import copy
import functools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig
from engine.errors import UserError
from engine.models.int8 import Int8Linear, is_quantized, quantize, weight_bytes
from engine.serve.http.schemas import CompletionRequest
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.lora import LoraAdapters, pin_adapters
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.jobs import SamplingParams
from engine.serve.load_model import load_model
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.test_lora import greedy, save
from tests.engine.serve.llm.test_engine import EngineHarness, model, requests


@functools.cache
def smaller(kind: str) -> nn.Module:
    made = copy.deepcopy(model(kind))
    quantize(made)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_greedy_is_generate_of_the_same_weights_in_any_company(kind: str) -> None:
    harness = EngineHarness(smaller(kind))
    assert isinstance(harness.engine.runner, BatchedRunner) == (kind != "bloom")
    asked = [(prompt, most, greedy(smaller(kind), prompt, most)) for prompt, most, _ in requests(kind)]
    alone = [harness.generate([Sequence(prompt, most)])[0].tokens for prompt, most, _ in asked[:4]]
    assert alone == [right for *_, right in asked[:4]]
    together = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
    assert [it.tokens for it in together] == [right for *_, right in asked]


def test_a_seed_repeats_in_any_company() -> None:
    harness, asked = EngineHarness(smaller("llama")), requests("llama")
    (alone,) = harness.generate([Sequence(asked[1][0], 30, SamplingParams(1.0), seed=3)])
    again = Sequence(asked[1][0], 30, SamplingParams(1.0), seed=3)
    harness.generate([*(Sequence(prompt, most, SamplingParams(1.0)) for prompt, most, _ in asked[:4]), again])
    assert again.tokens == alone.tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_adds_to_weights_of_8_bits_what_it_adds_to_others(kind: str, tmp_path: Path) -> None:
    ends = ("q_proj", "down_proj") if kind == "llama" else ("c_attn", "c_proj")
    folder = save(tmp_path / "poet", model(kind), ends, 1)
    ids = torch.randint(6, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    added = []
    for base in (model(kind), smaller(kind)):
        own = copy.deepcopy(base)
        adapters = LoraAdapters(own, pin_adapters({"poet": str(folder)}))
        adapters.load("poet", ())
        layer = next(it for path, it in own.named_modules() if path.endswith(ends[0]))
        given = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plain = layer(given)
            with adapters.active(["poet"] * ids.shape[1]):
                added.append(layer(given) - plain)
    assert added[0].abs().max() > 0.1
    assert torch.allclose(added[0], added[1], atol=1e-4)


def test_a_replica_verifies_the_whole_weights_and_then_what_8_bits_answer(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    options = {precision: ServeConfig(precision=precision, quantize="int8") for precision in ("fp32", "bf16")}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = load_model(bundle, options[precision])
        assert is_quantized(found)
        assert weight_bytes(found) < 0.3 * weight_bytes(bundle.model(torch.float32))
        assert next(layer for layer in found.modules() if isinstance(layer, Int8Linear)).scale.dtype == dtype
    job = CompletionRequest(prompt="import os\n", max_tokens=20, temperature=0, logprobs=1).job()
    replica = Replica(str(bundle.folder), asdict(options["fp32"]))
    (answer,) = asyncio.run(replica.complete(job))["choices"]
    ids = bundle.processor()("import os\n")["input_ids"]
    right = greedy(load_model(bundle, options["fp32"]), ids, 20)
    assert answer["text"] == bundle.processor().decode(right, skip_special_tokens=True)
    (bundle.folder / "model.safetensors").write_bytes(b"x" + (bundle.folder / "model.safetensors").read_bytes()[1:])
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        load_model(bundle, options["fp32"])


def test_weights_that_8_bits_do_not_hold_are_refused(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    strange = bundle.model()
    with (
        torch.no_grad()
    ):  # one weight of each output so large that the others are rounded to nothing, and no input meets it
        for name, weight in strange.named_parameters():
            if name.endswith("up_proj.weight"):
                weight[:, 0] = 1e4
            if name.endswith("post_attention_layernorm.weight"):
                weight[0] = 0
    from engine.bundles.bundle import BundleInfo, write_bundle

    request = {"prompt": [6, 7, 8, 9], "continuation": [10, 11, 12, 13]}
    odd = write_bundle(tmp_path / "odd", strange, bundle.objective(), BundleInfo("odd", [request]))
    assert load_model(Bundle.open(odd.folder), ServeConfig(precision="fp32")) is not None
    with pytest.raises(UserError, match=r"golden outputs with 8-bit weights \(leave out serve\.quantize\)"):
        load_model(Bundle.open(odd.folder), ServeConfig(precision="fp32", quantize="int8"))


def test_a_classifier_answers_nearly_the_same(tiny_functions: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    texts = ["return self.x", "for i in values:\n    total += i"]
    found = []
    for how in ("none", "int8"):
        replica = Replica(str(bundle.folder), asdict(ServeConfig(precision="fp32", quantize=how)))
        found.append([list(it["scores"].values()) for it in asyncio.run(replica.classify(texts))])
    for right, other in zip(*found, strict=True):
        assert right != other
        assert other == pytest.approx(right, abs=0.1)
