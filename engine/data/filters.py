"""Document filters: by length, by quality, by language, and by a function of the user."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import DataConfig
from engine.errors import UserError

Rule = Callable[[str], str | None]  # text -> the reason to skip it, or None

WORDS = (50, 100_000)  # of a document
WORD_LENGTH = (3.0, 10.0)  # mean, in characters
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "◦", "●", "*", "-")
SYMBOLS = re.compile(r"#|\.\.\.|…")
# n-gram size -> largest share of a document's characters in its most frequent n-gram.
TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}
# n-gram size -> largest share of a document's characters in repeated n-grams.
REPEATED_NGRAM_SHARE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def make_filter(config: DataConfig) -> Rule | None:
    """Return a function of a text -> the first reason to skip it, or None; None where no filter is set.

    Raises UserError for a filter that cannot be imported and for a language package that is not installed.
    """
    rules: list[Rule] = []
    if config.min_characters:
        shortest = config.min_characters
        rules.append(lambda text: "shorter than data.min_characters" if len(text) < shortest else None)
    if config.max_characters:
        longest = config.max_characters
        rules.append(lambda text: "longer than data.max_characters" if len(text) > longest else None)
    if config.quality:
        rules.append(gopher_quality)
    if config.languages:
        rules.append(language_rule(tuple(config.languages)))
    if config.filter:
        rules.append(user_filter(config.filter))
    if not rules:
        return None
    return lambda text: next((reason for rule in rules if (reason := rule(text))), None)


def gopher_quality(text: str) -> str | None:
    """Return the first rule by which a text is not English prose, or None.

    Rae et al. 2021, "Scaling language models: methods, analysis and insights from training Gopher", section A1.1 and
    table A1 (https://arxiv.org/abs/2112.11446), with their thresholds.
    """
    words = text.split()
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return f"quality: not {WORDS[0]} to {WORDS[1]:,} words"
    if not WORD_LENGTH[0] <= sum(map(len, words)) / len(words) <= WORD_LENGTH[1]:
        return "quality: mean word length"
    if len(SYMBOLS.findall(text)) > 0.1 * len(words):
        return "quality: symbols"
    if sum(any(letter.isalpha() for letter in word) for word in words) < 0.8 * len(words):
        return "quality: words without a letter"
    if len(STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'()") for word in words)) < 2:
        return "quality: few stop words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "quality: bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "quality: lines that end in an ellipsis"
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n{2,}", text) if paragraph.strip()]
    if any(_has_repeats(parts, len(text)) for parts in (lines, paragraphs)):
        return "quality: repeated lines or paragraphs"
    return "quality: repeated words" if _has_repeated_ngrams(words) else None


def _has_repeats(parts: list[str], characters: int) -> bool:
    """Return whether over 30 % of the lines (or paragraphs) are repeats, or repeats have over 20 % of the characters."""
    count = Counter(parts)
    repeats = len(parts) - len(count)
    size = sum(len(part) * (times - 1) for part, times in count.items() if times > 1)
    return repeats > 0.3 * len(parts) or size > 0.2 * characters


def _has_repeated_ngrams(words: list[str]) -> bool:
    total = sum(map(len, words))
    for n, max_share in TOP_NGRAM_SHARE.items():
        top, times = Counter(zip(*(words[i:] for i in range(n)))).most_common(1)[0]
        if times > 1 and times * sum(map(len, top)) > max_share * total:
            return True
    for n, max_share in REPEATED_NGRAM_SHARE.items():
        seen: set[tuple[str, ...]] = set()
        size, free = 0, 0  # `free`: the first word that is in no repeated n-gram yet
        for i, ngram in enumerate(zip(*(words[k:] for k in range(n)))):
            if ngram in seen:
                size += sum(map(len, words[max(i, free) : i + n]))
                free = i + n
            seen.add(ngram)
        if size > max_share * total:
            return True
    return False


def language_rule(wanted: tuple[str, ...]) -> Rule:
    """Return a rule that skips texts in other languages (ISO 639-1). Raises UserError without the package or for an unknown code."""
    identifier = _identifier()
    known = sorted(set(identifier.nb_classes))
    if unknown := [code for code in wanted if code not in known]:
        raise UserError(f"data.languages={unknown[0]} is not one of {', '.join(known)}")

    def rule(text: str) -> str | None:
        code = identifier.classify(text[:4000])[0]
        return None if code in wanted else f"language: {code}"

    return rule


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError("data.languages needs the package py3langid: pip install 'manta-train[language]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def user_filter(name: str) -> Rule:
    """Return the user's 'module:function' as a rule. Raises UserError where it cannot be imported."""
    function = load_filter(name)

    def rule(text: str) -> str | None:
        result = function(text)
        if isinstance(result, str):
            return result
        if not isinstance(result, bool) and result is not None:
            raise UserError(f"data.filter={name} returned {result!r}: it must return True, False or a reason")
        return None if result or result is None else "data.filter"

    return rule


def load_filter(name: str) -> Callable[[str], Any]:
    """Import 'module:function', also from the working directory. Raises UserError where it isn't there."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data.filter={name} cannot be imported ({error}): write 'module:function' of a module in this folder or installed"
        ) from error
    if not callable(function):
        raise UserError(f"data.filter={name} is not a function")
    return function  # type: ignore[no-any-return]


def filter_source(name: str) -> bytes:
    """Return the source code of a filter's module: changing it changes the data."""
    path = inspect.getsourcefile(inspect.unwrap(load_filter(name)))
    return Path(path).read_bytes() if path else name.encode()
