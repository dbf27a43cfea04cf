"""LoRA adapters on one base: each row as its merged model alone, whatever shares its forward, its cache or its memory."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import queue
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
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.lora import LoraAdapters, pin_adapters, load_adapter, check_adapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence, SequentialRunner
from engine.serve.jobs import SamplingParams
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import wait_for
from tests.engine.serve.llm.paused_engine import paused
from tests.engine.serve.llm.test_engine import EOS, model, requests
from tests.engine.serve.http.test_api import PROMPTS
from tests.ports import free_port

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {  # of three adapters, by the ends of the layers' paths
    "llama": [("q_proj", "v_proj"), LINEAR, ("k_proj", "down_proj")],
    "gpt2": [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("mlp.c_proj",)],
    "bloom": [("query_key_value",), ("query_key_value", "dense", "dense_h_to_4h"), ("dense_4h_to_h",)],
}
OPTIONS: list[dict[str, Any]] = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 4, "use_rslora": True}, {"r": 2, "lora_alpha": 6}]  # fmt: skip
NAMES = ["poet", "clerk", "judge"]


def save(folder: Path, base: nn.Module, ends: tuple[str, ...], seed: int, **config: Any) -> Path:
    """Write an adapter of random weights as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "somebody/elses", "r": 4, "lora_alpha": 8,
             "use_rslora": False, "bias": "none", "modules_to_save": None, "target_modules": list(ends)} | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in base.named_modules():
        if path.endswith(ends) and isinstance(layer, (nn.Linear, Conv1D)):
            wide = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.3 * torch.randn(whole["r"], wide[0], generator=dice)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.3 * torch.randn(wide[1], whole["r"], generator=dice)
    assert tensors
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """Return a copy with W + scale B A (Hu et al. 2021, section 4.1) in place of each W."""
    made = copy.deepcopy(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        layer = made.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        more = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        weight.data += more.T if isinstance(layer, Conv1D) else more
    return made


def greedy(asked: nn.Module, prompt: list[int], most: int) -> list[int]:
    ids = torch.tensor([prompt])
    whole = asked.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0
    )  # type: ignore[operator]
    new: list[int] = whole[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] == EOS else new


def folders_for(kind: str, folder: Path) -> dict[str, Path]:
    ways = zip(NAMES, TARGETS[kind], OPTIONS, strict=True)
    return {name: save(folder / name, model(kind), ends, seed, **way) for seed, (name, ends, way) in enumerate(ways)}


class EngineHarness:
    """A generator with adapters, whose ended completions can be waited for; it notes which adapters shared a forward."""

    def __init__(self, base: nn.Module, folders: dict[str, Path], most: int = 16, **options: Any) -> None:
        self.ended: queue.Queue[Sequence] = queue.Queue()
        own = copy.deepcopy(base)
        self.adapters = LoraAdapters(own, pin_adapters(folders), most)
        self.together: list[set[str]] = []
        self.most_loaded = 0
        applied = self.adapters.active

        def noted(names: list[str]) -> Any:
            self.together.append(set(names))
            self.most_loaded = max(self.most_loaded, len(self.adapters.loaded))
            return applied(names)

        self.adapters.active = noted  # type: ignore[assignment,method-assign]
        sizes: dict[str, Any] = {
            "max_num_seqs": 8,
            "max_queue": 200,
            "max_batched_tokens": 64,
            "cache_tokens": None,
        } | options
        self.engine = TransformersEngine(
            own,
            128,
            **sizes,
            on_output=lambda news: [self.ended.put(it) for it in news if it.finish_reason],
            adapters=self.adapters,
        )

    def all(self, completions: list[Sequence]) -> list[Sequence]:
        self.engine.submit(completions)
        for _ in completions:
            self.ended.get(timeout=60)
        return completions

    def one(self, adapter: str, prompt: list[int] | None = None, most: int = 4) -> Sequence:
        return self.generate([Sequence(prompt or [7, 8, 9], most, adapter=adapter)])[0]


@pytest.mark.parametrize("kind", TARGETS)
def test_each_row_is_its_merged_model_in_any_company(kind: str, tmp_path: Path) -> None:
    folders = folders_for(kind, tmp_path)
    models = {name: merged(model(kind), folder) for name, folder in folders.items()}
    harness = EngineHarness(model(kind), folders)
    assert isinstance(harness.engine.runner, SequentialRunner if kind == "bloom" else BatchedRunner)
    asked = [(prompt, min(most, 24), right[: min(most, 24)]) for prompt, most, right in requests(kind)[:6]]
    wanted = {name: [greedy(it, prompt, most) for prompt, most, _ in asked] for name, it in models.items()}
    wanted[""] = [right for *_, right in asked]
    for name in NAMES:
        others = [other for other in wanted if other != name]
        assert all(sum(a != b for a, b in zip(wanted[name], wanted[other], strict=True)) >= 5 for other in others)
    completions = {(name, i): Sequence(prompt, most, adapter=name) for i, (prompt, most, _) in enumerate(asked) for name in wanted}  # fmt: skip
    harness.generate(list(completions.values()))
    assert {key: it.tokens for key, it in completions.items()} == {
        (name, i): wanted[name][i] for name, i in completions
    }
    guessing = EngineHarness(model(kind), folders, num_speculative_tokens=4)
    again = {key: Sequence(it.prompt, it.max_tokens, adapter=it.adapter) for key, it in completions.items()}
    guessing.generate(list(again.values()))
    assert {key: it.tokens for key, it in again.items()} == {key: it.tokens for key, it in completions.items()}
    assert (guessing.engine.num_draft_tokens > 0) == (kind != "bloom")
    if kind != "bloom":  # whose sequences run apart
        assert {"", *NAMES} in harness.together
    assert harness.adapters.num_loads == 3
    assert harness.engine.stats["adapters"] == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_says_the_same(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'manta-train[dev]'")
    folders = folders_for(kind, tmp_path)
    for folder in folders.values():  # it reads what these tests write, and merges as they do
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model(kind)), folder).merge_and_unload()
        own = dict(merged(model(kind), folder).named_parameters())
        assert all(torch.allclose(p, own[name], atol=1e-6) for name, p in theirs.named_parameters())
    torch.manual_seed(1)
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")  # fmt: skip
    trained = peft.get_peft_model(copy.deepcopy(model(kind)), options)
    trained.save_pretrained(tmp_path / "peft")
    alone = trained.merge_and_unload()
    harness = EngineHarness(model(kind), folders | {"peft": tmp_path / "peft"})
    asked = [(prompt, min(most, 24)) for prompt, most, _ in requests(kind)[:6]]
    completions = [Sequence(prompt, most, adapter="peft") for prompt, most in asked]
    harness.generate(
        [*completions, *(Sequence(prompt, most, adapter=name) for prompt, most in asked for name in ("", "poet"))]
    )
    assert [it.tokens for it in completions] == [greedy(alone, prompt, most) for prompt, most in asked]


@torch.inference_mode()
def test_no_row_feels_anothers_adapter(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    folders["mad"] = save(tmp_path / "mad", model("llama"), LINEAR, 9)
    tensors = safetensors.torch.load_file(folders["mad"] / "adapter_model.safetensors")
    safetensors.torch.save_file(
        {key: 1e38 * it for key, it in tensors.items()}, folders["mad"] / "adapter_model.safetensors"
    )
    own = copy.deepcopy(model("llama"))
    adapters = LoraAdapters(own, pin_adapters(folders), 4)
    for name in folders:
        adapters.load(name, ())
    forward = BatchedRunner(own, adapters)
    forward.shape(4, 64)
    rows = [list(range(6, 30)), [40, 41, 42], [43], [44, 45]]

    def logits(*names: str) -> Tensor:
        return forward.run(
            [ScheduledSequence(lane, 0, ids, 1, name) for lane, (ids, name) in enumerate(zip(rows, names, strict=True))]
        )

    alone, company = logits("", "", "", ""), logits("", "poet", "mad", "clerk")
    assert torch.equal(company[0], alone[0])
    assert not torch.allclose(company[1], alone[1], atol=1e-2)
    assert not company[2].isfinite().generate()
    for row, name in ((1, "poet"), (3, "clerk")):
        right = merged(model("llama"), folders[name])(torch.tensor([rows[row]])).logits[0, -1]
        assert torch.allclose(company[row], right, atol=1e-4 * float(right.abs().max()))


def test_what_another_adapter_read_is_read_anew(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    harness = EngineHarness(model("llama"), folders, max_batched_tokens=256)
    prompt = [dice % 290 + 6 for dice in range(0, 600, 11)]
    names = ["poet", "", "clerk", "poet", "", "clerk"]
    found = [harness.one(name, prompt, 8) for name in names]
    assert [it.num_cached_tokens for it in found] == [0, 0, 0] + [len(prompt) - 1] * 3
    models = {name: merged(model("llama"), folder) for name, folder in folders.items()} | {"": model("llama")}
    assert [it.tokens for it in found] == [greedy(models[name], prompt, 8) for name in names]


def test_the_one_longest_out_of_use_makes_room(tmp_path: Path) -> None:
    harness = EngineHarness(model("llama"), folders_for("llama", tmp_path), most=2)
    first = [harness.one(name).tokens for name in NAMES[:2]]
    assert [harness.one("poet").tokens, harness.one("clerk").tokens] == first
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["poet", "clerk"], 2)
    harness.one("poet")
    harness.one("judge")
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["poet", "judge"], 3)
    assert harness.one("clerk").tokens == first[1]
    assert (list(harness.adapters.loaded), harness.adapters.num_loads) == (["judge", "clerk"], 4)
    harness.generate([Sequence([7, 8, i], 6, adapter=name) for i in range(6, 12) for name in ("", *NAMES)])
    assert harness.most_loaded == 2


def test_one_in_use_is_not_given_up(tmp_path: Path) -> None:
    harness = EngineHarness(model("llama"), folders_for("llama", tmp_path), most=1)
    endless = Sequence([7], 120, SamplingParams(logit_bias={EOS: -100.0}), adapter="poet")
    base, other = Sequence([8], 3), Sequence([8], 3, adapter="clerk")
    with paused(harness.engine, after=3):
        harness.engine.submit([endless])
        wait_for(lambda: endless.tokens)
        harness.engine.submit([base, other])
    for _ in range(3):
        harness.ended.get(timeout=60)
    assert (len(endless.tokens), endless.finish_reason) == (120, "length")
    assert base.scheduled_at < endless.finished_at <= other.scheduled_at
    assert list(harness.adapters.loaded) == ["clerk"]
    adapters = LoraAdapters(copy.deepcopy(model("llama")), harness.adapters.known, 2)
    for name in ("poet", "clerk"):
        assert adapters.has_room({"", "poet"})
        adapters.load(name, {"", "poet"})
    assert not adapters.has_room({"poet", "clerk"})
    adapters.load("judge", {"poet"})  # which is the one longest out of use
    assert list(adapters.loaded) == ["poet", "judge"]


def test_one_that_was_changed_meanwhile_fails_alone(tmp_path: Path) -> None:
    folders = folders_for("llama", tmp_path)
    harness = EngineHarness(model("llama"), folders)
    save(folders["poet"], model("llama"), TARGETS["llama"][0], 99)
    good = [Sequence([7, 8], 5, adapter="clerk"), Sequence([7, 8], 5)]
    bad = [Sequence([7, 8], 5, adapter="poet") for _ in range(2)]
    harness.generate([bad[0], good[0], bad[1], good[1]])
    assert {(it.finish_reason, it.error) for it in bad} == {("error", "the adapter 'poet' can't be loaded any more")}
    assert [it.tokens for it in good] == [greedy(merged(model("llama"), folders["clerk"]), [7, 8], 5), greedy(model("llama"), [7, 8], 5)]  # fmt: skip


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
        safetensors.torch.save_file(dict(change(*it) for it in safetensors.torch.load_file(file).items()), file)

    return changed


def _named(old: str, new: str) -> Callable[[Path], None]:
    return _tensors(lambda key, it: (key.replace(old, new), it))


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (_only_pickled, r"adapter_model\.safetensors can't be read: give the folder of peft's `save_pretrained`"),
    "torn": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is no JSON object"),
    "kind": (_config(peft_type="IA3"), "is of peft's kind IA3"),
    "dora": (_config(use_dora=True), "has use_dora=True, which is not served"),
    "bias": (_config(bias="all"), "has bias=all, which is not served"),
    "alpha": (_config(lora_alpha=None), "has lora_alpha=None, which is no number"),
    "no rank": (_tensors(lambda key, it: (key, it[:0] if "A.weight" in key else it[:, :0])), "don't belong together"),
    "alphas": (_config(alpha_pattern={"q_proj": 3}), "has alpha_pattern="),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights=pissa, which changes the base"),
    "wide": (_tensors(lambda key, it: (key, torch.ones(4, 48) if "q_proj.lora_A" in key else it)), r"is for another base: \S+ has 32 inputs and 32 outputs, the adapter 48 and 32"),
    "deep": (_named("layers.1.", "layers.7."), "is for model.layers.7.self_attn.q_proj, and the model has no such layer"),
    "output": (_named("model.layers.1.self_attn.q_proj", "lm_head"), "is for lm_head, and the model has a Linear there"),
    "norm": (_named("layers.1.self_attn.q_proj", "norm"), "has a LlamaRMSNorm there"),
    "torn pair": (_named("q_proj.lora_B", "v_proj.lora_B"), "don't belong together"),
    "magnitude": (_named("lora_B.weight", "lora_magnitude_vector"), "is no LoRA matrix"),
    "nan": (_tensors(lambda key, it: (key, it * torch.nan)), "is not all finite numbers"),
    "empty": (lambda folder: safetensors.torch.save_file({}, folder / "adapter_model.safetensors"), "holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_refused_before_anything_starts(what: str, tiny: Config, bundle: Bundle, tmp_path: Path) -> None:  # fmt: skip
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    check_adapters(bundle, {"poet": str(folder)})
    change, sentence = UNFIT[what]
    change(folder)
    config = with_values(tiny, {"serve.adapters": {"poet": str(folder)}})
    with pytest.raises(UserError, match=sentence) as caught:
        deploy(config, {"writer": bundle.folder})
    assert str(caught.value).startswith("adapter 'poet'")
    assert "\n" not in str(caught.value)


def test_the_adapter_of_another_base_is_refused(tiny: Config, tiny_functions: Config, bundle: Bundle, tmp_path: Path) -> None:  # fmt: skip
    other = fresh_bundle(tiny, tmp_path / "other" / "bundle", seed=1)
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0, base_model_name_or_path=str(other.folder))
    check_adapters(other, {"poet": str(folder)})
    with pytest.raises(UserError, match=r"adapter 'poet' was trained on .*other/bundle, not on .*writer/bundle"):
        check_adapters(bundle, {"poet": str(folder)})
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"are for bundles that write, and .* is for classification"):
        check_adapters(namer, {"poet": str(folder)})


def test_another_adapter_is_another_version(tiny: Config, bundle: Bundle, tmp_path: Path) -> None:
    def mark() -> str:
        config = with_values(tiny, {"serve.adapters": {"poet": str(tmp_path / "poet")}})
        return make_version("writer", bundle, config.serve).id

    save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    first = mark()
    assert mark() == first != make_version("writer", bundle, tiny.serve).id
    it = pin_adapters({"poet": str(tmp_path / "poet")})["poet"]
    save(tmp_path / "poet", bundle.model(), ("q_proj",), 1)
    assert mark() != first
    with pytest.raises(UserError, match="was changed since it was deployed"):
        load_adapter("poet", it, bundle.model())


def test_a_replica_knows_its_adapters_and_no_others(tiny: Config, bundle: Bundle, tmp_path: Path) -> None:
    folder = save(tmp_path / "poet", bundle.model(), ("q_proj",), 0)
    options = make_version("writer", bundle, with_values(tiny, {"serve.adapters": {"poet": str(folder)}}).serve).options
    threads = torch.get_num_threads()
    try:
        replica = Replica(str(bundle.folder), options)
        assert list(replica.describe()["adapters"]) == ["poet"]
        # A request that fell to a version on trial, and was asked again of this one.
        job = CompletionRequest(prompt="x").job() | {"adapter": "clerk"}
        told = {"error": "there is no adapter 'clerk' here", "param": "model", "status": 404}
        assert asyncio.run(replica.complete(job)) == told
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
    up: Endpoint = deploy(config, {"writer": bundle.folder})
    with httpx.Client(base_url=up.url, timeout=60) as asking:
        yield asking
    up.stop()


def test_an_endpoint_answers_for_each_adapter(client: httpx.Client, bundle: Bundle, folders: dict[str, Path]) -> None:
    base = bundle.model()
    models = {"writer": base} | {f"writer:{name}": merged(base, folder) for name, folder in folders.items()}
    listed = {it["id"]: it for it in client.get("/v1/models").json()["data"]}
    assert set(listed) == set(models)
    assert (listed["writer:poet"]["parent"], listed["writer:poet"]["task"]) == ("writer", "completion")
    assert len({it["hash"] for it in listed.values()}) == 4
    asked = [{"prompt": prompt, "max_tokens": 12} for prompt in PROMPTS[:4]]
    wanted = {(name, i): it["text"] for name, own in models.items() for i, it in enumerate(bundle.objective().predict(own, asked))}  # fmt: skip

    def answer(key: tuple[str, int]) -> tuple[str, str]:
        body = client.post("/v1/completions", json={**asked[key[1]], "model": key[0], "temperature": 0}).json()
        return body["model"], body["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(wanted, pool.map(answer, wanted), strict=True))
    assert found == {key: (key[0], text) for key, text in wanted.items()}
    assert len(set(wanted.values())) >= 12

    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10, "temperature": 0}
    (right,) = bundle.objective().predict(
        models["writer:clerk"], [{"prompt": "user: Hi\nassistant:", "max_tokens": 10}]
    )
    said = client.post("/v1/chat/completions", json=chat | {"model": "writer:clerk"}).json()
    assert (said["model"], said["choices"][0]["message"]["content"]) == ("writer:clerk", right["text"])
    with client.stream("POST", "/v1/chat/completions", json=chat | {"model": "writer:clerk", "stream": True}) as parts:
        events = [json.loads(line[6:]) for line in parts.iter_lines() if line.startswith("data: {")]
    assert "".join(it["choices"][0]["delta"].get("content") or "" for it in events) == right["text"]
    assert {it["model"] for it in events} == {"writer:clerk"}


def test_an_endpoint_tells_adapters_apart(client: httpx.Client, bundle: Bundle) -> None:
    for unknown in ("writer:nobody", "writer:", ":poet", "poet"):
        refused = client.post("/v1/completions", json={"model": unknown, "prompt": "x", "max_tokens": 1})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
        assert error["message"].endswith("there are writer, writer:clerk, writer:judge, writer:poet")
    refused = client.post("/v1/embeddings", json={"model": "writer:poet", "input": "x"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "adapters write, and 'writer' embeds without them: ask for model 'writer'")  # fmt: skip
    answer = client.post(
        "/v1/completions", json={"model": "writer:poet", "prompt": "x", "max_tokens": 2, "temperature": 0}
    )
    client.post("/v1/feedback", json={"request": answer.json()["id"], "rating": "up"}).raise_for_status()
    lines: list[str] = []

    def loaded() -> list[float]:
        lines[:] = client.get("/metrics").text.splitlines()
        return [float(it.rpartition(" ")[2]) for it in lines if it.startswith("manta_replica_adapters{")]

    told: list[float] = []
    wait_for(lambda: told.extend(loaded()) or told)  # a busy replica may not tell in time
    version = f'version="{bundle.hash[:12]}:poet"'
    assert any(
        line.startswith("manta_requests_total") and 'model="writer"' in line and version in line for line in lines
    )
    assert any(line.startswith("manta_feedback_total") and version in line for line in lines)
    assert told[0] <= 2
