"""Text as tokens come: complete characters, stop texts held back, each log-probability returned once."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from engine.config import Config
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer
from engine.serve.llm.detokenizer import Detokenizer, LogprobsFormatter, token_bytes, token_text
from engine.serve.llm.sampler import TokenLogprobs
from engine.serve.llm.sequence import Sequence

WORDS = "def naïve(x):\n    return '→ 日本語' + x  # done\n"


@pytest.fixture(scope="module")
def tokenizer(tiny: Config) -> PreTrainedTokenizerFast:
    return load_tokenizer(prepare(tiny) / "tokenizer")


def test_parts_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # characters of several tokens
    text, parts = Detokenizer(tokenizer), []
    for token in ids:
        text.add([token])
        parts.append(text.take())
        assert "\ufffd" not in parts[-1]
    text.end()
    assert "".join([*parts, text.take(last=True)]) == WORDS
    assert text.num_tokens == len(ids)


def test_bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) or b"" for token in ids).decode() == WORDS
    (part,) = {token_text(tokenizer, token) for token in tokenizer("→")["input_ids"][:1]}
    assert part == "bytes:\\xe2"


def test_incomplete_character_is_returned_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a→")["input_ids"]
    text = Detokenizer(tokenizer)
    for token in ids[:-1]:
        text.add([token])
    assert text.take() == "a"
    text.end()
    assert text.take(last=True) == tokenizer.decode(ids[:-1])[1:]


@pytest.mark.parametrize("stop", [["return"], ["zzz", "rn '"], [":\n    r"], ["\n"]])
def test_stop_text_is_never_returned(tokenizer: PreTrainedTokenizerFast, stop: list[str]) -> None:
    text, text_so_far = Detokenizer(tokenizer, stop=stop), ""
    for token in tokenizer(WORDS)["input_ids"]:
        text.add([token])
        text_so_far += text.take()
        assert WORDS[: min(WORDS.index(word) for word in stop if word in WORDS)].startswith(text_so_far)
    assert text.stopped
    assert text_so_far == WORDS[: min(WORDS.index(word) for word in stop if word in WORDS)]
    assert text.num_tokens < len(tokenizer(WORDS)["input_ids"])


def test_start_of_a_stop_text_is_returned_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Detokenizer(tokenizer, stop=["x):!"])
    text.add(tokenizer("f(x):")["input_ids"])
    assert text.take() == "f("
    text.end()
    assert text.take(last=True) == "x):"


def test_logprobs_are_returned_once_with_their_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, generated = tokenizer("def ")["input_ids"], tokenizer("f(x)")["input_ids"]
    sequence = Sequence(prompt, 9, num_logprobs=1)
    sequence.tokens, sequence.token_logprobs = (
        generated,
        [TokenLogprobs(token, -float(i), [(token, -0.5)]) for i, token in enumerate(generated)],
    )
    sequence.prompt_logprobs = [TokenLogprobs(token, -9.0, [(0, -0.1)]) for token in prompt[1:]]
    formatter = LogprobsFormatter(tokenizer, sequence, echo=True)
    first, rest = formatter.take(1), formatter.take(len(generated))
    assert first["tokens"] + rest["tokens"] == [token_text(tokenizer, token) for token in prompt + generated]
    assert first["token_logprobs"][0] is None
    assert first["token_logprobs"][-1] == 0.0
    text = "def f(x)"
    for token, offset in zip(first["tokens"] + rest["tokens"], first["text_offset"] + rest["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    chat = LogprobsFormatter(tokenizer, sequence, echo=False).take_chat(2)["content"]
    assert [entry["token"] for entry in chat] == [token_text(tokenizer, token) for token in generated[:2]]
    assert bytes(chat[0]["bytes"]).decode() == chat[0]["token"]
