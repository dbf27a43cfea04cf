"""Output that follows a JSON schema, from a model with random weights."""

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
from engine.serve.jobs import SamplingParams
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sampler import sample
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.structured_output import GrammarCompiler, InvalidSchema
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
    return fresh_bundle(tiny, tmp_path_factory.mktemp("structured_output") / "writer" / "bundle")


def json_schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}


class AllowSome:
    """A mask that allows some tokens, and is complete after the second."""

    def __init__(self, allowed: list[int]) -> None:
        self.tokens, self.num_accepted = allowed, 0

    def allowed_tokens(self, vocab_size: int) -> torch.Tensor:
        allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        allowed_V[self.tokens] = True
        return allowed_V

    def accept_token(self, token: int) -> bool:
        self.num_accepted += 1
        return self.num_accepted == 2


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.5), SamplingParams(1.0, top_k=1)]
)
def test_mask_applies_to_its_row_only(sampling: SamplingParams) -> None:
    logits = torch.tensor([[9.0, 0, 1, 2], [9.0, 0, 1, 2]])
    for i in range(20):
        tokens = sample(
            logits, [sampling] * 2, [[], []], [random.Random(i), random.Random(i)], [AllowSome([1, 3]), None]
        )
        assert tokens[0] in (1, 3)
    assert tokens[1] == 0
    assert logits[0, 0] == 9


@pytest.mark.parametrize("num_speculative_tokens", [0, 4])
def test_any_seed_gives_json_of_the_schema(bundle: Bundle, num_speculative_tokens: int) -> None:
    tokenizer = bundle.processor()
    compiler = GrammarCompiler(tokenizer)
    grammar = compiler.compile(json.dumps(SCHEMA))
    finished: queue.Queue[Sequence] = queue.Queue()
    engine = TransformersEngine(
        bundle.model(), 128, max_num_seqs=4, max_queue=32, max_batched_tokens=64, num_speculative_tokens=num_speculative_tokens,
        on_output=lambda outputs: [finished.put(sequence) for sequence in outputs if sequence.finish_reason],  # type: ignore[func-returns-value]
    )  # fmt: skip
    sequences = [Sequence([7, 8], 120, SamplingParams(1.0), seed=i, mask=compiler.mask(grammar)) for i in range(6)]
    free = Sequence([7, 8], 30, seed=0)
    engine.submit([*sequences, free])
    for _ in range(7):
        finished.get(timeout=60)
    texts = [tokenizer.decode(sequence.tokens) for sequence in sequences]
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) == 6
    alone = Sequence([7, 8], 30, seed=0)
    engine.submit([alone])
    finished.get(timeout=60)
    assert alone.tokens == free.tokens  # masks of other rows change nothing


def test_schema_that_cannot_be_followed_is_refused(bundle: Bundle) -> None:
    compiler = GrammarCompiler(bundle.processor())
    assert compiler.compile('{"type": "object"}')
    empty = {"allOf": [{"type": "string"}, {"type": "object"}]}
    for schema in ({"type": "objekt"}, {"type": "object", "properties": 3}, {"$ref": "#/none"}, {"$ref": "#"}, empty):
        with pytest.raises(InvalidSchema):
            compiler.compile(json.dumps(schema))
