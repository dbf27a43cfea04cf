"""LoRA adapters on one base model: each row equals its merged model alone, whatever shares its forward, cache or memory."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.errors import UserError
from engine.serve.application import make_version
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.schemas import CompletionRequest
from engine.serve.jobs import Failure, SamplingParams
from engine.serve.llm.lora import LoraAdapters, check_adapters, load_adapter, pin_adapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence, SequentialRunner
from engine.serve.llm.sequence import Sequence
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import wait_for
from tests.engine.serve.http.test_api import PROMPTS
from tests.engine.serve.llm.engine_harness import EOS, EngineHarness, generate, model, requests, tokens_of
from tests.engine.serve.llm.paused_engine import paused
from tests.ports import free_port

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {  # modules of three adapters, by the ends of their paths
    "llama": [("q_proj", "v_proj"), LINEAR, ("k_proj", "down_proj")],
    "gpt2": [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("mlp.c_proj",)],
    "bloom": [("query_key_value",), ("query_key_value", "dense", "dense_h_to_4h"), ("dense_4h_to_h",)],
}
OPTIONS: list[dict[str, Any]] = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 4, "use_rslora": True}, {"r": 2, "lora_alpha": 6}]  # fmt: skip
NAMES = ["poet", "clerk", "judge"]


def save(folder: Path, base: nn.Module, ends: tuple[str, ...], seed: int, **config: Any) -> Path:
    """Write an adapter of random weights as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "somebody/elses", "r": 4, "lora_alpha": 8,
             "use_rslora": False, "bias": "none", "modules_to_save": None, "target_modules": list(ends)} | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in base.named_modules():
        if path.endswith(ends) and isinstance(layer, (nn.Linear, Conv1D)):
            sizes = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.3 * torch.randn(
                settings["r"], sizes[0], generator=rng
            )
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.3 * torch.randn(
                sizes[1], settings["r"], generator=rng
            )
    assert tensors
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """Return a copy with W + scale B A (Hu et al. 2021, section 4.1) in place of each W."""
    model_copy = copy.deepcopy(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        layer = model_copy.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        update = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        weight.data += update.T if isinstance(layer, Conv1D) else update
    return model_copy


def folders_for(family: str, folder: Path) -> dict[str, Path]:
    configs = zip(NAMES, TARGETS[family], OPTIONS, strict=True)
    return {
        name: save(folder / name, model(family), ends, seed, **config_values)
        for seed, (name, ends, config_values) in enumerate(configs)
    }


class LoraHarness(EngineHarness):
    """An engine with adapters, which notes those that were in a forward together."""

    def __init__(self, base: nn.Module, folders: dict[str, Path], max_loaded: int = 16, **options: Any) -> None:
        own_model = copy.deepcopy(base)
        self.adapters = LoraAdapters(own_model, pin_adapters(folders), max_loaded)
        self.forwards: list[set[str]] = []  # names of the adapters in each
        self.most_loaded = 0
        active = self.adapters.active

        def record_and_activate(names: list[str]) -> Any:
            self.forwards.append(set(names))
            self.most_loaded = max(self.most_loaded, len(self.adapters.loaded))
            return active(names)

        self.adapters.active = record_and_activate  # type: ignore[assignment,method-assign]
        sizes: dict[str, Any] = {"max_num_seqs": 8, "max_queue": 200, "max_batched_tokens": 64} | options
        super().__init__(own_model, **sizes, adapters=self.adapters)

    def generate_one(self, adapter: str, prompt: list[int] | None = None, max_tokens: int = 4) -> Sequence:
        """Generate one sequence with an adapter."""
        return self.generate([Sequence(prompt or [7, 8, 9], max_tokens, adapter=adapter)])[0]


@pytest.mark.parametrize("family", TARGETS)
def test_each_row_equals_its_merged_model_in_any_batch(family: str, tmp_path: Path) -> None:
    folders = folders_for(family, tmp_path)
    models = {name: merged(model(family), folder) for name, folder in folders.items()}
    harness = LoraHarness(model(family), folders)
    assert isinstance(harness.engine.runner, SequentialRunner if family == "bloom" else BatchedRunner)
    cases = [
        (prompt, min(max_tokens, 24), expected_tokens[: min(max_tokens, 24)])
        for prompt, max_tokens, expected_tokens in requests(family)[:6]
    ]
    expected = {
        name: [generate(own_model, prompt, max_tokens) for prompt, max_tokens, _ in cases]
        for name, own_model in models.items()
    }
    expected[""] = [expected_tokens for *_, expected_tokens in cases]
    for name in NAMES:
        others = [other for other in expected if other != name]
        assert all(sum(a != b for a, b in zip(expected[name], expected[other], strict=True)) >= 5 for other in others)
    sequences = {(name, i): Sequence(prompt, max_tokens, adapter=name) for i, (prompt, max_tokens, _) in enumerate(cases) for name in expected}  # fmt: skip
    harness.generate(list(sequences.values()))
    assert {key: sequence.tokens for key, sequence in sequences.items()} == {
        (name, i): expected[name][i] for name, i in sequences
    }
    speculative = LoraHarness(model(family), folders, num_speculative_tokens=4)
    again = {
        key: Sequence(sequence.prompt, sequence.max_tokens, adapter=sequence.adapter)
        for key, sequence in sequences.items()
    }
    speculative.generate(list(again.values()))
    assert {key: sequence.tokens for key, sequence in again.items()} == {
        key: sequence.tokens for key, sequence in sequences.items()
    }
    assert (speculative.engine.num_draft_tokens > 0) == (family != "bloom")
    if family != "bloom":  # whose sequences run one after another
        assert {"", *NAMES} in harness.forwards
    assert harness.adapters.num_loads == 3
    assert harness.engine.stats["adapters"] == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_merges_and_generates_the_same(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'manta-train[dev]'")
    folders = folders_for(family, tmp_path)
    for folder in folders.values():  # it loads what these tests write, and merges as they do
        peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(model(family)), folder).merge_and_unload()
        own_model = dict(merged(model(family), folder).named_parameters())
        assert all(torch.allclose(p, own_model[name], atol=1e-6) for name, p in peft_model.named_parameters())
    torch.manual_seed(1)
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")  # fmt: skip
    trained = peft.get_peft_model(copy.deepcopy(model(family)), options)
    trained.save_pretrained(tmp_path / "peft")
    alone = trained.merge_and_unload()
    harness = LoraHarness(model(family), folders | {"peft": tmp_path / "peft"})
    cases = [(prompt, min(max_tokens, 24)) for prompt, max_tokens, _ in requests(family)[:6]]
    sequences = [Sequence(prompt, max_tokens, adapter="peft") for prompt, max_tokens in cases]
    harness.generate(
        [
            *sequences,
            *(Sequence(prompt, max_tokens, adapter=name) for prompt, max_tokens in cases for name in ("", "poet")),
        ]
    )
    assert tokens_of(sequences) == [generate(alone, prompt, max_tokens) for prompt, max_tokens in cases]


@torch.inference_mode()
def test_other_rows_adapters_change_no_row(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    folders["infinite"] = save(tmp_path / "infinite", model("llama"), LINEAR, 9)
    tensors = safetensors.torch.load_file(folders["infinite"] / "adapter_model.safetensors")
    safetensors.torch.save_file(
        {key: 1e38 * tensor for key, tensor in tensors.items()}, folders["infinite"] / "adapter_model.safetensors"
    )
    own_model = copy.deepcopy(model("llama"))
    adapters = LoraAdapters(own_model, pin_adapters(folders), 4)
    for name in folders:
        adapters.load(name, ())
    runner = BatchedRunner(own_model, adapters)
    runner.reshape(4, 64)
    rows = [list(range(6, 30)), [40, 41, 42], [43], [44, 45]]

    def logits(*names: str) -> Tensor:
        return runner.run(
            [ScheduledSequence(slot, 0, ids, 1, name) for slot, (ids, name) in enumerate(zip(rows, names, strict=True))]
        )

    alone, batched = logits("", "", "", ""), logits("", "poet", "infinite", "clerk")
    assert torch.equal(batched[0], alone[0])
    assert not torch.allclose(batched[1], alone[1], atol=1e-2)
    assert not batched[2].isfinite().all()
    for row, name in ((1, "poet"), (3, "clerk")):
        expected_tokens = merged(model("llama"), folders[name])(torch.tensor([rows[row]])).logits[0, -1]
        assert torch.allclose(batched[row], expected_tokens, atol=1e-4 * float(expected_tokens.abs().max()))


def test_tokens_computed_by_another_adapter_are_computed_again(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    harness = LoraHarness(model("llama"), folders, max_batched_tokens=256)
    prompt = [number % 290 + 6 for number in range(0, 600, 11)]
    names = ["poet", "", "clerk", "poet", "", "clerk"]
    sequences = [harness.generate_one(name, prompt, 8) for name in names]
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0, 0] + [len(prompt) - 1] * 3
    models = {name: merged(model("llama"), folder) for name, folder in folders.items()} | {"": model("llama")}
    assert tokens_of(sequences) == [generate(models[name], prompt, 8) for name in names]


def test_least_recently_used_adapter_is_evicted(tmp_path: Path) -> None:
    harness = LoraHarness(model("llama"), folders_for("llama", tmp_path), max_loaded=2)
    first = [harness.generate_one(name).tokens for name in NAMES[:2]]
    assert [harness.generate_one("poet").tokens, harness.generate_one("clerk").tokens] == first
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["poet", "clerk"], 2)
    harness.generate_one("poet")
    harness.generate_one("judge")
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["poet", "judge"], 3)
    assert harness.generate_one("clerk").tokens == first[1]
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["judge", "clerk"], 4)
    harness.generate([Sequence([7, 8, i], 6, adapter=name) for i in range(6, 12) for name in ("", *NAMES)])
    assert harness.most_loaded == 2


def test_adapter_in_use_is_not_evicted(tmp_path: Path) -> None:
    harness = LoraHarness(model("llama"), folders_for("llama", tmp_path), max_loaded=1)
    endless = Sequence([7], 120, SamplingParams(logit_bias={EOS: -100.0}), adapter="poet")
    base, other = Sequence([8], 3), Sequence([8], 3, adapter="clerk")
    with paused(harness.engine, after=3):
        harness.engine.submit([endless])
        wait_for(lambda: endless.tokens)
        harness.engine.submit([base, other])
    for _ in range(3):
        harness.finished.get(timeout=60)
    assert (len(endless.tokens), endless.finish_reason) == (120, "length")
    assert base.scheduled_at < endless.finished_at <= other.scheduled_at
    assert list(harness.adapters.loaded) == ["clerk"]
    adapters = LoraAdapters(copy.deepcopy(model("llama")), harness.adapters.pins, 2)
    for name in ("poet", "clerk"):
        assert adapters.has_room({"", "poet"})
        adapters.load(name, {"", "poet"})
    assert not adapters.has_room({"poet", "clerk"})
    adapters.load("judge", {"poet"})  # evicts the least recently used one
    assert list(adapters.loaded) == ["poet", "judge"]


def test_adapter_changed_after_deployment_fails_only_its_own_sequences(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    harness = LoraHarness(model("llama"), folders)
    save(folders["poet"], model("llama"), TARGETS["llama"][0], 99)
    good = [Sequence([7, 8], 5, adapter="clerk"), Sequence([7, 8], 5)]
    bad = [Sequence([7, 8], 5, adapter="poet") for _ in range(2)]
    harness.generate([bad[0], good[0], bad[1], good[1]])
    assert {(sequence.finish_reason, sequence.error) for sequence in bad} == {
        ("error", "the adapter 'poet' can't be loaded any more")
    }
    assert tokens_of(good) == [generate(merged(model("llama"), folders["clerk"]), [7, 8], 5), generate(model("llama"), [7, 8], 5)]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("adapted") / "writer" / "bundle")


def _only_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _tensors(change: Callable[[str, Tensor], tuple[str, Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        safetensors.torch.save_file(dict(change(*item) for item in safetensors.torch.load_file(file).items()), file)

    return changed


def _named(old: str, new: str) -> Callable[[Path], None]:
    return _tensors(lambda key, tensor: (key.replace(old, new), tensor))


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (_only_pickled, r"adapter_model\.safetensors can't be read: give the folder of peft's `save_pretrained`"),
    "torn": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is no JSON object"),
    "kind": (_config(peft_type="IA3"), "is of peft's kind IA3"),
    "dora": (_config(use_dora=True), "has use_dora=True, which is not served"),
    "bias": (_config(bias="all"), "has bias=all, which is not served"),
    "alpha": (_config(lora_alpha=None), "has lora_alpha=None, which is no number"),
    "no rank": (_tensors(lambda key, tensor: (key, tensor[:0] if "A.weight" in key else tensor[:, :0])), "don't belong together"),
    "alphas": (_config(alpha_pattern={"q_proj": 3}), "has alpha_pattern="),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights=pissa, which changes the base"),
    "wide": (_tensors(lambda key, tensor: (key, torch.ones(4, 48) if "q_proj.lora_A" in key else tensor)), r"is for another base: \S+ has 32 inputs and 32 outputs, the adapter 48 and 32"),
    "deep": (_named("layers.1.", "layers.7."), "is for model.layers.7.self_attn.q_proj, and the model has no such layer"),
    "output": (_named("model.layers.1.self_attn.q_proj", "lm_head"), "is for lm_head, and the model has a Linear there"),
    "norm": (_named("layers.1.self_attn.q_proj", "norm"), "has a LlamaRMSNorm there"),
    "torn pair": (_named("q_proj.lora_B", "v_proj.lora_B"), "don't belong together"),
    "magnitude": (_named("lora_B.weight", "lora_magnitude_vector"), "is no LoRA matrix"),
    "nan": (_tensors(lambda key, tensor: (key, tensor * torch.nan)), "is not all finite numbers"),
    "empty": (lambda folder: safetensors.torch.save_file({}, folder / "adapter_model.safetensors"), "holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_adapter_is_refused_before_anything_starts(case: str, tiny: Config, bundle: Bundle, tmp_path: Path) -> None:  # fmt: skip
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    check_adapters(bundle, {"poet": str(folder)})
    change, message = UNFIT[case]
    change(folder)
    config = with_values(tiny, {"serve.adapters": {"poet": str(folder)}})
    with pytest.raises(UserError, match=message) as caught:
        deploy(config, {"writer": bundle.folder})
    assert str(caught.value).startswith("adapter 'poet'")
    assert "\n" not in str(caught.value)


def test_adapter_of_another_base_model_is_refused(tiny: Config, tiny_functions: Config, bundle: Bundle, tmp_path: Path) -> None:  # fmt: skip
    other = fresh_bundle(tiny, tmp_path / "other" / "bundle", seed=1)
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0, base_model_name_or_path=str(other.folder))
    check_adapters(other, {"poet": str(folder)})
    with pytest.raises(UserError, match=r"adapter 'poet' was trained on .*other/bundle, not on .*writer/bundle"):
        check_adapters(bundle, {"poet": str(folder)})
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"are for causal language models, and .* is for classification"):
        check_adapters(namer, {"poet": str(folder)})


def test_adapter_with_other_weights_is_another_version(tiny: Config, bundle: Bundle, tmp_path: Path) -> None:
    def version_id() -> str:
        config = with_values(tiny, {"serve.adapters": {"poet": str(tmp_path / "poet")}})
        return make_version("writer", bundle, config.serve).id

    save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    first = version_id()
    assert version_id() == first != make_version("writer", bundle, tiny.serve).id
    pin = pin_adapters({"poet": str(tmp_path / "poet")})["poet"]
    save(tmp_path / "poet", bundle.model(), ("q_proj",), 1)
    assert version_id() != first
    with pytest.raises(UserError, match="was changed since it was deployed"):
        load_adapter("poet", pin, bundle.model())


def test_replica_refuses_an_unknown_adapter(tiny: Config, bundle: Bundle, tmp_path: Path) -> None:
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    options = make_version("writer", bundle, with_values(tiny, {"serve.adapters": {"poet": str(folder)}}).serve).options
    threads = torch.get_num_threads()
    try:
        replica = Replica(str(bundle.folder), options)
        assert list(replica.describe().adapters) == ["poet"]
        # A request that went to a canary first, and was sent again to this version.
        job = CompletionRequest(prompt="x").job(adapter="clerk")
        assert asyncio.run(replica.complete(job)) == Failure("there is no adapter 'clerk' here", "model", 404)
        save(folder, bundle.model(), ("q_proj",), 1)
        with pytest.raises(UserError, match="was changed since it was deployed: deploy it again"):
            Replica(str(bundle.folder), options)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save(folder / name, bundle.model(), ("q_proj", "up_proj"), seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def client(ray: None, tiny: Config, bundle: Bundle, folders: dict[str, Path]) -> Iterator[httpx.Client]:
    named = {name: str(folder) for name, folder in folders.items()}
    config = with_values(tiny, {"serve.port": free_port(), "serve.adapters": named, "serve.max_adapters": 2, "serve.max_replicas": 1})  # fmt: skip
    endpoint: Endpoint = deploy(config, {"writer": bundle.folder})
    with httpx.Client(base_url=endpoint.url, timeout=60) as http_client:
        yield http_client
    endpoint.stop()


def test_endpoint_generates_with_each_adapter(client: httpx.Client, bundle: Bundle, folders: dict[str, Path]) -> None:
    base = bundle.model()
    models = {"writer": base} | {f"writer:{name}": merged(base, folder) for name, folder in folders.items()}
    models_by_id = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
    assert set(models_by_id) == set(models)
    assert (models_by_id["writer:poet"]["parent"], models_by_id["writer:poet"]["task"]) == ("writer", "completion")
    assert len({entry["hash"] for entry in models_by_id.values()}) == 4
    cases = [{"prompt": prompt, "max_tokens": 12} for prompt in PROMPTS[:4]]
    expected = {(name, i): prediction["text"] for name, own_model in models.items() for i, prediction in enumerate(bundle.objective().predict(own_model, cases))}  # fmt: skip

    def answer(key: tuple[str, int]) -> tuple[str, str]:
        body = client.post("/v1/completions", json={**cases[key[1]], "model": key[0], "temperature": 0}).json()
        return body["model"], body["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        results = dict(zip(expected, pool.map(answer, expected), strict=True))
    assert results == {key: (key[0], text) for key, text in expected.items()}
    assert len(set(expected.values())) >= 12

    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10, "temperature": 0}
    (expected_tokens,) = bundle.objective().predict(
        models["writer:clerk"], [{"prompt": "user: Hi\nassistant:", "max_tokens": 10}]
    )
    response = client.post("/v1/chat/completions", json=chat | {"model": "writer:clerk"}).json()
    assert (response["model"], response["choices"][0]["message"]["content"]) == (
        "writer:clerk",
        expected_tokens["text"],
    )
    with client.stream("POST", "/v1/chat/completions", json=chat | {"model": "writer:clerk", "stream": True}) as parts:
        events = [json.loads(line[6:]) for line in parts.iter_lines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == expected_tokens["text"]
    assert {event["model"] for event in events} == {"writer:clerk"}


def test_endpoint_counts_and_checks_adapters(client: httpx.Client, bundle: Bundle) -> None:
    for unknown in ("writer:nobody", "writer:", ":poet", "poet"):
        refused = client.post("/v1/completions", json={"model": unknown, "prompt": "x", "max_tokens": 1})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
        assert error["message"].endswith("there are writer, writer:clerk, writer:judge, writer:poet")
    refused = client.post("/v1/embeddings", json={"model": "writer:poet", "input": "x"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "adapters do not apply to embeddings: request model 'writer'")  # fmt: skip
    answer = client.post(
        "/v1/completions", json={"model": "writer:poet", "prompt": "x", "max_tokens": 2, "temperature": 0}
    )
    client.post("/v1/feedback", json={"request": answer.json()["id"], "rating": "up"}).raise_for_status()
    lines: list[str] = []

    def loaded() -> list[float]:
        lines[:] = client.get("/metrics").text.splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if line.startswith("manta_replica_adapters{")]

    values: list[float] = []
    wait_for(lambda: values.extend(loaded()) or values)  # a busy replica may not answer in time
    version = f'version="{bundle.hash[:12]}:poet"'
    assert any(
        line.startswith("manta_requests_total") and 'model="writer"' in line and version in line for line in lines
    )
    assert any(line.startswith("manta_feedback_total") and version in line for line in lines)
    assert values[0] <= 2
