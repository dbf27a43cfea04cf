"""Text as tokens come: whole characters, stop texts held back, log-probabilities each told once."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from engine.config import Config
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer
from engine.serve.llm.detokenizer import Detokenizer, Logprobs, token_bytes, token_text
from engine.serve.llm.sampler import TokenLogprobs
from engine.serve.llm.sequence import Sequence

WORDS = "def naïve(x):\n    return '→ 日本語' + x  # done\n"


@pytest.fixture(scope="module")
def tokenizer(tiny: Config) -> PreTrainedTokenizerFast:
    return load_tokenizer(prepare(tiny) / "tokenizer")


def test_the_parts_make_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # characters of several tokens
    text, parts = Detokenizer(tokenizer), []
    for token in ids:
        text.add([token])
        parts.append(text.take())
        assert "\ufffd" not in parts[-1]
    text.end()
    assert "".join([*parts, text.take(last=True)]) == WORDS
    assert text.count == len(ids)


def test_tokens_have_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) or b"" for token in ids).decode() == WORDS
    (part,) = {token_text(tokenizer, token) for token in tokenizer("→")["input_ids"][:1]}
    assert part == "bytes:\\xe2"


def test_half_a_character_is_told_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a→")["input_ids"]
    text = Detokenizer(tokenizer)
    for token in ids[:-1]:
        text.add([token])
    assert text.take() == "a"
    text.end()
    assert text.take(last=True) == tokenizer.decode(ids[:-1])[1:]


@pytest.mark.parametrize("stop", [["return"], ["zzz", "rn '"], [":\n    r"], ["\n"]])
def test_a_stop_text_is_never_told(tokenizer: PreTrainedTokenizerFast, stop: list[str]) -> None:
    text, told = Detokenizer(tokenizer, stop=stop), ""
    for token in tokenizer(WORDS)["input_ids"]:
        text.add([token])
        told += text.take()
        assert WORDS[: min(WORDS.index(word) for word in stop if word in WORDS)].startswith(told)
    assert text.stopped
    assert told == WORDS[: min(WORDS.index(word) for word in stop if word in WORDS)]
    assert text.count < len(tokenizer(WORDS)["input_ids"])


def test_what_might_have_become_a_stop_text_is_told_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Detokenizer(tokenizer, stop=["x):!"])
    text.add(tokenizer("f(x):")["input_ids"])
    assert text.take() == "f("
    text.end()
    assert text.take(last=True) == "x):"


def test_log_probabilities_are_told_once_with_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, new = tokenizer("def ")["input_ids"], tokenizer("f(x)")["input_ids"]
    it = Sequence(prompt, 9, num_logprobs=1)
    it.tokens, it.token_logprobs = new, [TokenLogprobs(token, -float(i), [(token, -0.5)]) for i, token in enumerate(new)]
    it.prompt_logprobs = [TokenLogprobs(token, -9.0, [(0, -0.1)]) for token in prompt[1:]]
    echoed = Logprobs(tokenizer, it, echo=True)
    first, rest = echoed.take(1), echoed.take(len(new))
    assert first["tokens"] + rest["tokens"] == [token_text(tokenizer, token) for token in prompt + new]
    assert first["token_logprobs"][0] is None
    assert first["token_logprobs"][-1] == 0.0
    whole = "def f(x)"
    for token, at in zip(first["tokens"] + rest["tokens"], first["text_offset"] + rest["text_offset"], strict=True):
        assert whole[at:].startswith(token)
    chat = Logprobs(tokenizer, it, echo=False).for_chat(2)["content"]
    assert [entry["token"] for entry in chat] == [token_text(tokenizer, token) for token in new[:2]]
    assert bytes(chat[0]["bytes"]).decode() == chat[0]["token"]
