"""Tokenizers in the Hugging Face layout: train a byte-level BPE, load one, and encode fast with identical ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.parallel_map import num_cores
from engine.errors import UserError

Encoder = Callable[[list[str]], list[np.ndarray]]
END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
TRANSCRIPT_TOKENS = (
    "<|startoftranscript|>",
    "<|notimestamps|>",
)  # of Whisper; the tokens after the last would be timestamps
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# GPT-2's pattern (Radford et al. 2019), written as tiktoken's r50k_base does, with possessive quantifiers for speed.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
UNUSED = "<|\x00never\x00|>"  # tiktoken needs a special token; this one is never allowed, so it too is plain text
LONG_WHITESPACE = re.compile(r"\s{2000}")  # tiktoken's regex engine overflows its stack on a far longer one
MAYBE_LONG_WHITESPACE = re.compile(r"\s{4}")  # matches every 500th character of such a text


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens: end of text, padding, and what the tokenizer puts before and after a sequence."""

    eos_id: int
    pad_id: int
    opening: list[int]
    closing: list[int]
    vocab_size: int


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, sentinels: int = 0, closing: bool = False) -> None:
    """Train a byte-level BPE with GPT-2's pattern and write it as a Hugging Face fast tokenizer.

    It has `vocab_size` tokens, or fewer where the texts have too few pairs. Special tokens: `<|endoftext|>` begins and ends
    documents, `<|pad|>` pads, `<|mask|>` replaces a token to be predicted, `<extra_id_0>`, ... (`sentinels` of them) replace
    spans. With `closing` the tokenizer appends `<|endoftext|>` to each sequence.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, MASK, *(f"<extra_id_{i}>" for i in range(sentinels))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "pad_token": PAD,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if closing:
        append_eos(folder)


def append_eos(folder: Path) -> None:
    """Make a tokenizer append its end token to each sequence, unless it already appends special tokens."""
    from tokenizers import Tokenizer, processors

    special = read_special_tokens(folder)
    if special.closing:
        return
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.id_to_token(special.eos_id)
    ending = processors.TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, special.eos_id)])  # fmt: skip
    before = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([before, ending]) if before else ending
    tokenizer.save(str(folder / "tokenizer.json"))


def use_transcript_template(folder: Path) -> None:
    """Make a tokenizer of `train_bpe` frame each sequence as a transcript, as a WhisperTokenizer of transformers."""
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TRANSCRIPT_TOKENS])
    start, framed = (
        TRANSCRIPT_TOKENS[0],
        [(token, tokenizer.token_to_id(token)) for token in (TRANSCRIPT_TOKENS[0], END)],
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {END}", pair=f"{start} $A $B {END}", special_tokens=framed
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "WhisperTokenizer", "predict_timestamps": True}
    file.write_text(json.dumps(settings, indent=2) + "\n")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def load_tokenizer(folder: Path | str) -> Any:
    """Return the transformers fast tokenizer in a folder. Raises UserError where there is none."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data.tokenizer={folder} is not a folder: give the folder of a Hugging Face tokenizer")
    bare_gpt2 = {"vocab.json", "merges.txt"} <= {p.name for p in folder.iterdir()} and not (
        (folder / "tokenizer.json").exists() or (folder / "config.json").exists()
    )
    try:
        loaded = (GPT2Tokenizer if bare_gpt2 else AutoTokenizer).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no tokenizer that transformers can load: it needs a tokenizer.json") from error
    if not loaded.is_fast:
        raise UserError(f"the tokenizer in {folder} is not a fast one: save it with a tokenizer.json")
    return loaded


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder (a bundle's, say) into another, always with a tokenizer.json."""
    if not (source / "tokenizer.json").exists():
        load_tokenizer(source).save_pretrained(str(target))
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Return the special ids of a folder with a tokenizer.json. Raises UserError for a tokenizer without an end token."""
    backend = load_backend(folder)
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            named |= json.loads((folder / name).read_text())

    def find_id(*roles: str) -> int | None:
        for role in roles:
            token = named.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and (token_id := backend.token_to_id(content)) is not None:
                return token_id
        return None

    eos = find_id("eos_token", "sep_token", "pad_token")
    if eos is None:
        raise UserError(f"the tokenizer in {folder} names no eos_token in its tokenizer_config.json: add one")
    pad = find_id("pad_token")
    plain = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return SpecialTokens(
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        opening=framed[:start],
        closing=framed[start + len(plain) :],
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
    )


def fast_encoder(folder: Path, sample: Iterable[str] = (), threads: int | None = None) -> Encoder:
    """Return a function of texts -> ids (integer arrays), without special tokens; those spelled out in a text are plain text.

    A byte-level BPE with GPT-2's pattern is run by tiktoken, on threads (None: one a core), from the same merges (3 to 5
    times the tokens/s), provided that its ids of `sample` equal those of `tokenizers`; others are run by `tokenizers`.
    """
    backend = load_backend(folder)
    backend.encode_special_tokens = True
    threads = threads or num_cores()

    def exact(texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(e.ids, np.int64) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    ranks = _ranks(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    if ranks is None:
        return exact

    import tiktoken

    encoding = tiktoken.Encoding("manta", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={UNUSED: 2**31})
    pool = ThreadPoolExecutor(threads)

    def encode_group(texts: list[str]) -> list[np.ndarray]:
        return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def fast(texts: list[str]) -> list[np.ndarray]:
        if any(MAYBE_LONG_WHITESPACE.search(text[::500]) and LONG_WHITESPACE.search(text) for text in texts):
            return exact(texts)
        if threads == 1 or len(texts) == 1:
            return encode_group(texts)
        return [ids for group in pool.map(encode_group, _groups(texts, 4 * threads)) for ids in group]

    probe = [*sample, "It's 12 naïve\t tests,\n\n  isn't it?\r\n \u3000\U0001f600 <|endoftext|> aaaaaaaaaaa" + " " * 9]
    same = all(np.array_equal(a, b) for a, b in zip(fast(probe), exact(probe)))
    return fast if same else exact


def _groups(texts: list[str], count: int) -> list[list[str]]:
    """Split a list into about `count` runs of similar size in characters."""
    ends = np.cumsum([len(text) for text in texts])
    at = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
    bounds = sorted({0, *at.tolist(), len(texts)})
    return [texts[a:b] for a, b in pairwise(bounds)]


def load_backend(folder: Path) -> Any:
    """Load a folder's tokenizer as `tokenizers` has it, without truncation and padding."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()  # a saved tokenizer may truncate at 128 tokens and pad
    backend.no_padding()
    return backend


def _ranks(saved: dict[str, Any]) -> dict[bytes, int] | None:
    """Return {token bytes: id} where ids ascend in the order of merges, as tiktoken needs it, else None."""
    model, splitter = saved["model"], saved.get("pre_tokenizer") or {}
    plain = (
        splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space") and splitter.get("use_regex", True)
    )
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model.get("type") != "BPE" or not plain or saved.get("normalizer") or any(model.get(key) for key in extras):
        return None
    letters = _byte_letters()
    merged = ["".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in model["merges"]]
    ids = [model["vocab"][token] for token in merged]
    alphabet = [model["vocab"].get(letter) for letter in letters]
    if None in alphabet or ids != sorted(set(ids)) or (ids and max(alphabet) > ids[0]):
        return None
    return {bytes(letters[letter] for letter in token): model["vocab"][token] for token in [*letters, *merged]}


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's {printable letter: byte} (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
