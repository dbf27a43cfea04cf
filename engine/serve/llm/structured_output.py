"""Text of a given form: which tokens may come next, so that an answer is JSON of a schema.

llguidance (https://github.com/guidance-ai/llguidance) does the work: a derivative-based parser over the vocabulary's
prefix tree, some tens of microseconds a token.
"""

from __future__ import annotations

from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

SPACE = "[ \\n]"  # between two words of JSON, once: a small model may else write blanks without end


class BadSchema(Exception):
    """The schema cannot be followed."""


class Structure:
    """Makes masks for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Build the vocabulary's prefix tree: once, a second for 100,000 tokens."""
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer)

    def grammar(self, schema: str) -> str:
        """Return the grammar of a schema in JSON. Raises BadSchema."""
        try:
            grammar: str = LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": SPACE})
            told = LLMatcher.validate_grammar(grammar, self._tokenizer)
            if not told:  # some fail at their first token only
                self.mask(grammar).allowed(1)
        except RuntimeError as error:
            raise BadSchema("no JSON can be begun by it") from error
        except (ValueError, TypeError) as error:
            raise BadSchema(str(error)) from error
        if told:
            raise BadSchema(told.splitlines()[0])
        return grammar

    def mask(self, grammar: str) -> GrammarMask:
        """Return the mask of one completion."""
        return GrammarMask(LLMatcher(self._tokenizer, grammar))


class GrammarMask:
    """Follows one completion; a `sampling.Mask`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans. Raises RuntimeError once the parser has failed."""
        found = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise RuntimeError(f"the answer's form cannot be followed: {self._matcher.get_error().splitlines()[0]}")
        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        count = min(vocabulary, len(found))
        allowed_V[:count] = found[:count] > 0
        return allowed_V

    def take(self, token: int) -> bool:
        """Go on by a token; return whether the text is whole, so that nothing may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())
