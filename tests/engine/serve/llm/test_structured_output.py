"""Answers of a given form, by a model that knows nothing of it."""

from __future__ import annotations

import json
import queue
import random
from typing import Any

import jsonschema
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence
from engine.serve.jobs import SamplingParams
from engine.serve.llm.sampler import sample
from engine.serve.llm.structured_output import InvalidSchema, GrammarCompiler
from tests.engine.bundles.small_bundles import fresh_bundle

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("structure") / "writer" / "bundle")


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


class Only:
    """Allows some tokens, and is whole after the second."""

    def __init__(self, allowed: list[int]) -> None:
        self.tokens, self.taken = allowed, 0

    def allowed(self, vocabulary: int) -> torch.Tensor:
        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        allowed_V[self.tokens] = True
        return allowed_V

    def take(self, token: int) -> bool:
        self.taken += 1
        return self.taken == 2


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.5), SamplingParams(1.0, top_k=1)]
)
def test_a_mask_holds_for_its_row(sampling: SamplingParams) -> None:
    logits = torch.tensor([[9.0, 0, 1, 2], [9.0, 0, 1, 2]])
    for i in range(20):
        picked = sample(logits, [sampling] * 2, [[], []], [random.Random(i), random.Random(i)], [Only([1, 3]), None])
        assert picked[0] in (1, 3)
    assert picked[1] == 0
    assert logits[0, 0] == 9


@pytest.mark.parametrize("num_speculative_tokens", [0, 4])
def test_any_seed_gives_json_of_the_schema(bundle: Bundle, num_speculative_tokens: int) -> None:
    tokenizer = bundle.processor()
    structure = GrammarCompiler(tokenizer)
    grammar = structure.compile(json.dumps(SCHEMA))
    ended: queue.Queue[Sequence] = queue.Queue()
    engine = TransformersEngine(
        bundle.model(), 128, max_num_seqs=4, max_queue=32, max_batched_tokens=64, num_speculative_tokens=num_speculative_tokens,
        on_output=lambda news: [ended.put(it) for it in news if it.finish_reason],  # type: ignore[func-returns-value]
    )  # fmt: skip
    asked = [Sequence([7, 8], 120, SamplingParams(1.0), seed=i, mask=structure.mask(grammar)) for i in range(6)]
    free = Sequence([7, 8], 30, seed=0)
    engine.submit([*asked, free])
    for _ in range(7):
        ended.get(timeout=60)
    texts = [tokenizer.decode(it.tokens) for it in asked]
    for it, text in zip(asked, texts, strict=True):
        assert it.finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) == 6
    alone = Sequence([7, 8], 30, seed=0)
    engine.submit([alone])
    ended.get(timeout=60)
    assert alone.tokens == free.tokens  # company with a form changes nobody


def test_what_cannot_be_followed_is_told(bundle: Bundle) -> None:
    structure = GrammarCompiler(bundle.processor())
    assert structure.compile('{"type": "object"}')
    empty = {"allOf": [{"type": "string"}, {"type": "object"}]}
    for schema in ({"type": "objekt"}, {"type": "object", "properties": 3}, {"$ref": "#/none"}, {"$ref": "#"}, empty):
        with pytest.raises(InvalidSchema):
            structure.compile(json.dumps(schema))
