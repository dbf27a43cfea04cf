"""Generation with 8-bit weights: the same in any batch, and a replica that replays golden outputs with them."""

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
from engine.serve.jobs import ClassificationJob, GenerationResult, SamplingParams
from engine.serve.llm.lora import LoraAdapters, pin_adapters
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.llm.sequence import Sequence
from engine.serve.load_model import load_model
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.engine_harness import EngineHarness, generate, make_requests, model, requests, tokens_of
from tests.engine.serve.llm.test_lora import save


@functools.cache
def int8_model(family: str) -> nn.Module:
    quantized = copy.deepcopy(model(family))
    quantize(quantized)
    return quantized


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_tokens_equal_generate_with_the_same_weights_in_any_batch(family: str) -> None:
    harness = EngineHarness(int8_model(family))
    assert isinstance(harness.engine.runner, BatchedRunner) == (family != "bloom")
    cases = make_requests(int8_model(family))
    alone = [harness.generate([case.sequence()])[0].tokens for case in cases[:4]]
    assert alone == [case.expected for case in cases[:4]]
    batched = harness.generate([case.sequence() for case in cases])
    assert tokens_of(batched) == [case.expected for case in cases]


def test_seed_repeats_in_any_batch() -> None:
    harness, cases = EngineHarness(int8_model("llama")), requests("llama")
    (alone,) = harness.generate([Sequence(cases[1].prompt, 30, SamplingParams(1.0), seed=3)])
    again = Sequence(cases[1].prompt, 30, SamplingParams(1.0), seed=3)
    harness.generate([*(case.sequence(sampling=SamplingParams(1.0)) for case in cases[:4]), again])
    assert again.tokens == alone.tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_adds_the_same_to_8_bit_weights(family: str, tmp_path: Path) -> None:
    ends = ("q_proj", "down_proj") if family == "llama" else ("c_attn", "c_proj")
    folder = save(tmp_path / "poet", model(family), ends, 1)
    ids = torch.randint(6, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    added = []
    for base in (model(family), int8_model(family)):
        own_model = copy.deepcopy(base)
        adapters = LoraAdapters(own_model, pin_adapters({"poet": str(folder)}))
        adapters.load("poet", ())
        layer = next(module for path, module in own_model.named_modules() if path.endswith(ends[0]))
        given = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plain = layer(given)
            with adapters.active(["poet"] * ids.shape[1]):
                added.append(layer(given) - plain)
    assert added[0].abs().max() > 0.1
    assert torch.allclose(added[0], added[1], atol=1e-4)


def test_replica_verifies_the_weights_and_then_replays_in_8_bits(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    options = {precision: ServeConfig(precision=precision, quantize="int8") for precision in ("fp32", "bf16")}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        loaded = load_model(bundle, options[precision])
        assert is_quantized(loaded)
        assert weight_bytes(loaded) < 0.3 * weight_bytes(bundle.model(torch.float32))
        assert next(layer for layer in loaded.modules() if isinstance(layer, Int8Linear)).scale.dtype == dtype
    job = CompletionRequest(prompt="import os\n", max_tokens=20, temperature=0, logprobs=1).job()
    replica = Replica(str(bundle.folder), asdict(options["fp32"]))
    result = asyncio.run(replica.complete(job))
    assert isinstance(result, GenerationResult)
    ids = bundle.processor()("import os\n")["input_ids"]
    expected = generate(load_model(bundle, options["fp32"]), ids, 20)
    assert result.choices[0].text == bundle.processor().decode(expected, skip_special_tokens=True)
    (bundle.folder / "model.safetensors").write_bytes(b"x" + (bundle.folder / "model.safetensors").read_bytes()[1:])
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        load_model(bundle, options["fp32"])


def test_weights_that_lose_too_much_in_8_bits_are_refused(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    wide_range = bundle.model()
    # One weight of each output is so large that the others are rounded to zero; its input is always zero.
    with torch.no_grad():
        for name, weight in wide_range.named_parameters():
            if name.endswith("up_proj.weight"):
                weight[:, 0] = 1e4
            if name.endswith("post_attention_layernorm.weight"):
                weight[0] = 0
    from engine.bundles.bundle import BundleInfo, write_bundle

    request = {"prompt": [6, 7, 8, 9], "continuation": [10, 11, 12, 13]}
    wide = write_bundle(tmp_path / "wide", wide_range, bundle.objective(), BundleInfo("wide", [request]))
    assert load_model(Bundle.open(wide.folder), ServeConfig(precision="fp32")) is not None
    with pytest.raises(UserError, match=r"golden outputs with 8-bit weights \(leave out serve\.quantize\)"):
        load_model(Bundle.open(wide.folder), ServeConfig(precision="fp32", quantize="int8"))


def test_classifier_scores_are_nearly_the_same(tiny_functions: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    texts = ["return self.x", "for i in values:\n    total += i"]
    scores: list[list[list[float]]] = []
    for quantization in ("none", "int8"):
        replica = Replica(str(bundle.folder), asdict(ServeConfig(precision="fp32", quantize=quantization)))
        result = asyncio.run(replica.classify(ClassificationJob(texts)))
        scores.append([list(item.scores.values()) for item in result.items])
    for expected, other in zip(*scores, strict=True):
        assert expected != other
        assert other == pytest.approx(expected, abs=0.1)
