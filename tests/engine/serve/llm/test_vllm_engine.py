"""vLLM as the generator. Those that need one run with MANTA_VLLM_PYTHON=the Python of an environment that has it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
import torch
from torch import nn

from engine.bundles.bundle import Bundle, Manifest
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.serve.deploy import deploy
from engine.serve.preflight import check_servable
from engine.serve.llm.sequence import Sequence, QueueFull
from engine.serve.llm.lora import pin_adapters
from engine.serve.jobs import SamplingParams
from engine.serve.llm.structured_output import GrammarCompiler
from engine.serve.llm.vllm_engine import WORKER, VllmEngine, check_vllm_python, verified_engine
from engine.serve.llm.completions import notify_listeners
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, metrics_at_rest, processes, wait_for
from tests.engine.serve.llm.test_lora import merged, save
from tests.ports import free_port

PYTHON = os.environ.get("MANTA_VLLM_PYTHON", "")
OPTIONS = {
    "generator": "vllm", "vllm_python": PYTHON, "vllm_options": {"enforce_eager": True}, "max_num_seqs": 4, "max_queue": 40,
    "cpus_per_replica": 1, "max_replicas": 1,
}  # fmt: skip
WIDE = {
    "model.hidden_size": 128,
    "model.intermediate_size": 128,
}  # heads of 32, the smallest that vLLM's CPU kernel takes
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["left", "right"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def with_vllm(test: Any) -> Any:
    """Mark a test that starts vLLM, which takes ten seconds or more."""
    needed = pytest.mark.skipif(not PYTHON, reason="MANTA_VLLM_PYTHON names no Python that has vLLM")
    return pytest.mark.slow(needed(test))


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(with_values(tiny, WIDE), tmp_path_factory.mktemp("vllm") / "writer" / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> nn.Module:
    return bundle.model()


@pytest.fixture(scope="module")
def folders(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    ways: dict[str, Any] = {"poet": {"r": 4, "lora_alpha": 8}, "clerk": {"r": 12, "lora_alpha": 4, "use_rslora": True}}
    return {
        name: save(folder / name, model, ("q_proj", "v_proj", "down_proj"), seed, **way)
        for seed, (name, way) in enumerate(ways.items())
    }


@pytest.fixture(scope="module")
def vllm(bundle: Bundle, folders: dict[str, Path]) -> Iterator[VllmEngine]:
    options = ServeConfig(**OPTIONS, adapters=pin_adapters(folders), max_adapters=1)  # type: ignore[arg-type]
    engine = VllmEngine(bundle.folder, options, torch.float32, wake)
    yield engine
    engine.close()


def wake(news: list[Sequence]) -> None:
    notify_listeners([completion for completion in news if completion.listener])


def requests(bundle: Bundle) -> list[tuple[list[int], int]]:
    """Twelve ragged (prompt, max_tokens)."""
    dice, vocabulary = random.Random(0), len(bundle.processor())
    return [
        ([dice.randrange(6, vocabulary) for _ in range(dice.randrange(1, 60))], dice.randrange(1, 50))
        for _ in range(12)
    ]


def greedy(asked: nn.Module, prompt: list[int], most: int) -> list[int]:
    ids, ends = torch.tensor([prompt]), asked.generation_config.eos_token_id  # type: ignore[union-attr]
    whole = asked.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=1)  # type: ignore[operator]  # fmt: skip
    new: list[int] = whole[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] == ends else new


@with_vllm
def test_greedy_is_generate_in_company(vllm: VllmEngine, bundle: Bundle, model: nn.Module) -> None:
    asked = requests(bundle)
    found = [Sequence(prompt, most, streams=i % 2 == 0) for i, (prompt, most) in enumerate(asked)]
    vllm.generate(found)
    assert [it.tokens for it in found] == [greedy(model, prompt, most) for prompt, most in asked]
    assert {it.finish_reason for it in found} <= {"stop", "length"}
    assert all(it.queued_at <= it.scheduled_at < it.first_token_at <= it.finished_at for it in found)
    again = Sequence([*asked[3][0], *asked[4][0]], 4)
    vllm.generate([again, same := Sequence(again.prompt, 4)])
    assert same.tokens == again.tokens
    counted = vllm.stats
    assert (counted["running"], counted["waiting"], counted["cached_tokens"]) == (0, 0, 0)
    assert counted["steps"] < counted["rows"] <= 4 * counted["steps"]
    assert counted["cache_tokens"] >= 4 * vllm.limit == 4 * 128


@with_vllm
def test_an_end_is_told_and_left_out(vllm: VllmEngine, model: nn.Module) -> None:
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    it = Sequence([7, 8], 20, SamplingParams(logit_bias={int(end): 100.0}), num_logprobs=0)
    vllm.generate([it])
    assert (it.tokens, it.finish_reason, [score.token for score in it.token_logprobs]) == ([], "stop", [end])


@with_vllm
def test_a_seed_repeats_in_any_company(vllm: VllmEngine, bundle: Bundle) -> None:
    prompt = requests(bundle)[1][0]
    ways = [SamplingParams(1.0), SamplingParams(0.8, top_p=0.9), SamplingParams(1.2, top_k=20, frequency_penalty=0.5)]

    def seeded() -> list[Sequence]:
        return [Sequence(prompt, 30, way, seed=3) for way in ways]

    alone = seeded()
    for it in alone:
        vllm.generate([it])
    others = [Sequence(other, most, SamplingParams(1.0)) for other, most in requests(bundle)[:6]]
    vllm.generate([*others, *(mixed := seeded())])
    assert [it.tokens for it in mixed] == [it.tokens for it in alone]
    free = [Sequence(prompt, 30, SamplingParams(1.0)) for _ in range(2)]
    vllm.generate([*free, other := Sequence(prompt, 30, SamplingParams(1.0), seed=4)])
    assert len({tuple(it.tokens) for it in (*free, other, alone[0])}) == 4


@with_vllm
def test_scores_are_the_models_own(vllm: VllmEngine, bundle: Bundle, model: nn.Module) -> None:
    prompt = requests(bundle)[0][0]
    it = Sequence(prompt, 6, SamplingParams(1.5, presence_penalty=1.0), seed=0, num_logprobs=3, needs_prompt_logprobs=True)
    whole = Sequence((prompt * 128)[:128], 0, num_logprobs=0, needs_prompt_logprobs=True)  # as long as may be
    vllm.generate([it, whole])
    with torch.no_grad():
        right = model(torch.tensor([prompt + it.tokens])).logits[0].log_softmax(-1)
    told = [*it.prompt_logprobs, *it.token_logprobs]
    assert [score.token for score in told] == [*prompt, *it.tokens][1:]
    for row, score in zip(right, told, strict=False):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-3)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()
    assert (whole.tokens, whole.finish_reason, len(whole.prompt_logprobs)) == ([], "length", 127)


@with_vllm
def test_any_seed_gives_json_of_the_schema(vllm: VllmEngine, bundle: Bundle) -> None:
    tokenizer = bundle.processor()
    structure = GrammarCompiler(tokenizer)
    grammar = structure.compile(json.dumps(SCHEMA))
    asked = [
        Sequence([7, 8], 90, SamplingParams(1.0), seed=i, mask=structure.mask(grammar), json_schema=json.dumps(SCHEMA))
        for i in range(6)
    ]
    vllm.generate(asked)
    texts = [tokenizer.decode(it.tokens) for it in asked]
    assert {it.finish_reason for it in asked} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


@with_vllm
def test_an_adapter_is_its_merged_model(vllm: VllmEngine, bundle: Bundle, model: nn.Module, folders: dict[str, Path]) -> None:  # fmt: skip
    prompt = requests(bundle)[2][0]
    names = ["poet", "", "clerk", "poet"]
    asked = [Sequence(prompt, 12, adapter=name) for name in names]
    vllm.generate(asked)
    models = {"": model} | {name: merged(model, folder) for name, folder in folders.items()}
    assert [it.tokens for it in asked] == [greedy(models[name], prompt, 12) for name in names]
    assert len({tuple(it.tokens) for it in asked}) == 3
    assert vllm.stats["adapters"] == 1
    assert vllm.stats["adapter_loads"] >= 2


@with_vllm
def test_a_changed_adapter_and_a_bad_token_are_their_own_requests_affair(vllm: VllmEngine, folders: dict[str, Path]) -> None:  # fmt: skip
    vllm.generate([Sequence([7], 1, adapter="poet")])
    file = folders["clerk"] / "adapter_config.json"
    before = file.read_text()
    file.write_text(before + " ")
    changed, bad, good = Sequence([7], 3, adapter="clerk"), Sequence([10**8], 3), Sequence([7], 3)
    with pytest.raises(UserError, match=r"'clerk' .* was changed"):
        vllm.generate([changed, bad, good])
    file.write_text(before)
    assert [it.finish_reason for it in (changed, bad, good)] == ["error", "error", "length"]
    assert "10000000" in bad.error


@with_vllm
def test_who_left_or_waited_too_long_takes_no_place(vllm: VllmEngine, model: nn.Module) -> None:
    never = SamplingParams(logit_bias={int(model.generation_config.eos_token_id): -100.0})  # type: ignore[union-attr]
    slow = [Sequence([7], 120, never) for _ in range(4)]
    vllm.submit(slow)
    wait_for(lambda: all(it.tokens for it in slow))
    late, left = Sequence([8], 5, deadline=time.monotonic() - 1), Sequence([9], 5)
    vllm.submit([late, left])
    with pytest.raises(QueueFull):
        vllm.submit([Sequence([9], 5)] * 41)
    vllm.abort([*slow, left])
    vllm.generate([after := Sequence([9], 2)])
    assert [it.finish_reason for it in (*slow, late, left, after)] == ["cancelled"] * 4 + ["expired", "expired", "length"]
    assert max(len(it.tokens) for it in slow) < 120
    assert vllm.stats["running"] == 0
    with pytest.raises(ValueError, match="128 tokens"):
        vllm.submit([Sequence([7] * 100, 29)])


@with_vllm
def test_users_take_turns(vllm: VllmEngine) -> None:
    many, few = [Sequence([7], 4, client="many") for _ in range(16)], Sequence([7], 4, client="few")
    vllm.generate([*many, few])
    assert sum(it.scheduled_at < few.scheduled_at for it in many) <= 5


def altered(bundle: Bundle, folder: Path) -> Bundle:
    """Return a copy whose recorded answers are others, and whose hashes are right."""
    copy = Path(shutil.copytree(bundle.folder, folder))
    manifest = json.loads((copy / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] -= 0.01
    manifest["hash"] = Manifest(**manifest).content_hash()
    (copy / "manta.json").write_text(json.dumps(manifest))
    return Bundle.open(copy)


@with_vllm
def test_an_answer_other_than_recorded_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    before = workers()
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        verified_engine(altered(bundle, tmp_path / "bundle"), ServeConfig(**OPTIONS), torch.float32, wake, no_end)  # type: ignore[arg-type]  # fmt: skip
    assert workers() == before


def workers() -> set[psutil.Process]:
    return {it for it in psutil.Process().children() if str(WORKER) in it.cmdline()}


def no_end() -> None:
    raise AssertionError("it was ended from here")


@with_vllm
def test_a_killed_worker_is_noticed(bundle: Bundle) -> None:
    gone, before = threading.Event(), workers()
    engine = verified_engine(bundle, ServeConfig(**OPTIONS), torch.float32, wake, gone.set)  # type: ignore[arg-type]
    running, waiting = [Sequence([7], 120) for _ in range(4)], Sequence([8], 5)
    engine.submit([*running, waiting])
    wait_for(lambda: running[0].tokens)
    assert engine.is_alive
    (worker,) = workers() - before
    worker.kill()
    wait_for(lambda: waiting.finish_reason)
    assert {(it.finish_reason, it.error) for it in (*running, waiting)} == {("error", "vLLM has ended")}
    assert gone.is_set()
    assert not engine.is_alive
    with pytest.raises(UserError, match="vLLM has ended"):
        engine.generate([Sequence([7], 3)])
    engine.close()


@with_vllm
def test_vllm_says_which_option_it_does_not_have(bundle: Bundle) -> None:
    options = ServeConfig(**OPTIONS | {"vllm_options": {"enforce_eagre": True}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"serve.vllm_options.enforce_eagre .* did you mean 'enforce_eager'\?"):
        VllmEngine(bundle.folder, options, torch.float32)


@with_vllm
@pytest.mark.usefixtures("ray")
def test_an_endpoint_with_vllm(bundle: Bundle, model: nn.Module, tiny: Config, tmp_path: Path) -> None:
    options = {f"serve.{key}": value for key, value in OPTIONS.items()}
    config = with_values(tiny, options | {"serve.port": free_port(), "runs_dir": str(tmp_path)})
    endpoint = deploy(config, {"writer": bundle.folder})
    try:
        prompt = "def f(x):\n    return"
        (right,) = bundle.objective().predict(model, [{"prompt": prompt, "max_tokens": 24}])
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            whole = client.post("/v1/completions", json=body | {"logprobs": 2, "echo": True}).json()
            assert whole["choices"][0]["text"] == prompt + right["text"]
            logprobs = whole["choices"][0]["logprobs"]["token_logprobs"]
            assert all(math.isfinite(it) for it in logprobs[1:])
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
            assert lines[-1] == "[DONE]"
            parts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
            assert "".join(parts) == right["text"]
            assert len(parts) > 2
            refused = client.post("/v1/embeddings", json={"model": "writer", "input": "x"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
            form = {"type": "json_schema", "json_schema": {"name": "side", "schema": SCHEMA}}
            answer = client.post("/v1/completions", json=body | {"max_tokens": 60, "temperature": 1, "response_format": form})  # fmt: skip
            jsonschema.validate(json.loads(answer.json()["choices"][0]["text"]), SCHEMA)
        assert any('manta_replica_cache_tokens{model="writer"' in line for line in metrics_at_rest(endpoint.url))
        with background_load(endpoint.url, body) as noted:
            wait_for(lambda: len(noted) > 3)
            killed = set(processes(str(WORKER))) - workers()
            for it in killed:
                it.kill()
            answered = len(noted)
            wait_for(lambda: len(noted) > answered + 10)
        assert len(killed) == 1
        assert {it.status for it in noted} == {200}  # those that it had begun were given to the next
    finally:
        endpoint.stop()
    file = Path(shutil.copytree(bundle.folder, tmp_path / "changed")) / "model.safetensors"
    whole_file = bytearray(file.read_bytes())
    whole_file[-1] ^= 1
    file.write_bytes(whole_file)
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        deploy(config, {"writer": file.parent})


def test_a_python_without_vllm_is_told(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"needs vLLM, and {sys.executable} has none: make an environment"):
        check_vllm_python(ServeConfig(generator="vllm"))
    with pytest.raises(UserError, match=r"serve.vllm_python=.*python can't be run"):
        check_servable(bundle, ServeConfig(generator="vllm", vllm_python=str(tmp_path / "python")))


def test_a_worker_that_ends_before_it_is_ready_is_told(bundle: Bundle, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *find_spec*) exit 0;; *) exit 3;; esac\n')
    python.chmod(0o755)
    with pytest.raises(UserError, match="vLLM ended before it was ready"):
        VllmEngine(bundle.folder, ServeConfig(generator="vllm", vllm_python=str(python)), torch.float32)


def test_a_bundle_that_does_not_write_is_refused(tiny_functions: Config, tmp_path: Path) -> None:
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"serve\.generator=vllm is for bundles that generate text"):
        check_servable(namer, ServeConfig(generator="vllm"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"serve.generator": "vlm"}, "not one of transformers, vllm; did you mean 'vllm'"),
        ({"serve.vllm_python": "python"}, "serve.vllm_python is for serve.generator=vllm"),
        ({"serve.vllm_options": {"enforce_eager": True}}, "serve.vllm_options is for serve.generator=vllm"),
        (
            {"serve.generator": "vllm", "serve.quantize": "int8"},
            "serve.quantize=int8 is for serve.generator=transformers",
        ),
        ({"serve.generator": "vllm", "serve.compile": True}, "serve.compile=True is for"),
        ({"serve.generator": "vllm", "serve.num_speculative_tokens": 4}, "serve.num_speculative_tokens=4 is for"),
        ({"serve.generator": "vllm", "serve.vllm_options": {"dtype": "half"}}, "use serve.precision="),
        ({"serve.generator": "vllm", "serve.gpus_per_replica": 1.5}, "use a whole number"),
    ],
)
def test_options_that_contradict_each_other(tiny: Config, values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        with_values(tiny, values)
