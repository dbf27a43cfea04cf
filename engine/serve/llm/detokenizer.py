"""From a completion's tokens to what a reader is told: text as it comes, stop texts, log-probabilities in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.serve.llm.engine import Completion, Score

BROKEN = "\ufffd"  # what a part of a character is decoded as
CONTEXT = 4  # tokens of the prompt by which the text's first token is read: some tokenizers drop a leading space


class Detokenizer:
    """The text of one completion, as its tokens come."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Follow on `prompt`; end before the first of the `stop` texts."""
        self.tokenizer, self.stop = tokenizer, [word for word in stop if word]
        context = list(prompt[-CONTEXT:])
        if BROKEN in self._decode(context):
            context = []
        # tokens[start:] are decoded together; of these, tokens[start:read] are in the text already.
        self._tokens, self._start, self._read = context, 0, len(context)
        self.text = ""
        self.told = 0  # characters
        self.stopped = False
        self.count = 0  # tokens in the text

    def add(self, tokens: Sequence[int]) -> None:
        """Add tokens; those after a stop text change nothing."""
        if not self.stop:
            self.count += len(tokens)
            self._extend(tokens)
            return
        for token in tokens:
            if self.stopped:
                return
            self.count += 1
            self._look_for_stop(self._extend([token]))

    def end(self) -> None:
        """Add what was held back as part of a character."""
        if self.stopped:
            return
        before = len(self.text)
        self.text += self._decode(self._tokens[self._start :])[
            len(self._decode(self._tokens[self._start : self._read])) :
        ]
        self._look_for_stop(before)

    def take(self, last: bool = False) -> str:
        """Return what has come since, but for what may yet become a stop text; all of it if it is the last."""
        held = 0
        if not (last or self.stopped):
            sizes = (size for word in self.stop for size in range(1, len(word)) if self.text.endswith(word[:size]))
            held = max(sizes, default=0)
        new = self.text[self.told : max(len(self.text) - held, self.told)]
        self.told += len(new)
        return new

    def _extend(self, tokens: Sequence[int]) -> int:
        """Decode tokens, unless they end within a character; return how long the text was before."""
        before = len(self.text)
        self._tokens += tokens
        old = self._decode(self._tokens[self._start : self._read])
        new = self._decode(self._tokens[self._start :])
        if len(new) > len(old) and not new.endswith(BROKEN):
            self.text += new[len(old) :]
            self._start, self._read = self._read, len(self._tokens)
        return before

    def _look_for_stop(self, before: int) -> None:
        found = [self.text.find(word, max(before - len(word) + 1, 0)) for word in self.stop]
        first = min((at for at in found if at >= 0), default=-1)
        if first >= 0:
            self.text, self.stopped = self.text[:first], True

    def _decode(self, tokens: Sequence[int]) -> str:
        decoded: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded


# How byte-level vocabularies write bytes (Radford et al. 2019, GPT-2): printable ones as themselves, the others moved up.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)}


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """Return a token's bytes in UTF-8; None for a part of a character in a vocabulary that is not of bytes."""
    text: str = tokenizer.decode([token])
    if BROKEN not in text:
        return text.encode()
    name: str = tokenizer.convert_ids_to_tokens(token)
    return bytes(_BYTES[it] for it in name) if set(name) <= set(_BYTES) else None


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token's text; of a part of a character its bytes, as OpenAI writes them, or its name in the vocabulary."""
    text: str = tokenizer.decode([token])
    if BROKEN not in text:
        return text
    found = token_bytes(tokenizer, token)
    return "bytes:" + "".join(f"\\x{it:02x}" for it in found) if found else str(tokenizer.convert_ids_to_tokens(token))


class Logprobs:
    """The log-probabilities of one completion's tokens, in OpenAI's forms; each token is told once."""

    def __init__(self, tokenizer: Any, completion: Completion, echo: bool) -> None:
        """Begin with the prompt's tokens if they are echoed."""
        self.tokenizer, self.completion, self.echo = tokenizer, completion, echo
        self._text = Detokenizer(tokenizer, () if echo else completion.prompt)
        self._told = 0

    def take(self, count: int) -> dict[str, Any]:
        """Return those up to token `count` of the text, as /v1/completions tells them."""
        scored: list[tuple[int, Score | None]] = [(it.token, it) for it in self._scores(count)]
        if self.echo:
            scored = [*zip(self.completion.prompt, [None, *self.completion.prompt_scores], strict=True), *scored]
            self.echo = False
        offsets = []
        for token, _ in scored:
            offsets.append(len(self._text.text))
            self._text.add([token])
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _ in scored],
            "token_logprobs": [score.logprob if score else None for _, score in scored],
            "top_logprobs": [self._likeliest(score) for _, score in scored] if self.completion.logprobs else None,
            "text_offset": offsets,
        }

    def for_chat(self, count: int) -> dict[str, Any]:
        """Return those up to token `count`, as /v1/chat/completions tells them."""
        content = [
            self._entry(it.token, it.logprob) | {"top_logprobs": [self._entry(*pair) for pair in it.top]}
            for it in self._scores(count)
        ]
        return {"content": content, "refusal": None}

    def _scores(self, count: int) -> list[Score]:
        told, self._told = self._told, count
        return self.completion.scores[told:count]

    def _likeliest(self, score: Score | None) -> dict[str, float] | None:
        """Return the likeliest tokens and the written one, be it one of them or not, as OpenAI does."""
        if score is None:
            return None
        return {token_text(self.tokenizer, token): p for token, p in [*score.top, (score.token, score.logprob)]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = token_bytes(self.tokenizer, token)
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if found is None else list(found)}
