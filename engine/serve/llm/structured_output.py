"""Structured output: which tokens may come next, so that a text is JSON of a schema.

llguidance (https://github.com/guidance-ai/llguidance) does the work: a derivative-based parser over the vocabulary's
prefix tree, some tens of microseconds a token.
"""

from __future__ import annotations

from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

WHITESPACE = "[ \\n]"  # at most one between two words of JSON: a small model may write blanks without end


class InvalidSchema(Exception):
    """The schema cannot be followed."""


class GrammarCompiler:
    """Compiles schemas for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Build the vocabulary's prefix tree, which takes a second for 100,000 tokens."""
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer)

    def compile(self, json_schema: str) -> str:
        """Return the grammar of a JSON Schema. Raises InvalidSchema."""
        try:
            grammar: str = LLMatcher.grammar_from_json_schema(json_schema, {"whitespace_pattern": WHITESPACE})
            error_message = LLMatcher.validate_grammar(grammar, self._tokenizer)
            if not error_message:  # some fail only at their first token
                self.mask(grammar).allowed_tokens(1)
        except RuntimeError as error:
            raise InvalidSchema("it allows no first token") from error
        except (ValueError, TypeError) as error:
            raise InvalidSchema(str(error)) from error
        if error_message:
            raise InvalidSchema(error_message.splitlines()[0])
        return grammar

    def mask(self, grammar: str) -> GrammarMask:
        """Return the mask of one sequence."""
        return GrammarMask(LLMatcher(self._tokenizer, grammar))


class GrammarMask:
    """The tokens that a grammar allows next in one sequence; a `sampler.Mask`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed_tokens(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans. Raises RuntimeError once the parser has failed."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise RuntimeError(f"the schema cannot be followed: {self._matcher.get_error().splitlines()[0]}")
        allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        count = min(vocab_size, len(bias))
        allowed_V[:count] = bias[:count] > 0
        return allowed_V

    def accept_token(self, token: int) -> bool:
        """Advance by a token; return whether the text is complete, so that no token may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())
