"""The two passes over the corpus, part by part: its survey and, once it is known what is kept, its tokens.

A part is worked on in this process, in others of this machine where that saves time, or by the cluster. What each gave
is kept in the journal, so that the same command goes on after a kill.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from engine.data.corpus import Document, Part, read
from engine.data.journal import Journal
from engine.data.scan import DROPPED, Scan, Selection, sampled, scan_part
from engine.data.spread import Spread
from engine.data.tokenizer import FILES, Encoder, fast_encoder
from engine.data.tokenizing import Shards, Tokenizing, no_tokens

Progress = Callable[[str, int, int], None]
Documents = list[Document]


class Held:
    """The documents of parts, kept in memory while the corpus is small, else read again."""

    def __init__(self, corpus: Sequence[Part], within: int) -> None:
        """Hold them if the corpus has no more bytes than `within`."""
        self.small = sum(part.size for part in corpus) <= within
        self._documents: dict[int, Documents] = {}

    def put(self, part: Part, documents: Documents | None) -> None:
        """Hold a part's documents, if there are any to hold."""
        if documents is not None:
            self._documents[part.number] = documents

    def take(self, part: Part) -> Documents | None:
        """Return a part's documents, if they are held, and let go of them."""
        return self._documents.pop(part.number, None)


@dataclass(frozen=True)
class Surveying:
    """The first pass, as any process can do it."""

    seed: int
    characters: Sequence[float]  # of the sample, by part
    hold: bool

    def __call__(self, part: Part) -> tuple[int, Scan, Documents | None]:
        """Return the part's number, its survey and, where they are to be held, its documents."""
        held: Documents | None = [] if self.hold else None
        return part.number, scan_part(part, self.seed, self.characters[part.number], keeps_texts(part), held), held


def scan_all(
    corpus: Sequence[Part], work: Surveying, journal: Journal, held: Held, spread: Spread, say: Progress
) -> list[Scan]:
    """Survey each part, but for those that the unfinished folder has a survey of."""
    found = {part.number: known for part in corpus if (known := journal.survey(part)) is not None}
    done = 0
    say("read", done, 0)
    todo = [part for part in corpus if part.number not in found]
    with closing(spread(work, _itself, work, todo, [part.size for part in todo])) as results:
        for number, known, documents in results:
            done += len(known.splits)
            say("read", done, 0)
            found[number] = known
            held.put(corpus[number], documents)
            journal.keep_survey(corpus[number], known)
    return [found[part.number] for part in corpus]


@dataclass(frozen=True)
class Task:
    """A part that is to be tokenized, and what the first pass found out about it."""

    part: Part
    documents: Documents | None  # None: to be read again
    splits: np.ndarray  # as in `Kept`
    label_ids: np.ndarray

    @classmethod
    def of(cls, part: Part, known: Scan, kept: Selection, held: Held) -> Task:
        """Take over what is known of a part, with its documents if they are at hand."""
        documents = held.take(part)
        if documents is None and keeps_texts(part):
            paths = [file["path"] for file in known.files]
            documents = [Document(text or "", "", paths[i]) for text, i in zip(known.texts, known.origins)]
        return cls(part, documents, kept.splits[part.number], kept.label_ids[part.number])

    def read(self, seed: int) -> Iterable[Document]:
        """Return the documents that were surveyed."""
        return read(self.part, seed, Counter(), Counter()) if self.documents is None else self.documents


@dataclass(frozen=True)
class TokenizingAway:
    """The second pass, as another process can do it, which may not have the folder."""

    work: Tokenizing
    seed: int
    tokenizer: tuple[tuple[str, bytes], ...]  # name and content of its files
    probe: tuple[str, ...]

    def __call__(self, task: Task) -> tuple[int, Shards, dict[str, bytes]]:
        """Return the part's number, the facts of its shards, and their content by name."""
        content: dict[str, bytes] = {}

        def keep(name: str, shard: bytes) -> None:
            content[name] = bytes(shard)

        encode = encoder_of(self.tokenizer, self.probe)
        facts = self.work.run(task.part, task.read(self.seed), task.splits, task.label_ids, encode, keep)
        return task.part.number, facts, content


@lru_cache(maxsize=1)
def encoder_of(files: tuple[tuple[str, bytes], ...], probe: tuple[str, ...]) -> Encoder:
    """Make the encoder of one thread from the content of a tokenizer's files."""
    if not files:
        return no_tokens
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files:
            (Path(folder) / name).write_bytes(content)
        return fast_encoder(Path(folder), probe, threads=1)


def tokenize_all(
    work: Tokenizing,
    corpus: Sequence[Part],
    surveys: Sequence[Scan],
    kept: Selection,
    seed: int,
    journal: Journal,
    held: Held,
    spread: Spread,
    say: Progress,
) -> list[Shards]:
    """Tokenize each part, but for those that the unfinished folder has the shards of; return the shards' facts by part."""
    total, folder = kept.documents.total(), journal.folder
    found = {part.number: facts for part in corpus if (facts := journal.shards(part)) is not None}
    counts = [int((one != DROPPED).sum()) for one in kept.splits]
    done = sum(counts[number] for number in found)
    say("tokenize", done, total)
    todo = [part for part in corpus if part.number not in found]
    if not todo:
        return [found[part.number] for part in corpus]
    probe, files = sampled(surveys, kept)[:64], [folder / "tokenizer" / name for name in FILES]
    away = TokenizingAway(work, seed, tuple((f.name, f.read_bytes()) for f in files if f.exists()), tuple(probe))

    @cache
    def encode() -> Encoder:
        return fast_encoder(folder / "tokenizer", probe) if away.tokenizer else no_tokens

    def task(part: Part) -> Task:
        return Task.of(part, surveys[part.number], kept, held)

    def here(part: Part) -> tuple[int, Shards, dict[str, bytes]]:
        mine = task(part)
        facts = work.run(
            part, mine.read(seed), mine.splits, mine.label_ids, encode(),
            lambda name, shard: (folder / name).write_bytes(shard), lambda more: say("tokenize", done + more, total),
        )  # fmt: skip
        return part.number, facts, {}

    with closing(spread(here, task, away, todo, [part.size for part in todo])) as results:
        for number, facts, content in results:
            for name, shard in content.items():
                (folder / name).write_bytes(shard)
            found[number] = facts
            journal.keep_shards(corpus[number], facts)
            done += counts[number]
            say("tokenize", done, total)
    return [found[part.number] for part in corpus]


def keeps_texts(part: Part) -> bool:
    """Say whether the survey keeps a part's texts, since to read it again is to fetch it again."""
    if part.config.source != "huggingface":
        return False
    from engine.data.hub import streams

    return streams(part)


def _itself(part: Part) -> Part:
    return part
