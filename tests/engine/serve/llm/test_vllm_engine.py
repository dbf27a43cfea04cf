"""vLLM as the engine. Most tests need the Python of an environment with vLLM in MANTA_VLLM_PYTHON."""

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
from engine.serve.jobs import SamplingParams
from engine.serve.llm.completions import notify_listeners
from engine.serve.llm.lora import pin_adapters
from engine.serve.llm.sequence import QueueFull, Sequence
from engine.serve.llm.structured_output import GrammarCompiler
from engine.serve.llm.vllm_engine import WORKER, VllmEngine, check_vllm_python, verified_engine
from engine.serve.preflight import check_servable
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, metrics_at_rest, processes, wait_for
from tests.engine.serve.llm.engine_harness import tokens_of
from tests.engine.serve.llm.test_lora import merged, save
from tests.ports import free_port

FAKE_WORKER = Path(__file__).with_name("fake_vllm_worker.py")
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
    configs: dict[str, Any] = {
        "poet": {"r": 4, "lora_alpha": 8},
        "clerk": {"r": 12, "lora_alpha": 4, "use_rslora": True},
    }
    return {
        name: save(folder / name, model, ("q_proj", "v_proj", "down_proj"), seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def vllm(bundle: Bundle, folders: dict[str, Path]) -> Iterator[VllmEngine]:
    options = ServeConfig(**OPTIONS, adapters=pin_adapters(folders), max_adapters=1)  # type: ignore[arg-type]
    engine = VllmEngine(bundle.folder, options, torch.float32, notify)
    yield engine
    engine.close()


def notify(outputs: list[Sequence]) -> None:
    notify_listeners([sequence for sequence in outputs if sequence.listener])


def requests(bundle: Bundle) -> list[tuple[list[int], int]]:
    """Twelve ragged (prompt, max_tokens)."""
    rng, vocab_size = random.Random(0), len(bundle.processor())
    return [
        ([rng.randrange(6, vocab_size) for _ in range(rng.randrange(1, 60))], rng.randrange(1, 50)) for _ in range(12)
    ]


def greedy(own_model: nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    ids, eos = torch.tensor([prompt]), own_model.generation_config.eos_token_id  # type: ignore[union-attr]
    output = own_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=1)  # type: ignore[operator]  # fmt: skip
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated[:-1] if generated[-1] == eos else generated


@with_vllm
def test_greedy_tokens_equal_generate_in_a_batch(vllm: VllmEngine, bundle: Bundle, model: nn.Module) -> None:
    cases = requests(bundle)
    sequences = [Sequence(prompt, max_tokens, streams=i % 2 == 0) for i, (prompt, max_tokens) in enumerate(cases)]
    vllm.generate(sequences)
    assert tokens_of(sequences) == [greedy(model, prompt, max_tokens) for prompt, max_tokens in cases]
    assert {sequence.finish_reason for sequence in sequences} <= {"stop", "length"}
    for sequence in sequences:
        assert sequence.queued_at <= sequence.scheduled_at < sequence.first_token_at <= sequence.finished_at
    again = Sequence([*cases[3][0], *cases[4][0]], 4)
    vllm.generate([again, same := Sequence(again.prompt, 4)])
    assert same.tokens == again.tokens
    stats = vllm.stats
    assert (stats["running"], stats["waiting"], stats["cached_tokens"]) == (0, 0, 0)
    assert stats["steps"] < stats["rows"] <= 4 * stats["steps"]
    assert stats["cache_tokens"] >= 4 * vllm.max_seq_len == 4 * 128


@with_vllm
def test_end_token_has_a_logprob_and_is_left_out(vllm: VllmEngine, model: nn.Module) -> None:
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    sequence = Sequence([7, 8], 20, SamplingParams(logit_bias={int(end): 100.0}), num_logprobs=0)
    vllm.generate([sequence])
    assert (sequence.tokens, sequence.finish_reason, [entry.token for entry in sequence.token_logprobs]) == (
        [],
        "stop",
        [end],
    )


@with_vllm
def test_seed_repeats_in_any_batch(vllm: VllmEngine, bundle: Bundle) -> None:
    prompt = requests(bundle)[1][0]
    samplings = [
        SamplingParams(1.0),
        SamplingParams(0.8, top_p=0.9),
        SamplingParams(1.2, top_k=20, frequency_penalty=0.5),
    ]

    def seeded() -> list[Sequence]:
        return [Sequence(prompt, 30, sampling, seed=3) for sampling in samplings]

    alone = seeded()
    for sequence in alone:
        vllm.generate([sequence])
    others = [Sequence(other, max_tokens, SamplingParams(1.0)) for other, max_tokens in requests(bundle)[:6]]
    vllm.generate([*others, *(seeded_again := seeded())])
    assert tokens_of(seeded_again) == tokens_of(alone)
    unseeded = [Sequence(prompt, 30, SamplingParams(1.0)) for _ in range(2)]
    vllm.generate([*unseeded, other := Sequence(prompt, 30, SamplingParams(1.0), seed=4)])
    assert len({tuple(sequence.tokens) for sequence in (*unseeded, other, alone[0])}) == 4


@with_vllm
def test_logprobs_are_the_models_own(vllm: VllmEngine, bundle: Bundle, model: nn.Module) -> None:
    prompt = requests(bundle)[0][0]
    sequence = Sequence(
        prompt, 6, SamplingParams(1.5, presence_penalty=1.0), seed=0, num_logprobs=3, needs_prompt_logprobs=True
    )
    scored = Sequence((prompt * 128)[:128], 0, num_logprobs=0, needs_prompt_logprobs=True)  # fills all positions
    vllm.generate([sequence, scored])
    with torch.no_grad():
        expected = model(torch.tensor([prompt + sequence.tokens])).logits[0].log_softmax(-1)
    logprobs = [*sequence.prompt_logprobs, *sequence.token_logprobs]
    assert [entry.token for entry in logprobs] == [*prompt, *sequence.tokens][1:]
    for row, entry in zip(expected, logprobs, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-3)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    assert (scored.tokens, scored.finish_reason, len(scored.prompt_logprobs)) == ([], "length", 127)


@with_vllm
def test_any_seed_gives_json_of_the_schema(vllm: VllmEngine, bundle: Bundle) -> None:
    tokenizer = bundle.processor()
    compiler = GrammarCompiler(tokenizer)
    grammar = compiler.compile(json.dumps(SCHEMA))
    sequences = [
        Sequence([7, 8], 90, SamplingParams(1.0), seed=i, mask=compiler.mask(grammar), json_schema=json.dumps(SCHEMA))
        for i in range(6)
    ]
    vllm.generate(sequences)
    texts = [tokenizer.decode(sequence.tokens) for sequence in sequences]
    assert {sequence.finish_reason for sequence in sequences} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


@with_vllm
def test_adapter_equals_its_merged_model(vllm: VllmEngine, bundle: Bundle, model: nn.Module, folders: dict[str, Path]) -> None:  # fmt: skip
    prompt = requests(bundle)[2][0]
    names = ["poet", "", "clerk", "poet"]
    sequences = [Sequence(prompt, 12, adapter=name) for name in names]
    vllm.generate(sequences)
    models = {"": model} | {name: merged(model, folder) for name, folder in folders.items()}
    assert tokens_of(sequences) == [greedy(models[name], prompt, 12) for name in names]
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 3
    assert vllm.stats["adapters"] == 1
    assert vllm.stats["adapter_loads"] >= 2


@with_vllm
def test_changed_adapter_and_invalid_token_fail_only_their_own_requests(vllm: VllmEngine, folders: dict[str, Path]) -> None:  # fmt: skip
    vllm.generate([Sequence([7], 1, adapter="poet")])
    file = folders["clerk"] / "adapter_config.json"
    workers_before = file.read_text()
    file.write_text(workers_before + " ")
    changed, bad, good = Sequence([7], 3, adapter="clerk"), Sequence([10**8], 3), Sequence([7], 3)
    with pytest.raises(UserError, match=r"'clerk' .* was changed"):
        vllm.generate([changed, bad, good])
    file.write_text(workers_before)
    assert [sequence.finish_reason for sequence in (changed, bad, good)] == ["error", "error", "length"]
    assert "10000000" in bad.error


@with_vllm
def test_aborted_and_expired_sequences_do_not_run(vllm: VllmEngine, model: nn.Module) -> None:
    never_ends = SamplingParams(logit_bias={int(model.generation_config.eos_token_id): -100.0})  # type: ignore[union-attr]
    slow = [Sequence([7], 120, never_ends) for _ in range(4)]
    vllm.submit(slow)
    wait_for(lambda: all(sequence.tokens for sequence in slow))
    expired, aborted_waiting = Sequence([8], 5, deadline=time.monotonic() - 1), Sequence([9], 5)
    vllm.submit([expired, aborted_waiting])
    with pytest.raises(QueueFull):
        vllm.submit([Sequence([9], 5)] * 41)
    vllm.abort([*slow, aborted_waiting])
    vllm.generate([after := Sequence([9], 2)])
    assert [sequence.finish_reason for sequence in (*slow, expired, aborted_waiting, after)] == ["abort"] * 4 + [
        "expired",
        "expired",
        "length",
    ]
    assert max(len(sequence.tokens) for sequence in slow) < 120
    assert vllm.stats["running"] == 0
    with pytest.raises(ValueError, match="128 tokens"):
        vllm.submit([Sequence([7] * 100, 29)])


@with_vllm
def test_queue_is_fair_between_clients(vllm: VllmEngine) -> None:
    many, few = [Sequence([7], 4, client="many") for _ in range(16)], Sequence([7], 4, client="few")
    vllm.generate([*many, few])
    assert sum(sequence.scheduled_at < few.scheduled_at for sequence in many) <= 5


def altered_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Return a copy whose recorded outputs are changed, with correct hashes."""
    copy = Path(shutil.copytree(bundle.folder, folder))
    manifest = json.loads((copy / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] -= 0.01
    manifest["hash"] = Manifest(**manifest).content_hash()
    (copy / "manta.json").write_text(json.dumps(manifest))
    return Bundle.open(copy)


@with_vllm
def test_outputs_that_differ_from_the_golden_ones_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    workers_before = workers()
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        verified_engine(altered_bundle(bundle, tmp_path / "bundle"), ServeConfig(**OPTIONS), torch.float32, notify, fail_on_exit)  # type: ignore[arg-type]  # fmt: skip
    assert workers() == workers_before


def workers() -> set[psutil.Process]:
    return {process for process in psutil.Process().children() if str(WORKER) in process.cmdline()}


def fail_on_exit() -> None:
    raise AssertionError("the engine was closed on purpose")


@with_vllm
def test_killed_worker_fails_its_sequences(bundle: Bundle) -> None:
    exited, workers_before = threading.Event(), workers()
    engine = verified_engine(bundle, ServeConfig(**OPTIONS), torch.float32, notify, exited.set)  # type: ignore[arg-type]
    running, waiting = [Sequence([7], 120) for _ in range(4)], Sequence([8], 5)
    engine.submit([*running, waiting])
    wait_for(lambda: running[0].tokens)
    assert engine.is_alive
    (worker,) = workers() - workers_before
    worker.kill()
    wait_for(lambda: waiting.finish_reason)
    assert {(sequence.finish_reason, sequence.error) for sequence in (*running, waiting)} == {
        ("error", "vLLM has ended")
    }
    assert exited.is_set()
    assert not engine.is_alive
    with pytest.raises(UserError, match="vLLM has ended"):
        engine.generate([Sequence([7], 3)])
    engine.close()


@with_vllm
def test_unknown_vllm_option_is_refused(bundle: Bundle) -> None:
    options = ServeConfig(**OPTIONS | {"vllm_options": {"enforce_eagre": True}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"serve.vllm_options.enforce_eagre .* did you mean 'enforce_eager'\?"):
        VllmEngine(bundle.folder, options, torch.float32)


@with_vllm
@pytest.mark.usefixtures("ray")
def test_endpoint_with_vllm(bundle: Bundle, model: nn.Module, tiny: Config, tmp_path: Path) -> None:
    options = {f"serve.{key}": value for key, value in OPTIONS.items()}
    config = with_values(tiny, options | {"serve.port": free_port(), "runs_dir": str(tmp_path)})
    endpoint = deploy(config, {"writer": bundle.folder})
    try:
        prompt = "def f(x):\n    return"
        (expected,) = bundle.objective().predict(model, [{"prompt": prompt, "max_tokens": 24}])
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            scored = client.post("/v1/completions", json=body | {"logprobs": 2, "echo": True}).json()
            assert scored["choices"][0]["text"] == prompt + expected["text"]
            logprobs = scored["choices"][0]["logprobs"]["token_logprobs"]
            assert all(math.isfinite(logprob) for logprob in logprobs[1:])
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
            assert lines[-1] == "[DONE]"
            parts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
            assert "".join(parts) == expected["text"]
            assert len(parts) > 2
            refused = client.post("/v1/embeddings", json={"model": "writer", "input": "x"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
            form = {"type": "json_schema", "json_schema": {"name": "side", "schema": SCHEMA}}
            answer = client.post("/v1/completions", json=body | {"max_tokens": 60, "temperature": 1, "response_format": form})  # fmt: skip
            jsonschema.validate(json.loads(answer.json()["choices"][0]["text"]), SCHEMA)
        assert any('manta_replica_cache_tokens{model="writer"' in line for line in metrics_at_rest(endpoint.url))
        with background_load(endpoint.url, body) as responses:
            wait_for(lambda: len(responses) > 3)
            killed = set(processes(str(WORKER))) - workers()
            for process in killed:
                process.kill()
            answered = len(responses)
            wait_for(lambda: len(responses) > answered + 10)
        assert len(killed) == 1
        assert {response.status for response in responses} == {200}  # its requests were sent to its successor
    finally:
        endpoint.stop()
    file = Path(shutil.copytree(bundle.folder, tmp_path / "changed")) / "model.safetensors"
    whole_file = bytearray(file.read_bytes())
    whole_file[-1] ^= 1
    file.write_bytes(whole_file)
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        deploy(config, {"writer": file.parent})


def test_python_without_vllm_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"needs vLLM, and {sys.executable} has none: make an environment"):
        check_vllm_python(ServeConfig(generator="vllm"))
    with pytest.raises(UserError, match=r"serve.vllm_python=.*python can't be run"):
        check_servable(bundle, ServeConfig(generator="vllm", vllm_python=str(tmp_path / "python")))


def test_worker_that_ends_before_it_is_ready_is_reported(bundle: Bundle, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *find_spec*) exit 0;; *) exit 3;; esac\n')
    python.chmod(0o755)
    with pytest.raises(UserError, match="vLLM ended before it was ready"):
        VllmEngine(bundle.folder, ServeConfig(generator="vllm", vllm_python=str(python)), torch.float32)


def test_bundle_that_generates_no_text_is_refused(tiny_functions: Config, tmp_path: Path) -> None:
    namer = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    with pytest.raises(UserError, match=r"serve\.generator=vllm is for bundles that generate text"):
        check_servable(namer, ServeConfig(generator="vllm"))


@pytest.mark.parametrize(
    ("values", "message"),
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
def test_options_that_contradict_each_other(tiny: Config, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_values(tiny, values)


@pytest.fixture
def fake_vllm(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmEngine, list[Sequence]]]:
    """An engine whose worker counts up from a prompt's last token, and the sequences that it reports."""
    monkeypatch.setattr("engine.serve.llm.vllm_engine.WORKER", FAKE_WORKER)
    monkeypatch.setattr("engine.serve.llm.vllm_engine.check_vllm_python", lambda options: None)
    options = ServeConfig(generator="vllm", max_num_seqs=2, max_queue=8)
    outputs: list[Sequence] = []
    engine = VllmEngine(bundle.folder, options, torch.float32, outputs.extend)
    yield engine, outputs
    engine.close()


def test_generate_waits_for_its_own_sequences(fake_vllm: tuple[VllmEngine, list[Sequence]]) -> None:
    engine, outputs = fake_vllm
    sequences = [Sequence([10 * i], i, num_logprobs=1) for i in range(1, 5)]
    engine.generate(sequences)
    assert tokens_of(sequences) == [[11], [21, 22], [31, 32, 33], [41, 42, 43, 44]]
    assert [entry.token for entry in sequences[3].token_logprobs] == [41, 42, 43, 44]
    assert not outputs, "those of `generate` are not passed on"
    with pytest.raises(UserError, match="ValueError: 13"):
        engine.generate([Sequence([13], 2)])
    assert engine.stats["running"] == 0


def test_submitted_sequences_are_reported(fake_vllm: tuple[VllmEngine, list[Sequence]]) -> None:
    engine, outputs = fake_vllm
    streamed, whole = Sequence([5], 3, streams=True), Sequence([7], 3)
    engine.submit([streamed, whole])
    wait_for(lambda: streamed.finish_reason and whole.finish_reason and outputs.count(whole))
    assert tokens_of([streamed, whole]) == [[6, 7, 8], [8, 9, 10]]
    assert outputs.count(whole) == 1
    endless = [Sequence([1], 120) for _ in range(2)]
    engine.submit(endless)
    engine.abort(endless)
    wait_for(lambda: all(sequence.finish_reason for sequence in endless))
    assert engine.stats["running"] == 0
