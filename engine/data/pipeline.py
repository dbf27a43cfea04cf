"""The two passes over the corpus, part by part: the scan and, once it is known which documents are kept, the tokenization.

A part is processed in this process, in others of this machine where that saves time, or by the cluster. What each gave
is cached in the unfinished folder, so that the same command goes on after a kill.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.corpus import read_part
from engine.data.document import Document, Part
from engine.data.huggingface import is_streamed
from engine.data.kinds import DataKind
from engine.data.parallel_map import ParallelMap
from engine.data.part_cache import PartCache
from engine.data.part_tokenizer import PartTokenizer, ShardFacts, encode_nothing
from engine.data.scan import DROPPED, Scan, Selection, sampled_texts, scan_part
from engine.data.tokenizer import FILES

Progress = Callable[[str, int, int], None]  # stage, documents done, documents in all (0: not known yet)
Documents = list[Document]
PROBE_TEXTS = 64  # texts on which a fast encoder is compared to the tokenizer


class DocumentCache:
    """The documents of parts, kept in memory while the corpus is small, else read again."""

    def __init__(self, corpus: Sequence[Part], max_bytes: int) -> None:
        """Keep them if the corpus has no more bytes than `max_bytes`."""
        self.enabled = sum(part.size for part in corpus) <= max_bytes
        self._documents: dict[int, Documents] = {}

    def put(self, part: Part, documents: Documents | None) -> None:
        """Keep a part's documents, if there are any."""
        if documents is not None:
            self._documents[part.number] = documents

    def pop(self, part: Part) -> Documents | None:
        """Return a part's documents, if they are kept, and forget them."""
        return self._documents.pop(part.number, None)


@dataclass(frozen=True)
class Context:
    """What both passes need: the corpus and its seed, where results are kept, and who does the work."""

    corpus: Sequence[Part]
    seed: int
    parts: PartCache
    documents: DocumentCache
    parallel_map: ParallelMap
    on_progress: Progress


@dataclass(frozen=True)
class PartScanner:
    """The first pass, as any process can do it."""

    seed: int
    sample_characters: Sequence[float]  # by part
    keep_documents: bool

    def __call__(self, part: Part) -> tuple[int, Scan, Documents | None]:
        """Return the part's number, its scan and, where they are to be kept, its documents."""
        documents: Documents | None = [] if self.keep_documents else None
        keep_texts = is_streamed(part.config)
        scan = scan_part(part, self.seed, self.sample_characters[part.number], keep_texts, documents)
        return part.number, scan, documents


def scan_all(context: Context, sample_characters: Sequence[float]) -> list[Scan]:
    """Scan each part, except those whose scan is cached."""
    scans = {part.number: scan for part in context.corpus if (scan := context.parts.get_scan(part)) is not None}
    done = 0
    context.on_progress("read", done, 0)
    todo = [part for part in context.corpus if part.number not in scans]
    work = PartScanner(context.seed, sample_characters, context.documents.enabled)
    sizes = [part.size for part in todo]
    with closing(context.parallel_map(work, _identity, work, todo, sizes)) as results:
        for number, scan, documents in results:
            done += len(scan.splits)
            context.on_progress("read", done, 0)
            scans[number] = scan
            context.documents.put(context.corpus[number], documents)
            context.parts.put_scan(context.corpus[number], scan)
    return [scans[part.number] for part in context.corpus]


@dataclass(frozen=True)
class Task:
    """A part to tokenize, and what the first pass found out about it."""

    part: Part
    documents: Documents | None  # None: to be read again
    splits: np.ndarray  # as in `Selection`

    @classmethod
    def of(cls, part: Part, scan: Scan, selection: Selection, cached: DocumentCache) -> Task:
        """Collect what is known of a part, with its documents if they are in memory or all texts were kept."""
        documents = cached.pop(part)
        if documents is None and is_streamed(part.config):
            documents = _documents_from(scan)
        return cls(part, documents, selection.splits[part.number])

    def read(self, seed: int) -> Iterable[Document]:
        """Return the documents that were scanned."""
        return read_part(self.part, seed, Counter(), Counter()) if self.documents is None else self.documents


def _documents_from(scan: Scan) -> Documents:
    """Rebuild the documents of a scan that kept all texts."""
    paths = [file["path"] for file in scan.files]
    count = len(scan.texts)
    labels = [next(iter(own), None) for own in scan.labels_by_document()] or [None] * count
    spans = scan.spans or [()] * count
    return [
        Document(text or "", "", paths[origin], label, None, own)
        for text, origin, label, own in zip(scan.texts, scan.origins, labels, spans, strict=True)
    ]


@dataclass(frozen=True)
class RemoteTokenizer:
    """The second pass, as another process can do it, which may not have the folder."""

    work: PartTokenizer
    seed: int
    tokenizer: tuple[tuple[str, bytes], ...]  # name and content of its files
    probe: tuple[str, ...]

    def __call__(self, task: Task) -> tuple[int, ShardFacts, dict[str, bytes]]:
        """Return the part's number, the facts of its shards, and their content by name."""
        content: dict[str, bytes] = {}

        def keep(name: str, shard: bytes) -> None:
            content[name] = bytes(shard)

        encoder = make_encoder(type(task.part.kind), self.tokenizer, self.probe)
        facts = self.work.run(task.part, task.read(self.seed), task.splits, encoder, keep)
        return task.part.number, facts, content


@lru_cache(maxsize=1)
def make_encoder(kind: type[DataKind], files: tuple[tuple[str, bytes], ...], probe: tuple[str, ...]) -> Any:
    """Make the encoder of one thread from the content of a tokenizer's files."""
    if not files:
        return encode_nothing
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files:
            (Path(folder) / name).write_bytes(content)
        return kind.make_encoder(Path(folder), probe, threads=1)


def tokenize_all(
    context: Context, work: PartTokenizer, scans: Sequence[Scan], selection: Selection
) -> list[ShardFacts]:
    """Tokenize each part, except those whose shards are cached; return the shards' facts by part."""
    total, folder = selection.documents.total(), context.parts.folder
    facts_of = {part.number: facts for part in context.corpus if (facts := context.parts.get_shards(part)) is not None}
    counts = [int((splits != DROPPED).sum()) for splits in selection.splits]
    done = sum(counts[number] for number in facts_of)
    context.on_progress("tokenize", done, total)
    todo = [part for part in context.corpus if part.number not in facts_of]
    if not todo:
        return [facts_of[part.number] for part in context.corpus]
    probe, files = sampled_texts(scans, selection)[:PROBE_TEXTS], [folder / "tokenizer" / name for name in FILES]
    content = tuple((file.name, file.read_bytes()) for file in files if file.exists())
    remote = RemoteTokenizer(work, context.seed, content, tuple(probe))

    @cache
    def encoder() -> Any:
        return type(todo[0].kind).make_encoder(folder / "tokenizer", probe) if remote.tokenizer else encode_nothing

    def make_task(part: Part) -> Task:
        return Task.of(part, scans[part.number], selection, context.documents)

    def tokenize_here(part: Part) -> tuple[int, ShardFacts, dict[str, bytes]]:
        task = make_task(part)
        facts = work.run(
            part, task.read(context.seed), task.splits, encoder(), lambda name, shard: (folder / name).write_bytes(shard),
            lambda more: context.on_progress("tokenize", done + more, total),
        )  # fmt: skip
        return part.number, facts, {}

    sizes = [part.size for part in todo]
    with closing(context.parallel_map(tokenize_here, make_task, remote, todo, sizes)) as results:
        for number, facts, shards in results:
            for name, shard in shards.items():
                (folder / name).write_bytes(shard)
            facts_of[number] = facts
            context.parts.put_shards(context.corpus[number], facts)
            done += counts[number]
            context.on_progress("tokenize", done, total)
    return [facts_of[part.number] for part in context.corpus]


def _identity(part: Part) -> Part:
    return part
