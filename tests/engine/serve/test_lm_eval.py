"""EleutherAI's lm-evaluation-harness scores the endpoint through OpenAI's API as it scores the bundle itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace as swap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine.config import with_values
from engine.errors import UserError
from engine.evaluate.harness import is_installed, parse_results, run_harness
from engine.serve.deploy import Endpoint, deploy
from tests.engine.evaluate.test_harness import TASK
from tests.lives import Lives
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (is_installed() and find_spec("tenacity")), reason="lm-eval[hf,api] is not installed: pip install 'manta-train[lm-eval]'"
    ),
]  # fmt: skip
PROMPTS = ["the film a", "an actor of some", "the plot", "a warm scene with", "music and", "some"]
CHOICES = [" plot", " actor", " lovely music", " zzqx jjkv", " with scenes"]


@pytest.fixture(scope="module")
def endpoint(ray: None, lives: Lives) -> Iterator[Endpoint]:
    endpoint = deploy(with_values(lives.text, {"serve.port": free_port(), "serve.precision": "fp32"}), {"base": lives.bundle("base").folder})  # fmt: skip
    yield endpoint
    endpoint.stop()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"start": prompt, "choices": CHOICES, "answer": i % len(CHOICES)} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "right_word.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path / "right_word.yaml"


def remote(endpoint: Endpoint, lives: Lives, kind: str, path: str) -> Any:
    from lm_eval.api.registry import get_model

    return get_model(kind)(
        base_url=f"{endpoint.url}{path}", model="base", tokenizer=str(lives.bundle("base").folder),
        tokenizer_backend="huggingface" if kind == "local-completions" else None,
        batch_size=4 if kind == "local-completions" else 1, num_concurrent=2, max_length=127,
    )  # fmt: skip


def test_endpoint_scores_equal_the_bundles(endpoint: Endpoint, lives: Lives, task: Path) -> None:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    bundle = lives.bundle("base")
    served = remote(endpoint, lives, "local-completions", "/v1/completions")
    direct = HFLM(pretrained=bundle.model(), tokenizer=bundle.objective().tokenizer, batch_size=1, device="cpu")
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (served_logprob, served_greedy), (logprob, greedy) in zip(
        pairs, served.loglikelihood(requests), direct.loglikelihood(requests), strict=True
    ):
        assert served_logprob == pytest.approx(logprob, abs=2e-3), pair
        assert served_greedy == greedy, pair
        assert math.isfinite(served_logprob)
    options = with_values(lives.text, {"evaluate.suite": "lm_eval", "evaluate.tasks": [str(task)]}).evaluate
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    results = lm_eval.simple_evaluate(model=served, tasks=["right_word"], task_manager=manager, bootstrap_iters=options.resamples, log_samples=False)  # fmt: skip
    assert results
    assert parse_results(results["results"], ["right_word"]) == run_harness(bundle, options, 0)
    through_endpoint = with_values(lives.text, {"evaluate.suite": "lm_eval", "evaluate.tasks": [str(task)], "evaluate.endpoint": endpoint.url}).evaluate  # fmt: skip
    assert run_harness(bundle, through_endpoint, 0) == run_harness(bundle, options, 0)
    assert bundle.manifest
    with pytest.raises(UserError, match=r"does not serve .*it serves base"):
        run_harness(swap(bundle, manifest=swap(bundle.manifest, hash="0" * 64)), through_endpoint, 0)


def test_endpoint_texts_equal_the_bundles(endpoint: Endpoint, lives: Lives) -> None:
    from lm_eval.api.instance import Instance

    bundle = lives.bundle("base")
    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    requests = [Instance("generate_until", {}, (prompt, dict(until)), i) for i, prompt in enumerate(PROMPTS)]
    texts = remote(endpoint, lives, "local-completions", "/v1/completions").generate_until(requests)
    expected = bundle.objective().predict(bundle.model(), [{"prompt": prompt, "max_tokens": 12} for prompt in PROMPTS])
    assert texts == [answer["text"].partition("\n")[0] for answer in expected]
    chats = remote(endpoint, lives, "local-chat-completions", "/v1/chat/completions")
    requests = [Instance("generate_until", {}, (json_chat(prompt), dict(until)), i) for i, prompt in enumerate(PROMPTS)]
    prompts = [{"prompt": f"user: {prompt}\nassistant:", "max_tokens": 12} for prompt in PROMPTS]
    expected = bundle.objective().predict(bundle.model(), prompts)
    assert chats.generate_until(requests) == [answer["text"].partition("\n")[0] for answer in expected]


def json_chat(text: str) -> Any:
    """Return a chat in the form that the harness passes to a model."""
    from lm_eval.models.api_models import JsonChatStr

    return JsonChatStr(json.dumps([{"role": "user", "content": text}]))
