"""The first pass over the corpus: what is known of each document before it is tokenized, and which documents are selected."""

from __future__ import annotations

import hashlib
import heapq
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.corpus import listed_name, read_part
from engine.data.document import SPLITS, Document, Part, Span, evenly_spaced, explicit_split, hash_fraction
from engine.data.python_stdlib import balance_labels

DROPPED = len(SPLITS)  # the split number of a document that is left out
TRAIN = SPLITS.index("train")
BPE_CHARACTERS = 2**23  # a BPE is trained on a sample of about this size, spread evenly over the training documents
FEW_DOCUMENTS = 256  # a source of fewer gets a document in each held-out split, even where the hash puts none there


@dataclass
class Scan:
    """What one pass over a part found. D: its documents."""

    digests: np.ndarray  # uint64 [D, 2]: BLAKE2b of text and signal
    splits: np.ndarray  # uint8 [D], numbers of SPLITS
    labels: list[str]  # the distinct labels of each document, end to end
    label_counts: np.ndarray  # int32 [D]: how many of them each document has
    origins: np.ndarray  # int32 [D]: which of `files` each is from
    files: list[
        dict[str, Any]
    ]  # path of each file, and sha256 (or a dataset's fingerprint) and bytes of those that begin here
    texts: list[str | None]  # [D]: of a sample of the training documents, or all where reading them again is expensive
    skipped: Counter[str]  # reason -> documents left out
    masked: Counter[str]  # kind -> places masked
    spans: list[tuple[Span, ...]] = field(default_factory=list)  # [D], or empty; kept where all texts are

    def labels_by_document(self) -> list[list[str]]:
        """Return the distinct labels of each document."""
        ends = np.cumsum(self.label_counts).tolist()
        return [self.labels[end - count : end] for end, count in zip(ends, self.label_counts.tolist())]

    def to_bytes(self) -> bytes:
        """Serialize as numpy arrays, without pickle."""
        facts = {"files": self.files, "skipped": self.skipped, "masked": self.masked, "spans": self.spans}
        arrays: dict[str, Any] = {"digests": self.digests, "splits": self.splits, "origins": self.origins}
        arrays |= {"label_counts": self.label_counts, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for name, strings in (("text", self.texts), ("label", self.labels)):
            encoded = [None if string is None else string.encode() for string in strings]
            arrays[f"{name}_sizes"] = np.array([-1 if value is None else len(value) for value in encoded], np.int64)
            arrays[name] = np.frombuffer(b"".join(value for value in encoded if value), np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Scan:
        """Read what `to_bytes` wrote. Raises ValueError, KeyError, EOFError or BadZipFile where it is damaged."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return cls(
                digests=arrays["digests"],
                splits=arrays["splits"],
                labels=[label or "" for label in _strings(arrays["label"].tobytes(), arrays["label_sizes"])],
                label_counts=arrays["label_counts"],
                origins=arrays["origins"],
                files=facts["files"],
                texts=_strings(arrays["text"].tobytes(), arrays["text_sizes"]),
                skipped=Counter(facts["skipped"]),
                masked=Counter(facts["masked"]),
                spans=[tuple((a, b, label) for a, b, label in spans) for spans in facts["spans"]],
            )


def _strings(content: bytes, sizes: np.ndarray) -> list[str | None]:
    ends = np.cumsum(np.maximum(sizes, 0)).tolist()
    return [None if size < 0 else content[end - size : end].decode() for size, end in zip(sizes.tolist(), ends)]


def scan_part(
    part: Part, seed: int, sample_characters: float, keep_texts: bool = False, documents: list[Document] | None = None
) -> Scan:
    """Read a part and return what is known of it; its documents are added to `documents`, if given.

    The sample has about `sample_characters` characters of the training documents: those whose digests are smallest.
    """
    skipped, masked = Counter[str](), Counter[str]()
    files = _describe_files(part)
    file_number = {file["path"]: i for i, file in enumerate(files)}
    digests, splits, origins, label_counts = bytearray(), bytearray(), array("i"), array("i")
    labels: list[str] = []
    texts: list[str | None] = []
    spans: list[tuple[Span, ...]] = []
    sample = SmallestSample(sample_characters)
    for i, document in enumerate(read_part(part, seed, skipped, masked)):
        content = document.text.encode()
        if document.signal is not None:
            content += document.signal.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        digests += digest
        splits.append(SPLITS.index(document.split))
        origins.append(file_number[document.source])
        texts.append(document.text if keep_texts else None)
        if part.kind.has_labels:
            distinct = dict.fromkeys(part.kind.labels_of(document))
            labels += distinct
            label_counts.append(len(distinct))
            if keep_texts:
                spans.append(document.spans)
        if document.split == "train" and not keep_texts:
            sample.add(i, int.from_bytes(digest[:8], "little"), document.text[:BPE_CHARACTERS])
        if documents is not None:
            documents.append(document)
    for i, text in sample:
        texts[i] = text
    return Scan(
        digests=np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2),
        splits=np.frombuffer(bytes(splits), np.uint8),
        labels=labels,
        label_counts=np.array(label_counts, np.int32),
        origins=np.array(origins, np.int32),
        files=files,
        texts=texts,
        skipped=skipped,
        masked=masked,
        spans=spans,
    )


class SmallestSample:
    """The texts of smallest rank, up to `characters` in all; where ranks are hashes, a uniform sample of the stream."""

    def __init__(self, characters: float) -> None:
        self.characters, self.size = characters, 0
        self._heap: list[tuple[int, int, str]] = []

    def add(self, number: int, rank: int, text: str) -> None:
        """Offer a text."""
        if self._heap and self.size >= self.characters and -rank <= self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-rank, number, text))
        self.size += len(text)
        while len(self._heap) > 1 and self.size - len(self._heap[0][2]) >= self.characters:
            self.size -= len(heapq.heappop(self._heap)[2])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((number, text) for _, number, text in self._heap)


def _describe_files(part: Part) -> list[dict[str, Any]]:
    """Describe each file of a part; with its hash where the part has the file's beginning."""
    files: dict[str, dict[str, Any]] = {}
    for piece in part.pieces:
        facts: dict[str, Any] = {"path": listed_name(part.config, piece.file)}
        if piece.file.filesystem is None:
            facts |= {"fingerprint": piece.file.version, "bytes": piece.file.size}
        elif not piece.start:
            facts |= {"sha256": piece.file.sha256(), "bytes": piece.file.size}
        files.setdefault(facts["path"], facts)
    return list(files.values())


def assign_splits(
    parts: Sequence[Part], scans: Sequence[Scan], seed: int
) -> tuple[list[np.ndarray], dict[str, Counter[str]]]:
    """Return, by part, the split number of each document (DROPPED where it is left out), and the reasons by source.

    Of equal documents the first one is kept, in whatever source and split it is.
    """
    bounds = np.cumsum([0, *(len(scan.splits) for scan in scans)])
    splits = np.concatenate([scan.splits for scan in scans])
    is_first = is_first_occurrence(np.concatenate([scan.digests for scan in scans]))
    skipped: dict[str, Counter[str]] = {part.source: Counter() for part in parts}
    for source in skipped:
        numbers = [i for i, part in enumerate(parts) if part.source == source]
        of_source = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in numbers])
        config, kept = parts[numbers[0]].config, of_source[is_first[of_source]]
        skipped[source]["duplicate"] += len(of_source) - len(kept)
        if config.source == "python_functions":
            labels = [label for i in numbers for label in scans[i].labels]
            balanced = kept[balance_labels([labels[i] for i in np.searchsorted(of_source, kept).tolist()])]
            skipped[source]["over its package's share"] += len(kept) - len(balanced)
            kept = balanced
        splits[kept] = _fill_empty_splits(splits[kept], config, seed)
        if config.max_documents:
            subset = kept[subsample(splits[kept], config)]
            skipped[source]["over data.max_documents"] += len(kept) - len(subset)
            kept = subset
        dropped = np.ones(len(splits), bool)
        dropped[kept] = False
        splits[of_source[dropped[of_source]]] = DROPPED
    return [splits[start:stop] for start, stop in pairwise(bounds)], skipped


def is_first_occurrence(digests: np.ndarray) -> np.ndarray:
    """Return for each digest (uint64 [D, 2]) whether no equal one comes before: bool [D]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ranked = digests[order]
    first = np.ones(len(digests), bool)
    first[order[1:]] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return first


def subsample(splits: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return `max_documents` of these documents spread evenly over each split, ascending; held-out splits keep their share."""
    assert config.max_documents
    wanted = dict.fromkeys(SPLITS, 0)
    for split, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if fraction or explicit_split(config, split):
            wanted[split] = max(1, round(config.max_documents * (fraction or 0.05)))
    wanted["train"] = max(1, config.max_documents - sum(wanted.values()))
    available = {split: np.flatnonzero(splits == number) for number, split in enumerate(SPLITS)}
    chosen = [available[split][evenly_spaced(len(available[split]), wanted[split])] for split in SPLITS]
    return np.sort(np.concatenate(chosen))


def _fill_empty_splits(splits: np.ndarray, config: DataConfig, seed: int) -> np.ndarray:
    """Give a source of 3 to FEW_DOCUMENTS documents at least one in each split that is held out by a fraction."""
    splits = splits.copy()
    if 3 <= len(splits) < FEW_DOCUMENTS:
        order = sorted(range(len(splits)), key=lambda i: hash_fraction("hold out", seed, i))
        for split, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
            number = SPLITS.index(split)
            if fraction and not (splits == number).any() and (splits == TRAIN).sum() > 1:
                splits[next(i for i in order if splits[i] == TRAIN)] = number
    return splits


@dataclass(frozen=True)
class Selection:
    """Which documents of a corpus are kept. P: parts, D: a part's documents."""

    splits: list[np.ndarray]  # [P] of uint8 [D]: numbers of SPLITS, or DROPPED
    labels: list[str]  # sorted; empty where the data have none
    skipped: dict[str, Counter[str]]  # source -> reason -> documents

    @property
    def documents(self) -> Counter[str]:
        """Number of documents of each split."""
        counts = sum((np.bincount(splits, minlength=DROPPED + 1) for splits in self.splits), np.zeros(DROPPED + 1, int))
        return Counter(dict(zip(SPLITS, counts.tolist())))


def select_documents(corpus: Sequence[Part], scans: Sequence[Scan], seed: int) -> Selection:
    """Select the documents and sort the labels; held-out documents with a label that training lacks are left out."""
    splits, skipped = assign_splits(corpus, scans, seed)
    for part, scan in zip(corpus, scans):
        skipped[part.source] += scan.skipped
    if not any(part.kind.has_labels for part in corpus):
        return Selection(splits, [], skipped)
    labels_of = [scan.labels_by_document() for scan in scans]
    in_training = {
        label
        for labels, assigned in zip(labels_of, splits)
        for i in np.flatnonzero(assigned == TRAIN).tolist()
        for label in labels[i]
    }
    numeric = all(label.lstrip("-").isdecimal() for label in in_training)
    for part, labels, assigned in zip(corpus, labels_of, splits):
        unknown = np.array([not in_training.issuperset(own) for own in labels], bool) & (assigned != DROPPED)
        assigned[unknown] = DROPPED
        skipped[part.source]["label that is not in the training data"] += int(unknown.sum())
    return Selection(
        splits, sorted(in_training, key=lambda label: (int(label), "") if numeric else (0, label)), skipped
    )


def sample_sizes(corpus: Sequence[Part], characters: int) -> list[float]:
    """Return how many characters each part gives to a sample of `characters` in all."""
    sizes = [part.size for part in corpus]
    total = sum(sizes)
    return [characters * (size / total if total else 1 / len(sizes)) for size in sizes]


def sampled_texts(scans: Sequence[Scan], selection: Selection) -> list[str]:
    """Return the sampled texts that are in the training split, up to about BPE_CHARACTERS of them where all are known."""
    texts = [
        text
        for scan, splits in zip(scans, selection.splits)
        for text, split in zip(scan.texts, splits)
        if text is not None and split == TRAIN
    ]
    size = sum(map(len, texts))
    if size > 2 * BPE_CHARACTERS:
        step = size // BPE_CHARACTERS
        texts = texts[::step]
    return texts
