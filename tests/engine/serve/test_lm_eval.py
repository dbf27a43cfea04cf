"""EleutherAI's harness asks the endpoint as it asks OpenAI's, and finds what it finds on the bundle itself."""

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
from engine.evaluate.harness import parse_results, is_installed, run_harness
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
STARTS = ["the film a", "an actor of some", "the plot", "a warm scene with", "music and", "some"]
CHOICES = [" plot", " actor", " lovely music", " zzqx jjkv", " with scenes"]


@pytest.fixture(scope="module")
def endpoint(ray: None, lives: Lives) -> Iterator[Endpoint]:
    up = deploy(with_values(lives.text, {"serve.port": free_port(), "serve.precision": "fp32"}), {"base": lives.bundle("base").folder})  # fmt: skip
    yield up
    up.stop()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"start": start, "choices": CHOICES, "answer": i % len(CHOICES)} for i, start in enumerate(STARTS)]
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


def test_scores_through_the_endpoint_are_the_bundles_own(endpoint: Endpoint, lives: Lives, task: Path) -> None:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    bundle = lives.bundle("base")
    through = remote(endpoint, lives, "local-completions", "/v1/completions")
    direct = HFLM(pretrained=bundle.model(), tokenizer=bundle.objective().tokenizer, batch_size=1, device="cpu")
    pairs = [(start, choice) for start in STARTS for choice in CHOICES]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (far, greedy_far), (near, greedy_near) in zip(
        pairs, through.loglikelihood(asked), direct.loglikelihood(asked), strict=True
    ):
        assert far == pytest.approx(near, abs=2e-3), pair
        assert greedy_far == greedy_near, pair
        assert math.isfinite(far)
    options = with_values(lives.text, {"evaluate.suite": "lm_eval", "evaluate.tasks": [str(task)]}).evaluate
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    found = lm_eval.simple_evaluate(model=through, tasks=["right_word"], task_manager=manager, bootstrap_iters=options.resamples, log_samples=False)  # fmt: skip
    assert found
    assert parse_results(found["results"], ["right_word"]) == run_harness(bundle, options, 0)
    asking = with_values(lives.text, {"evaluate.suite": "lm_eval", "evaluate.tasks": [str(task)], "evaluate.endpoint": endpoint.url}).evaluate  # fmt: skip
    assert run_harness(bundle, asking, 0) == run_harness(bundle, options, 0)
    assert bundle.manifest
    with pytest.raises(UserError, match=r"does not serve .*it serves base"):
        run_harness(swap(bundle, manifest=swap(bundle.manifest, hash="0" * 64)), asking, 0)


def test_texts_through_the_endpoint_are_the_bundles_own(endpoint: Endpoint, lives: Lives) -> None:
    from lm_eval.api.instance import Instance

    bundle = lives.bundle("base")
    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    asked = [Instance("generate_until", {}, (start, dict(until)), i) for i, start in enumerate(STARTS)]
    texts = remote(endpoint, lives, "local-completions", "/v1/completions").generate_until(asked)
    wanted = bundle.objective().predict(bundle.model(), [{"prompt": start, "max_tokens": 12} for start in STARTS])
    assert texts == [answer["text"].partition("\n")[0] for answer in wanted]
    chats = remote(endpoint, lives, "local-chat-completions", "/v1/chat/completions")
    asked = [Instance("generate_until", {}, (json_chat(start), dict(until)), i) for i, start in enumerate(STARTS)]
    prompts = [{"prompt": f"user: {start}\nassistant:", "max_tokens": 12} for start in STARTS]
    wanted = bundle.objective().predict(bundle.model(), prompts)
    assert chats.generate_until(asked) == [answer["text"].partition("\n")[0] for answer in wanted]


def json_chat(text: str) -> Any:
    """Return a chat as the harness passes it on."""
    from lm_eval.models.api_models import JsonChatStr

    return JsonChatStr(json.dumps([{"role": "user", "content": text}]))
