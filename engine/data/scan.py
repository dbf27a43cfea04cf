"""What is known of the documents before they are tokenized, and which of them are kept."""

from __future__ import annotations

import hashlib
import heapq
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.corpus import SPLITS, Document, Part, evenly, given_split, hash_fraction, listed_as, read
from engine.data.stdlib import balanced

DROPPED = len(SPLITS)  # the number of a document's split where it is left out
BPE_CHARACTERS = 2**23  # a BPE is trained on a sample of about this size, spread evenly over the training documents
TINY = 256  # documents up to which a held-out split that chance left empty is given one


@dataclass
class Scan:
    """What one pass over a part tells. D: its documents."""

    digests: np.ndarray  # uint64 [D, 2]: BLAKE2b of the text
    splits: np.ndarray  # uint8 [D], numbers of SPLITS
    labels: list[str | None]  # [D], or empty where the data have no labels
    origins: np.ndarray  # int32 [D]: which of `files` each is from
    files: list[
        dict[str, Any]
    ]  # path of each file, and sha256 (or a dataset's fingerprint) and bytes of those that begin here
    texts: list[str | None]  # [D]: of a sample of the training documents, or all where reading them again costs much
    skipped: Counter[str]  # reason -> documents left out
    masked: Counter[str]  # kind -> places masked

    def to_bytes(self) -> bytes:
        """Write it as numpy arrays, without pickle."""
        facts = {"files": self.files, "skipped": self.skipped, "masked": self.masked}
        arrays: dict[str, Any] = {"digests": self.digests, "splits": self.splits, "origins": self.origins}
        arrays |= {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for name, words in (("text", self.texts), ("label", self.labels)):
            encoded = [None if word is None else word.encode() for word in words]
            arrays[f"{name}_sizes"] = np.array([-1 if word is None else len(word) for word in encoded], np.int64)
            arrays[name] = np.frombuffer(b"".join(word for word in encoded if word), np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Scan:
        """Read what `to_bytes` wrote. Raises ValueError, EOFError or BadZipFile where it is damaged."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return cls(
                digests=arrays["digests"],
                splits=arrays["splits"],
                labels=_words(arrays["label"].tobytes(), arrays["label_sizes"]),
                origins=arrays["origins"],
                files=facts["files"],
                texts=_words(arrays["text"].tobytes(), arrays["text_sizes"]),
                skipped=Counter(facts["skipped"]),
                masked=Counter(facts["masked"]),
            )


def _words(content: bytes, sizes: np.ndarray) -> list[str | None]:
    ends = np.cumsum(np.maximum(sizes, 0)).tolist()
    return [None if size < 0 else content[end - size : end].decode() for size, end in zip(sizes.tolist(), ends)]


def scan_part(
    part: Part, seed: int, sample_characters: float, keep_texts: bool = False, held: list[Document] | None = None
) -> Scan:
    """Read a part and return what is known of it; its documents are added to `held`, if given.

    The sample has `sample_characters` characters of the training documents, about: those whose digests are smallest.
    """
    skipped, masked = Counter[str](), Counter[str]()
    files = _files(part)
    number = {file["path"]: i for i, file in enumerate(files)}
    labelled = part.config.label_column is not None or part.config.source == "python_functions"
    digests, splits, origins = bytearray(), bytearray(), array("i")
    labels: list[str | None] = []
    texts: list[str | None] = []
    sample = Sample(sample_characters)
    for i, document in enumerate(read(part, seed, skipped, masked)):
        content = document.text.encode()
        if document.signal is not None:
            content += document.signal.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        digests += digest
        splits.append(SPLITS.index(document.split))
        origins.append(number[document.source])
        texts.append(document.text if keep_texts else None)
        if labelled:
            labels.append(document.label)
        if document.split == "train" and not keep_texts:
            sample.add(i, int.from_bytes(digest[:8], "little"), document.text[:BPE_CHARACTERS])
        if held is not None:
            held.append(document)
    for i, text in sample:
        texts[i] = text
    return Scan(
        digests=np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2),
        splits=np.frombuffer(bytes(splits), np.uint8),
        labels=labels,
        origins=np.array(origins, np.int32),
        files=files,
        texts=texts,
        skipped=skipped,
        masked=masked,
    )


class Sample:
    """Those texts of a stream that rank lowest, up to `characters` of them; where ranks are hashes, spread evenly over it."""

    def __init__(self, characters: float) -> None:
        self.characters, self.size = characters, 0
        self._held: list[tuple[int, int, str]] = []

    def add(self, number: int, rank: int, text: str) -> None:
        """Offer a text."""
        if self._held and self.size >= self.characters and -rank <= self._held[0][0]:
            return
        heapq.heappush(self._held, (-rank, number, text))
        self.size += len(text)
        while len(self._held) > 1 and self.size - len(self._held[0][2]) >= self.characters:
            self.size -= len(heapq.heappop(self._held)[2])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((number, text) for _, number, text in self._held)


def _files(part: Part) -> list[dict[str, Any]]:
    """Describe each file of a part; with its hash where the part has its beginning."""
    found: dict[str, dict[str, Any]] = {}
    for piece in part.pieces:
        facts: dict[str, Any] = {"path": listed_as(part.config, piece.file)}
        if piece.file.filesystem is None:
            facts |= {"fingerprint": piece.file.stamp, "bytes": piece.file.size}
        elif not piece.start:
            facts |= {"sha256": piece.file.sha256(), "bytes": piece.file.size}
        found.setdefault(facts["path"], facts)
    return list(found.values())


def choose(
    parts: Sequence[Part], surveys: Sequence[Scan], seed: int
) -> tuple[list[np.ndarray], dict[str, Counter[str]]]:
    """Return, by part, the split number of each document (DROPPED where it is left out), and the reasons by source.

    Of equal documents the first one is kept, in whatever source and split it is.
    """
    bounds = np.cumsum([0, *(len(survey.splits) for survey in surveys)])
    splits = np.concatenate([survey.splits for survey in surveys])
    unique = first_of_each(np.concatenate([survey.digests for survey in surveys]))
    skipped: dict[str, Counter[str]] = {part.source: Counter() for part in parts}
    for source in skipped:
        mine = [i for i, part in enumerate(parts) if part.source == source]
        there = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in mine])
        config, kept = parts[mine[0]].config, there[unique[there]]
        skipped[source]["duplicate"] += len(there) - len(kept)
        if config.source == "python_functions":
            labels = [label for i in mine for label in surveys[i].labels]
            shared = kept[balanced([labels[i] for i in np.searchsorted(there, kept).tolist()])]
            skipped[source]["over its package's share"] += len(kept) - len(shared)
            kept = shared
        splits[kept] = _hold_some_out(splits[kept], config, seed)
        if config.max_documents:
            thin = kept[thinned(splits[kept], config)]
            skipped[source]["over data.max_documents"] += len(kept) - len(thin)
            kept = thin
        dropped = np.ones(len(splits), bool)
        dropped[kept] = False
        splits[there[dropped[there]]] = DROPPED
    return [splits[a:b] for a, b in pairwise(bounds)], skipped


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """Say of each digest (uint64 [D, 2]) whether it is the first of its kind: bool [D]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ranked = digests[order]
    first = np.ones(len(digests), bool)
    first[order[1:]] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return first


def thinned(splits: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return `max_documents` of these documents spread evenly over each split, rising; held-out splits keep their share."""
    assert config.max_documents
    wanted = dict.fromkeys(SPLITS, 0)
    for split, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if fraction or given_split(config, split):
            wanted[split] = max(1, round(config.max_documents * (fraction or 0.05)))
    wanted["train"] = max(1, config.max_documents - sum(wanted.values()))
    there = {split: np.flatnonzero(splits == number) for number, split in enumerate(SPLITS)}
    return np.sort(np.concatenate([there[split][evenly(len(there[split]), wanted[split])] for split in SPLITS]))


def _hold_some_out(splits: np.ndarray, config: DataConfig, seed: int) -> np.ndarray:
    """See to it that a source of 3 to TINY documents has one at least in each split that is held out by a fraction."""
    splits = splits.copy()
    if 3 <= len(splits) < TINY:
        order = sorted(range(len(splits)), key=lambda i: hash_fraction("hold out", seed, i))
        for split, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
            number = SPLITS.index(split)
            if fraction and not (splits == number).any() and (splits == 0).sum() > 1:
                splits[next(i for i in order if splits[i] == 0)] = number
    return splits


@dataclass(frozen=True)
class Selection:
    """What is kept of a corpus. P: parts, D: a part's documents."""

    splits: list[np.ndarray]  # [P] of uint8 [D]: numbers of SPLITS, or DROPPED
    label_ids: list[np.ndarray]  # [P] of int32 [D], empty where the data have no labels
    labels: list[str]  # sorted
    skipped: dict[str, Counter[str]]  # source -> reason -> documents

    @property
    def documents(self) -> Counter[str]:
        """Documents of each split."""
        counts = sum((np.bincount(one, minlength=DROPPED + 1) for one in self.splits), np.zeros(DROPPED + 1, int))
        return Counter(dict(zip(SPLITS, counts.tolist())))


def keep(corpus: Sequence[Part], surveys: Sequence[Scan], seed: int, labelled: bool) -> Selection:
    """Choose the documents, and number their labels; held-out documents with a label that training lacks are left out."""
    splits, skipped = choose(corpus, surveys, seed)
    for part, known in zip(corpus, surveys):
        skipped[part.source] += known.skipped
    if not labelled:
        return Selection(splits, [np.empty(0, np.int32)] * len(splits), [], skipped)
    trained = {known.labels[i] or "" for known, one in zip(surveys, splits) for i in np.flatnonzero(one == 0).tolist()}
    numeric = all(label.lstrip("-").isdecimal() for label in trained)
    labels = sorted(trained, key=lambda label: (int(label), "") if numeric else (0, label))
    number = {label: i for i, label in enumerate(labels)}
    label_ids = [np.array([number.get(label or "", -1) for label in known.labels], np.int32) for known in surveys]
    for part, one, ids in zip(corpus, splits, label_ids):
        unknown = (one != DROPPED) & (ids < 0)
        one[unknown] = DROPPED
        skipped[part.source]["label that is not in the training data"] += int(unknown.sum())
    return Selection(splits, label_ids, labels, skipped)


def sample_sizes(corpus: Sequence[Part], characters: int) -> list[float]:
    """Return how many characters each part gives to a sample of so many in all."""
    sizes = [part.size for part in corpus]
    total = sum(sizes)
    return [characters * (size / total if total else 1 / len(sizes)) for size in sizes]


def sampled(surveys: Sequence[Scan], kept: Selection) -> list[str]:
    """Return the sampled texts that are of the training split in the end, up to BPE_CHARACTERS of them where all are known."""
    texts = [
        text
        for known, one in zip(surveys, kept.splits)
        for text, split in zip(known.texts, one)
        if text is not None and split == 0
    ]
    size = sum(map(len, texts))
    if size > 2 * BPE_CHARACTERS:
        step = size // BPE_CHARACTERS
        texts = texts[::step]
    return texts
