"""Raw text to a prepared folder: shards, tokenizer and manifest, under a name made of all that decides its content."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, DataConfig
from engine.data import manifest as manifests
from engine.data.corpus import SPLITS, Document, documents, hash_fraction, inputs
from engine.data.files import File
from engine.data.manifest import Manifest
from engine.data.shards import ShardWriter
from engine.data.stdlib import LICENCE
from engine.data.tokenizer import Specials, copy_tokenizer, fast_encoder, specials, train_bpe
from engine.errors import UserError

Progress = Callable[[str, int, int], None]

FORMAT = 2  # raise it when the same input would give other shards
HELD_BYTES = 2**28  # a corpus up to this size is read once and kept in memory; a larger one is read twice
BPE_CHARACTERS = 2**23  # a BPE is trained on a sample of about this size, spread evenly over the training documents
BATCH_CHARACTERS = 2**21  # encoded at once


def prepare(config: Config, tokenizer: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the prepared folder <runs_dir>/data/<data.name>-<hash>, making it unless it is already there and whole.

    The tokenizer is `tokenizer` (a bundle's folder, for fine-tuning), else data.tokenizer, else a BPE trained on the
    training documents alone. data.sequence_length plays no part: documents are packed when they are read.
    `progress(stage, done, total)` is called with the stages "read", "tokenizer" and "tokenize" (documents; a total of 0 is
    not known yet). Raises UserError for input that cannot be used; whatever ends it, nothing half-made is left under the
    folder's name, and of two processes at once the second waits for the first.
    """
    data, say = config.data, progress or (lambda stage, done, total: None)
    chosen = tokenizer or data.tokenizer
    given = Path(chosen) if chosen else None
    files = inputs(data)
    folder = Path(config.runs_dir) / "data" / f"{data.name}-{_key(data, config.seed, given, files)[:8]}"
    if set(data.name) & set("/\\") or data.name.startswith("."):
        raise UserError(f"data.name='{data.name}' cannot name a folder: use letters, digits, '_' and '-'")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if _whole(folder):
                return folder
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
            try:
                _build(config, given, files, partial, say)
                shutil.rmtree(folder, ignore_errors=True)  # one that isn't whole
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(folder.parent).free
            raise UserError(
                f"the disk of {folder.parent} is full ({free / 1e6:,.0f} MB free): make room or set runs_dir to another disk"
            ) from error
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or error.errno == errno.EROFS:
            raise UserError(
                f"cannot write to {folder.parent} ({error.strerror}): set runs_dir to a folder of yours"
            ) from error
        raise
    return folder


@dataclass
class Survey:
    """What one pass over the corpus tells: documents by split, labels and characters of the training split, a sample."""

    documents: Counter[str]
    labels: list[str]
    sample: list[str]


class Corpus:
    """The documents of a config, which may be gone through again; kept in memory while they are few."""

    def __init__(self, config: Config, files: dict[str, File], say: Progress) -> None:
        self.config, self.skipped = config, Counter[str]()
        self.bytes = sum(file.size for file in files.values())
        self._held: list[Document] | None = None
        if self.bytes <= HELD_BYTES:
            self._held = list(_counted(documents(config.data, config.seed, self.skipped), "read", 0, say))

    def __iter__(self) -> Iterator[Document]:
        if self._held is not None:
            return iter(self._held)
        self.skipped.clear()
        return documents(self.config.data, self.config.seed, self.skipped)


def _build(config: Config, given: Path | None, files: dict[str, File], folder: Path, say: Progress) -> None:
    data = config.data
    labelled = data.label_column is not None or data.source == "python_functions"
    corpus = Corpus(config, files, say)
    survey = _survey(corpus, labelled)
    _check(survey, corpus.skipped, data, labelled)

    say("tokenizer", 0, 1)
    if given:
        copy_tokenizer(given, folder / "tokenizer")
    else:
        train_bpe(survey.sample, data.vocab_size, folder / "tokenizer")
    special = specials(folder / "tokenizer")
    say("tokenizer", 1, 1)

    writers = {
        split: ShardWriter(folder, split, special.vocab_size, data.shard_tokens, labelled)
        for split in SPLITS
        if survey.documents[split]
    }
    label_ids = {label: i for i, label in enumerate(survey.labels)}
    encode = fast_encoder(folder / "tokenizer", survey.sample[:64])
    by_source: dict[str, Counter[str]] = {}
    total = survey.documents.total()
    for batch in _batches(_counted(corpus, "tokenize", total, say)):
        for document, ids in zip(batch, encode([document.text for document in batch])):
            if labelled and document.label not in label_ids:
                corpus.skipped["label that is not in the training data"] += 1
                continue
            writers[document.split].add(*_row(ids, document, special, label_ids))
            by_source.setdefault(document.source, Counter())[document.split] += 1
    say("tokenize", total, total)

    splits = {}
    for split, writer in writers.items():
        shards = writer.close()
        splits[split] = {
            "documents": sum(shard["rows"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "shards": shards,
        }
    Manifest(
        name=data.name,
        kind="labelled" if labelled else "text",
        sources=_write_sources(folder, by_source, files),
        licence="not stated" if data.source == "files" else LICENCE,
        tokenizer=manifests.sha256(folder / "tokenizer" / "tokenizer.json"),
        vocab_size=special.vocab_size,
        eos_id=special.eos_id,
        pad_id=special.pad_id,
        closing_tokens=len(special.closing) if labelled else 0,
        labels=survey.labels,
        splits=splits,
        skipped={reason: count for reason, count in sorted(corpus.skipped.items()) if count},
        config=dataclasses.asdict(data),
        seed=config.seed,
    ).save(folder)


def _row(ids: np.ndarray, document: Document, special: Specials, label_ids: dict[str, int]) -> tuple[np.ndarray, int]:
    """Return a document's tokens, closed by eos (text) or as its tokenizer frames a sequence (labelled), and its label."""
    if not label_ids:
        return np.append(ids, special.eos_id), 0
    return np.concatenate([special.opening, ids, special.closing]), label_ids[document.label or ""]


def _survey(corpus: Corpus, labelled: bool) -> Survey:
    """Go through the corpus once. The sample for the BPE is of training documents, picked by a hash of their number."""
    rate = BPE_CHARACTERS / max(corpus.bytes, 1)
    count, labels, sample = Counter[str](), set[str](), list[str]()
    for number, document in enumerate(corpus):
        count[document.split] += 1
        if document.split == "train":
            if document.label is not None:
                labels.add(document.label)
            if rate >= 1 or hash_fraction("sample", number) < rate:
                sample.append(document.text)
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return Survey(
        count, sorted(labels, key=lambda label: (int(label), "") if numeric else (0, label)) if labelled else [], sample
    )


def _check(survey: Survey, skipped: Counter[str], data: DataConfig, labelled: bool) -> None:
    """Raise UserError for a corpus that cannot be trained on."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common() if count)
    left_out = f" (left out: {left_out})" if left_out else ""
    where = data.path if data.source == "files" else data.source
    if not survey.documents and skipped["without a label"]:
        raise UserError(
            f"column '{data.label_column}' of {where} is empty in all {skipped['without a label']:,} rows: "
            "check data.label_column"
        )
    if not survey.documents:
        raise UserError(f"{where} holds no text to train on{left_out}: give other files with data.path=...")
    if not survey.documents["train"]:
        raise UserError(
            f"no document is left for training{left_out}: lower data.validation_fraction and data.test_fraction, or give more data"
        )
    for split in ("validation", "test"):
        wanted = getattr(data, f"{split}_path") or getattr(data, f"{split}_fraction")
        if wanted and not survey.documents[split]:
            raise UserError(
                f"none of the {survey.documents.total():,} documents is for {split}{left_out}: raise data.{split}_fraction, "
                f"give data.{split}_path, or set data.{split}_fraction=0 to do without"
            )
    if labelled and len(survey.labels) < 2:
        raise UserError(
            f"the training data has {len(survey.labels)} label in column '{data.label_column}'{left_out}, and a "
            "classification needs two or more: check data.label_column"
        )


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    held: list[Document] = []
    size = 0
    for document in found:
        held.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _counted(found: Any, stage: str, total: int, say: Progress) -> Iterator[Document]:
    """Pass documents through and report every hundredth."""
    for done, document in enumerate(found):
        if done % 100 == 0:
            say(stage, done, total)
        yield document


def _write_sources(folder: Path, by_source: dict[str, Counter[str]], files: dict[str, File]) -> dict[str, Any]:
    """Write one line an input file that gave documents, with its hash, and return their summary."""
    path, size = folder / manifests.SOURCES, 0
    with path.open("w", encoding="utf-8") as out:
        for source, count in by_source.items():
            size += files[source].size
            facts = {"path": source, "sha256": files[source].sha256(), "bytes": files[source].size, "documents": count}
            out.write(json.dumps(facts, ensure_ascii=False) + "\n")
    return {"file": path.name, "files": len(by_source), "bytes": size, "sha256": manifests.sha256(path)}


def _key(data: DataConfig, seed: int, tokenizer: Path | None, files: dict[str, File]) -> str:
    """Hash all that decides the shards: format, options, seed, tokenizer, and each input file's name, size and date."""
    options = dataclasses.asdict(data)
    for elsewhere in ("name", "sequence_length", "tokenizer"):
        del options[elsewhere]
    if tokenizer:
        del options["vocab_size"]
        if not tokenizer.is_dir():
            raise UserError(f"data.tokenizer={tokenizer} is no folder: give the folder of a Hugging Face tokenizer")
    digest = hashlib.sha256(json.dumps([FORMAT, options, seed], sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if tokenizer and (tokenizer / name).is_file():
            digest.update(manifests.sha256(tokenizer / name).encode())
    for source, file in files.items():
        digest.update(f"{source}\x1f{file.size}\x1f{file.stamp}\n".encode())
    return digest.hexdigest()


def _whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        Manifest.load(folder)
    except UserError:
        return False
    return (folder / "tokenizer" / "tokenizer.json").is_file()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel lets go of when its process dies."""
    import fcntl

    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
