"""Raw documents, each with its split: read, free of duplicates, thinned when only some are wanted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from engine.config import DataConfig

if TYPE_CHECKING:
    from engine.data.files import File

SPLITS = ("train", "validation", "test")
TINY = 256  # documents up to which a held-out split that chance left empty is given one


@dataclass(frozen=True)
class Document:
    """One text, the split it belongs to, the file it came from and, for labelled data, its label."""

    text: str
    split: str
    source: str
    label: str | None = None


def documents(config: DataConfig, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the corpus in a fixed order; add the number of documents left out to `counts`, by reason.

    The same (config, seed, files) always gives the same documents. Raises UserError for a path, column or format that
    isn't there.
    """
    if config.source == "files":
        from engine.data.files import read

        found = unique(read(config, seed, counts), counts)
        if not (config.validation_path and config.test_path):
            found = _hold_some_out(found, config, seed)
    else:
        from engine.data.stdlib import balanced, functions, modules

        if config.source == "python_functions":
            found = balanced(unique(functions(config, seed, counts), counts), counts)
        else:
            found = unique(modules(config, seed, counts), counts)
    return thinned(found, config, counts) if config.max_documents else found


def inputs(config: DataConfig) -> dict[str, File]:
    """Return the input files by the name that their documents give as source. Raises UserError where nothing is."""
    from engine.data import files, stdlib

    if config.source == "files":
        return {file.path: file for file in files.list_files(config)}
    return {file.name: file for file in stdlib.files()}


def hash_fraction(*parts: object) -> float:
    """Return a uniform number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_of(key: str, seed: int, config: DataConfig) -> str:
    """Return the split of a file or row: a pure function of its key, the seed and the two fractions.

    Tests are taken from the bottom of the hash's range and validation from its top, so that a change of one fraction
    moves nothing between the two.
    """
    fraction = hash_fraction("split", seed, key)
    if fraction < config.test_fraction:
        return "test"
    return "validation" if fraction >= 1 - config.validation_fraction else "train"


def unique(found: Iterable[Document], counts: Counter[str]) -> Iterator[Document]:
    """Drop and count empty documents, and those whose exact text came before (in any split)."""
    seen: set[bytes] = set()
    for document in found:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if not document.text.strip():
            counts["empty"] += 1
        elif digest in seen:
            counts["duplicate"] += 1
        else:
            seen.add(digest)
            yield document


def thinned(found: Iterable[Document], config: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yield `max_documents` documents spread evenly over each split, in their order; held-out splits keep their share.

    One pass and at most twice that many documents in memory: whenever a split's list is full, every other one goes and
    from then on only every second, fourth, eighth ... is taken.
    """
    assert config.max_documents
    wanted = dict.fromkeys(SPLITS, 0)
    for split, fraction, path in (
        ("validation", config.validation_fraction, config.validation_path),
        ("test", config.test_fraction, config.test_path),
    ):
        if fraction or path:
            wanted[split] = max(1, round(config.max_documents * (fraction or 0.05)))
    wanted["train"] = max(1, config.max_documents - sum(wanted.values()))

    kept: dict[str, list[tuple[int, Document]]] = {split: [] for split in SPLITS}
    stride, met = dict.fromkeys(SPLITS, 1), dict.fromkeys(SPLITS, 0)
    total = 0
    for total, document in enumerate(found, start=1):
        split = document.split
        if met[split] % stride[split] == 0:
            kept[split].append((total, document))
            if len(kept[split]) > 2 * wanted[split]:
                kept[split] = kept[split][::2]
                stride[split] *= 2
        met[split] += 1
    chosen = [kept[split][i] for split in SPLITS for i in evenly(len(kept[split]), wanted[split])]
    counts["over data.max_documents"] += total - len(chosen)
    yield from (document for _, document in sorted(chosen, key=lambda item: item[0]))


def evenly(size: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices below `size`, evenly spaced."""
    return list(range(size)) if wanted >= size else [int(i) for i in np.arange(wanted) * size // wanted]


def _hold_some_out(found: Iterator[Document], config: DataConfig, seed: int) -> Iterator[Document]:
    """See to it that a corpus of 3 to TINY documents has one at least in each split that is held out by a fraction."""
    head = list(islice(found, TINY))
    if 3 <= len(head) < TINY:
        order = sorted(range(len(head)), key=lambda i: hash_fraction("hold out", seed, i))
        for split, fraction, path in (
            ("validation", config.validation_fraction, config.validation_path),
            ("test", config.test_fraction, config.test_path),
        ):
            there = Counter(document.split for document in head)
            if fraction and not path and not there[split] and there["train"] > 1:
                i = next(i for i in order if head[i].split == "train")
                head[i] = replace(head[i], split=split)
    return chain(head, found)
