"""Text of a sequence as its tokens come, cut at stop texts; log-probabilities in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.serve.llm.sampler import TokenLogprobs
from engine.serve.llm.sequence import Sequence

REPLACEMENT = "\ufffd"  # what a part of a character is decoded as
CONTEXT_TOKENS = 4  # of the prompt, decoded before the first token: some tokenizers drop a leading space


class Detokenizer:
    """The text of one sequence, as its tokens come."""

    def __init__(self, tokenizer: Any, prompt: Iterable[int] = (), stop: Iterable[str] = ()) -> None:
        """Continue `prompt`; end before the first of the `stop` texts."""
        self.tokenizer, self.stop = tokenizer, [word for word in stop if word]
        context = list(prompt)[-CONTEXT_TOKENS:]
        if REPLACEMENT in self._decode(context):
            context = []
        # tokens[start:] are decoded together; of these, tokens[start:end] are in the text already.
        self._tokens, self._start, self._end = context, 0, len(context)
        self.text = ""
        self.num_taken = 0  # characters
        self.stopped = False
        self.num_tokens = 0  # in the text

    def add(self, tokens: list[int]) -> None:
        """Add tokens; those after a stop text are ignored."""
        if not self.stop:
            self.num_tokens += len(tokens)
            self._extend(tokens)
            return
        for token in tokens:
            if self.stopped:
                return
            self.num_tokens += 1
            self._find_stop(self._extend([token]))

    def end(self) -> None:
        """Add what was held back as part of a character."""
        if self.stopped:
            return
        old_length = len(self.text)
        self.text += self._decode(self._tokens[self._start :])[
            len(self._decode(self._tokens[self._start : self._end])) :
        ]
        self._find_stop(old_length)

    def take(self, last: bool = False) -> str:
        """Return the new text, without an end that may become a stop text; all of it if it is the last."""
        held_back = 0
        if not (last or self.stopped):
            sizes = (size for word in self.stop for size in range(1, len(word)) if self.text.endswith(word[:size]))
            held_back = max(sizes, default=0)
        new_text = self.text[self.num_taken : max(len(self.text) - held_back, self.num_taken)]
        self.num_taken += len(new_text)
        return new_text

    def _extend(self, tokens: list[int]) -> int:
        """Decode tokens, unless they end within a character; return how long the text was before."""
        old_length = len(self.text)
        self._tokens += tokens
        old = self._decode(self._tokens[self._start : self._end])
        new = self._decode(self._tokens[self._start :])
        if len(new) > len(old) and not new.endswith(REPLACEMENT):
            self.text += new[len(old) :]
            self._start, self._end = self._end, len(self._tokens)
        return old_length

    def _find_stop(self, old_length: int) -> None:
        """Cut the text at the first stop text that ends in what is new."""
        indices = [self.text.find(word, max(old_length - len(word) + 1, 0)) for word in self.stop]
        first = min((index for index in indices if index >= 0), default=-1)
        if first >= 0:
            self.text, self.stopped = self.text[:first], True

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


# How byte-level vocabularies write bytes (Radford et al. 2019, GPT-2): printable ones as themselves, the others shifted.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)}


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """Return a token's bytes in UTF-8; None for a part of a character in a vocabulary that is not byte-level."""
    text: str = tokenizer.decode([token])
    if REPLACEMENT not in text:
        return text.encode()
    name: str = tokenizer.convert_ids_to_tokens(token)
    return bytes(_BYTES[char] for char in name) if set(name) <= set(_BYTES) else None


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token's text; for a part of a character its bytes, as OpenAI writes them, or its name in the vocabulary."""
    text: str = tokenizer.decode([token])
    if REPLACEMENT not in text:
        return text
    data = token_bytes(tokenizer, token)
    return (
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if data else str(tokenizer.convert_ids_to_tokens(token))
    )


class LogprobsFormatter:
    """The log-probabilities of one sequence's tokens in OpenAI's forms; each token is returned once."""

    def __init__(self, tokenizer: Any, sequence: Sequence, echo: bool) -> None:
        """Begin with the prompt's tokens if they are echoed."""
        self.tokenizer, self.sequence, self.echo = tokenizer, sequence, echo
        self._text = Detokenizer(tokenizer, () if echo else sequence.prompt)
        self._num_taken = 0

    def take(self, num_tokens: int) -> dict[str, Any]:
        """Return the new ones of the first `num_tokens` generated tokens, in the form of /v1/completions."""
        entries: list[tuple[int, TokenLogprobs | None]] = [(entry.token, entry) for entry in self._take(num_tokens)]
        if self.echo:
            prompt = zip(self.sequence.prompt, [None, *self.sequence.prompt_logprobs], strict=True)
            entries = [*prompt, *entries]
            self.echo = False
        offsets = []
        for token, _ in entries:
            offsets.append(len(self._text.text))
            self._text.add([token])
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _ in entries],
            "token_logprobs": [entry.logprob if entry else None for _, entry in entries],
            "top_logprobs": [self._top(entry) for _, entry in entries] if self.sequence.num_logprobs else None,
            "text_offset": offsets,
        }

    def take_chat(self, num_tokens: int) -> dict[str, Any]:
        """Return the new ones of the first `num_tokens` generated tokens, in the form of /v1/chat/completions."""
        content = [
            self._chat_entry(entry.token, entry.logprob)
            | {"top_logprobs": [self._chat_entry(*pair) for pair in entry.top]}
            for entry in self._take(num_tokens)
        ]
        return {"content": content, "refusal": None}

    def _take(self, num_tokens: int) -> list[TokenLogprobs]:
        start, self._num_taken = self._num_taken, num_tokens
        return self.sequence.token_logprobs[start:num_tokens]

    def _top(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        """Return the likeliest tokens and the generated one, whether it is one of them or not, as OpenAI does."""
        if entry is None:
            return None
        pairs = [*entry.top, (entry.token, entry.logprob)]
        return {token_text(self.tokenizer, token): logprob for token, logprob in pairs}

    def _chat_entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token)
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}
