"""Raw text to a prepared folder: shards, tokenizer and manifest, under a name made of all that decides its content.

The corpus is cut into parts, which are surveyed and, once it is known which documents are kept, tokenized: each by
itself, here or by the cluster's processes. What a part gave is kept in the unfinished folder, so that the same command
goes on after a kill; the shards are the same bytes however often that was and whoever did the work.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from engine.config import Config, DataConfig, data_kind, source_configs
from engine.data import manifest as manifests
from engine.data.corpus import SPLITS, Document, Part, given_split, inputs, parts, read
from engine.data.files import File
from engine.data.manifest import PROCESSOR, TOKENIZER, Manifest, hash_of
from engine.data.processor import has_image_processor, join, load_image_processor, new_image_processor, side_of
from engine.data.shards import ShardWriter
from engine.data.spread import connected, spread
from engine.data.stdlib import LICENCE
from engine.data.survey import DROPPED, Survey, choose, survey
from engine.data.tokenizer import (
    FILES,
    Encoder,
    Specials,
    close_with_eos,
    copy_tokenizer,
    fast_encoder,
    has_tokenizer,
    load_tokenizer,
    specials,
    train_bpe,
)  # fmt: skip
from engine.errors import UserError

Progress = Callable[[str, int, int], None]
Write = Callable[[str, bytes], object]  # name, content
T = TypeVar("T")
R = TypeVar("R")

IMAGE_PROCESSOR = "image_processor"  # folder of an unfinished folder
UNPACKED = 16  # bytes of pixels, about, for one of an image's file
NO_TEXT = Specials(eos_id=0, pad_id=0, opening=[], closing=[], vocab_size=1)  # of images without captions
FORMAT = 3  # raise it when the same input would give other shards
HELD_BYTES = 2**28  # a corpus up to this size is read once and kept in memory; a larger one is read twice
BPE_CHARACTERS = 2**23  # a BPE is trained on a sample of about this size, spread evenly over the training documents
PROBE_CHARACTERS = 2**17  # of the sample by which a fast encoder is compared to the tokenizer that is given
BATCH_CHARACTERS = 2**21  # encoded at once


def prepare(config: Config, tokenizer: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the prepared folder <runs_dir>/data/<data.name>-<hash>, making it unless it is already there and whole.

    The tokenizer is `tokenizer` (a bundle's folder, for fine-tuning), else data.tokenizer, else a BPE trained on the
    training documents alone. data.sequence_length, data.packing and the sources' weights play no part: documents are packed
    when they are read. `progress(stage, done, total)` is called with the stages "read", "tokenizer" and "tokenize" (documents;
    a total of 0 is not known yet). Raises UserError for input that cannot be used. Nothing half-made is left under the
    folder's name; after a kill the same command goes on where it was, and of two at once the second waits for the first.
    """
    data, say = config.data, progress or (lambda stage, done, total: None)
    chosen = tokenizer or data.tokenizer
    given = Path(chosen) if chosen else None
    if set(data.name) & set("/\\") or data.name.startswith("."):
        raise UserError(f"data.name='{data.name}' cannot name a folder: use letters, digits, '_' and '-'")
    files = inputs(data)
    images = _image_processor(config, given) if data.image_column else None
    folder = Path(config.runs_dir) / "data" / f"{data.name}-{_key(data, config.seed, given, files, images)[:8]}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if _whole(folder):
                return folder
            partial.mkdir(exist_ok=True)  # it may be of a run that was killed: this one goes on with it
            if images is not None:
                images.save_pretrained(partial / IMAGE_PROCESSOR)
                data = dataclasses.replace(data, image_processor=str(partial / IMAGE_PROCESSOR))
            _build(config, given, parts(data), partial, say)
            shutil.rmtree(folder, ignore_errors=True)  # one that isn't whole
            partial.rename(folder)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            shutil.rmtree(partial, ignore_errors=True)
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


@dataclass(frozen=True)
class Kept:
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


def _build(config: Config, given: Path | None, corpus: list[Part], folder: Path, say: Progress) -> None:
    data = config.data
    labelled = data.label_column is not None or data.source == "python_functions"
    images = data.image_column is not None
    far = config.cluster.address != "local" and connected() and not images
    held = Held(corpus, config.seed, within=0 if far else HELD_BYTES // (UNPACKED if images else 1))
    sizes = _sample_sizes(corpus, PROBE_CHARACTERS if given else BPE_CHARACTERS)
    surveys = _survey_all(corpus, config.seed, sizes, folder, held, far, say)
    kept = _keep(corpus, surveys, config.seed, labelled)
    _check(kept, data, labelled)

    special = NO_TEXT
    if not images or data.caption:
        say("tokenizer", 0, 1)
        sample = _sample(surveys, kept) if not given else []
        if not (folder / "tokenizer").exists():
            part = folder / "tokenizer.part"
            shutil.rmtree(part, ignore_errors=True)
            if given and (has_tokenizer(given) or str(given) == data.tokenizer):
                copy_tokenizer(given, part)
            else:
                train_bpe(
                    sample, data.vocab_size, part, data.sentinel_tokens, closing=images or data.sentinel_tokens > 0
                )
            if images:
                close_with_eos(part)
            part.rename(folder / "tokenizer")
        say("tokenizer", 1, 1)
        special = specials(folder / "tokenizer")

    framing = Framing.of(special, labelled or images)
    work = Tokenizing(framing, data.shard_tokens, special.vocab_size, labelled)
    shards = _tokenize_all(work, corpus, surveys, kept, folder, held, far, say)
    if images:
        _join_processor(config, given, folder)
    _write_manifest(config, corpus, surveys, kept, shards, special, folder, labelled)
    for file in (*folder.glob("survey-*"), *folder.glob("part-*")):
        file.unlink()


def _image_processor(config: Config, given: Path | None) -> Any:
    """Return what scales the images: data.image_processor, else that of `given`, else the architecture's own."""
    folder = config.data.image_processor or (given if given and has_image_processor(given) else None)
    if folder is None:
        return new_image_processor(_architecture(config, given), config.data.image_size)
    found = load_image_processor(str(folder))
    if side_of(found) is None:
        raise UserError(f"the image processor in {folder} does not make square images of one size: give another one")
    return found


def _architecture(config: Config, given: Path | None) -> str:
    """Return the model type of a start bundle, else that of the config."""
    if given and (given / "config.json").is_file():
        return str(json.loads((given / "config.json").read_text()).get("model_type", config.model.type))
    return config.model.type


def _join_processor(config: Config, given: Path | None, folder: Path) -> None:
    """Put what reads images, and captions where there are, into one folder, as a model's folder has it."""
    shutil.rmtree(folder / PROCESSOR, ignore_errors=True)
    found = load_image_processor(str(folder / IMAGE_PROCESSOR))
    if config.data.caption:
        found = join(_architecture(config, given), found, load_tokenizer(folder / "tokenizer"))
    found.save_pretrained(folder / PROCESSOR)
    for name in ("tokenizer", IMAGE_PROCESSOR):
        shutil.rmtree(folder / name, ignore_errors=True)


class Held:
    """The documents of parts, kept in memory while the corpus is small, else read again."""

    def __init__(self, corpus: Sequence[Part], seed: int, within: int) -> None:
        size = sum(piece.size for part in corpus for piece in part.pieces)
        self.seed = seed
        self._kept: dict[int, list[Document]] | None = {} if size <= within else None

    def room(self, part: Part) -> list[Document] | None:
        """Return a list to put the part's documents into, or None where there are too many."""
        return None if self._kept is None else self._kept.setdefault(part.number, [])

    def documents(self, part: Part, known: Survey) -> Iterator[Document]:
        """Return the documents that were surveyed, and let go of them."""
        if self._kept and part.number in self._kept:
            return iter(self._kept.pop(part.number))
        return _again(part, known, self.seed)


def _again(part: Part, known: Survey, seed: int) -> Iterator[Document]:
    """Return a part's documents a second time. Raises UserError where they are no longer those that were surveyed."""
    if all(text is not None for text in known.texts):
        paths = [file["path"] for file in known.files]
        return (Document(text or "", "", paths[i]) for text, i in zip(known.texts, known.origins))
    return read(part, seed, Counter(), Counter())


def _survey_all(
    corpus: Sequence[Part], seed: int, characters: Sequence[float], folder: Path, held: Held, far: bool, say: Progress
) -> list[Survey]:
    """Survey each part, but for those that the unfinished folder has a survey of."""
    found: dict[int, Survey] = {}
    for part in corpus:
        try:
            found[part.number] = Survey.from_bytes(_survey_file(folder, part).read_bytes())
        except (OSError, ValueError, EOFError, BadZipFile):  # there is none, or it is damaged
            pass
    done = 0

    def keep(part: Part, content: Survey) -> None:
        nonlocal done
        done += len(content.splits)
        say("read", done, 0)
        found[part.number] = content
        _put(_survey_file(folder, part), content.to_bytes())

    say("read", done, 0)
    todo = [part for part in corpus if part.number not in found]
    if far:

        def work(part: Part) -> tuple[int, bytes]:
            return part.number, survey(part, seed, characters[part.number], _keeps_texts(part)).to_bytes()

        for number, content in spread(work, todo):
            keep(corpus[number], Survey.from_bytes(content))
    else:
        for part in todo:
            keep(part, survey(part, seed, characters[part.number], _keeps_texts(part), held.room(part)))
    return [found[part.number] for part in corpus]


def _keep(corpus: Sequence[Part], surveys: Sequence[Survey], seed: int, labelled: bool) -> Kept:
    """Choose the documents, and number their labels; held-out documents with a label that training lacks are left out."""
    splits, skipped = choose(corpus, surveys, seed)
    for part, known in zip(corpus, surveys):
        skipped[part.source] += known.skipped
    if not labelled:
        return Kept(splits, [np.empty(0, np.int32)] * len(splits), [], skipped)
    trained = {known.labels[i] or "" for known, one in zip(surveys, splits) for i in np.flatnonzero(one == 0).tolist()}
    numeric = all(label.lstrip("-").isdecimal() for label in trained)
    labels = sorted(trained, key=lambda label: (int(label), "") if numeric else (0, label))
    number = {label: i for i, label in enumerate(labels)}
    label_ids = [np.array([number.get(label or "", -1) for label in known.labels], np.int32) for known in surveys]
    for part, one, ids in zip(corpus, splits, label_ids):
        unknown = (one != DROPPED) & (ids < 0)
        one[unknown] = DROPPED
        skipped[part.source]["label that is not in the training data"] += int(unknown.sum())
    return Kept(splits, label_ids, labels, skipped)


def _sample_sizes(corpus: Sequence[Part], characters: int) -> list[float]:
    """Return how many characters each part gives to a sample of so many in all."""
    sizes = [sum(piece.size for piece in part.pieces) for part in corpus]
    total = sum(sizes)
    return [characters * (size / total if total else 1 / len(sizes)) for size in sizes]


def _sample(surveys: Sequence[Survey], kept: Kept) -> list[str]:
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


def _check(kept: Kept, data: DataConfig, labelled: bool) -> None:
    """Raise UserError for a corpus that cannot be trained on."""
    documents, skipped = kept.documents, sum(kept.skipped.values(), Counter[str]())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common() if count)
    left_out = f" (left out: {left_out})" if left_out else ""
    where = ", ".join(data.sources) or (data.path if data.source in ("files", "huggingface") else data.source)
    if not documents.total() and skipped["without a label"]:
        raise UserError(
            f"column '{data.label_column}' of {where} is empty in all {skipped['without a label']:,} rows: "
            "check data.label_column"
        )
    if not documents.total():
        raise UserError(f"{where} holds no text to train on{left_out}: give other files with data.path=...")
    if not documents["train"]:
        raise UserError(
            f"no document is left for training{left_out}: lower data.validation_fraction and data.test_fraction, or give more data"
        )
    for split in ("validation", "test"):
        wanted = any(
            given_split(own, split) or getattr(own, f"{split}_fraction") for own in source_configs(data).values()
        )
        if wanted and not documents[split]:
            raise UserError(
                f"none of the {documents.total():,} documents is for {split}{left_out}: raise data.{split}_fraction, "
                f"give data.{split}_path, or set data.{split}_fraction=0 to do without"
            )
    if labelled and len(kept.labels) < 2:
        raise UserError(
            f"the training data has {len(kept.labels)} label in column '{data.label_column}'{left_out}, and a "
            "classification needs two or more: check data.label_column"
        )


@dataclass(frozen=True)
class Framing:
    """What is put around each document's tokens: eos after a text, and what its tokenizer frames a labelled row with."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, special: Specials, labelled: bool) -> Framing:
        """Read it from a tokenizer's special ids."""
        return cls(tuple(special.opening), tuple(special.closing)) if labelled else cls((), (special.eos_id,))

    def lay(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Lay rows of tokens end to end; returns the tokens and each row's length."""
        before, after = np.array(self.before, np.uint32), np.array(self.after, np.uint32)
        lengths = np.array([len(row) for row in rows], np.int64) + len(before) + len(after)
        if not len(before):
            return np.concatenate([piece for row in rows for piece in (row, after)]), lengths
        return np.concatenate([piece for row in rows for piece in (before, row, after)]), lengths


@dataclass(frozen=True)
class Tokenizing:
    """How a part becomes shards."""

    framing: Framing
    shard_tokens: int
    vocab_size: int
    labelled: bool

    def run(
        self,
        part: Part,
        documents: Iterable[Document],
        splits: np.ndarray,
        label_ids: np.ndarray,
        encode: Encoder,
        write: Write,
        heard: Callable[[int], None] = lambda done: None,
    ) -> dict[str, list[dict[str, Any]]]:
        """Write the shards of a part's documents and return their facts by split; `heard` is told how many are done."""
        writers = {
            split: ShardWriter(write, f"{split}-{part.number:05d}", self.vocab_size, self.shard_tokens, self.labelled)
            for split in SPLITS
        }

        def encoded(batch: Batch) -> tuple[Batch, np.ndarray, np.ndarray]:
            return batch, *self.framing.lay(encode([document.text for document in batch.documents]))

        done = 0
        for batch, tokens, lengths in _ahead(encoded, _batches(part, documents, splits)):
            labels = label_ids[batch.numbers] if self.labelled else None
            writers[batch.split].add(tokens, lengths, labels, batch.images())
            done += len(batch.documents)
            heard(done)
        return {split: writer.close() for split, writer in writers.items()}


@dataclass
class Batch:
    """Documents of one split that are encoded together, and their numbers in their part."""

    split: str
    documents: list[Document] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    characters: int = 0  # and bytes of pixels

    def images(self) -> np.ndarray | None:
        """Return the documents' images, if they are: uint8 [documents, S, S, 3]."""
        found = [document.image for document in self.documents if document.image is not None]
        return np.stack(found) if found else None


def _batches(part: Part, documents: Iterable[Document], splits: np.ndarray) -> Iterator[Batch]:
    held = {number: Batch(split) for number, split in enumerate(SPLITS)}
    count = 0
    for count, document in enumerate(documents, start=1):
        if count > len(splits):
            break
        if (number := int(splits[count - 1])) == DROPPED:
            continue
        batch = held[number]
        batch.documents.append(document)
        batch.numbers.append(count - 1)
        batch.characters += len(document.text) + (0 if document.image is None else document.image.nbytes)
        if batch.characters >= BATCH_CHARACTERS:
            yield batch
            held[number] = Batch(batch.split)
    if count != len(splits):
        raise UserError(
            f"{part.pieces[0].file.path} gave other documents the second time it was read: "
            "do not change the input meanwhile, and use a data.filter that always gives the same answer"
        )
    yield from (batch for batch in held.values() if batch.documents)


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function to each item on a thread, one item ahead of what is asked for."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _tokenize_all(
    work: Tokenizing,
    corpus: Sequence[Part],
    surveys: Sequence[Survey],
    kept: Kept,
    folder: Path,
    held: Held,
    far: bool,
    say: Progress,
) -> list[dict[str, list[dict[str, Any]]]]:
    """Tokenize each part, but for those that the unfinished folder has the shards of; return the shards' facts by part."""
    total, done = kept.documents.total(), 0
    found = {part.number: facts for part in corpus if (facts := _finished(folder, part)) is not None}
    counts = [int((one != DROPPED).sum()) for one in kept.splits]
    done = sum(counts[number] for number in found)
    say("tokenize", done, total)

    def keep(number: int, facts: dict[str, list[dict[str, Any]]]) -> None:
        nonlocal done
        found[number] = facts
        _put(_part_file(folder, corpus[number]), json.dumps(facts).encode())
        done += counts[number]
        say("tokenize", done, total)

    probe = _sample(surveys, kept)[:64]
    todo = [part for part in corpus if part.number not in found]
    if far:
        files = {
            name: (folder / "tokenizer" / name).read_bytes() for name in FILES if (folder / "tokenizer" / name).exists()
        }
        seed = held.seed

        def remote(item: tuple[Part, bytes | None, np.ndarray, np.ndarray]) -> tuple[int, Any, dict[str, bytes]]:
            part, known, splits, label_ids = item
            encode, content = _remote_encoder(tuple(files.items()), tuple(probe)), {}
            documents = (
                _again(part, Survey.from_bytes(known), seed) if known else read(part, seed, Counter(), Counter())
            )
            facts = work.run(
                part, documents, splits, label_ids, encode, lambda name, shard: content.update({name: bytes(shard)})
            )
            return part.number, facts, content

        items = [
            (
                part,
                surveys[part.number].to_bytes() if _keeps_texts(part) else None,
                kept.splits[part.number],
                kept.label_ids[part.number],
            )
            for part in todo
        ]
        for number, facts, content in spread(remote, items):
            for name, shard in content.items():
                (folder / name).write_bytes(shard)
            keep(number, facts)
    elif todo:
        encode = fast_encoder(folder / "tokenizer", probe) if (folder / "tokenizer").exists() else no_tokens
        for part in todo:
            facts = work.run(
                part, held.documents(part, surveys[part.number]), kept.splits[part.number], kept.label_ids[part.number],
                encode, lambda name, shard: (folder / name).write_bytes(shard), lambda more: say("tokenize", done + more, total),
            )  # fmt: skip
            keep(part.number, facts)
    return [found[part.number] for part in corpus]


def no_tokens(texts: list[str]) -> list[np.ndarray]:
    """Encode the texts of images that have none."""
    return [np.empty(0, np.uint32) for _ in texts]


@lru_cache(maxsize=1)
def _remote_encoder(files: tuple[tuple[str, bytes], ...], probe: tuple[str, ...]) -> Encoder:
    """Make the encoder in a process that has not got the tokenizer's folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files:
            (Path(folder) / name).write_bytes(content)
        return fast_encoder(Path(folder), probe)


def _keeps_texts(part: Part) -> bool:
    """Say whether the survey keeps a part's texts, since to read it again is to fetch it again."""
    if part.config.source != "huggingface":
        return False
    from engine.data.hub import streams

    return streams(part)


def _survey_file(folder: Path, part: Part) -> Path:
    return folder / f"survey-{part.number:05d}.npz"


def _part_file(folder: Path, part: Part) -> Path:
    return folder / f"part-{part.number:05d}.json"


def _put(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _finished(folder: Path, part: Part) -> dict[str, list[dict[str, Any]]] | None:
    """Return what is on record of a part's shards, if all of them are there, unchanged."""
    try:
        facts: dict[str, list[dict[str, Any]]] = json.loads(_part_file(folder, part).read_text())
        shards = [shard for split in facts.values() for shard in split]
        return facts if all(manifests.sha256(folder / shard["file"]) == shard["sha256"] for shard in shards) else None
    except (OSError, ValueError):
        return None


def _write_manifest(
    config: Config, corpus: Sequence[Part], surveys: Sequence[Survey], kept: Kept,
    shards: Sequence[dict[str, list[dict[str, Any]]]], special: Specials, folder: Path, labelled: bool,
) -> None:  # fmt: skip
    images = config.data.image_column is not None
    names = list(source_configs(config.data))
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        mine = [shard | {"source": part.source} for part, facts in zip(corpus, shards) for shard in facts[split]]
        if mine:
            mine.sort(key=lambda shard: names.index(shard["source"]))  # stable: each source's lie together
            splits[split] = {
                "documents": sum(shard["rows"] for shard in mine),
                "tokens": sum(shard["tokens"] for shard in mine),
                "shards": mine,
            }
    by_file = _by_file(corpus, surveys, kept)
    origins = {}
    for name, own in source_configs(config.data).items():
        files = [file for (source, _), file in by_file.items() if source == name]
        masked = sum((known.masked for part, known in zip(corpus, surveys) if part.source == name), Counter[str]())
        origins[name] = {
            "licence": LICENCE if own.source.startswith("python_") and own.licence == "not stated" else own.licence,
            "files": len(files),
            "bytes": sum(file["bytes"] for file in files),
            "documents": {
                split: sum(s["rows"] for s in facts["shards"] if s["source"] == name) for split, facts in splits.items()
            },
            "tokens": {
                split: sum(s["tokens"] for s in facts["shards"] if s["source"] == name)
                for split, facts in splits.items()
            },
            "skipped": {reason: count for reason, count in sorted(kept.skipped.get(name, Counter()).items()) if count},
            "masked": dict(sorted(masked.items())),
        }
    Manifest(
        name=config.data.name,
        kind=data_kind(config.data),
        sources=_write_sources(folder, by_file),
        origins=origins,
        tokenizer=hash_of(folder / PROCESSOR) if images else manifests.sha256(folder / "tokenizer" / "tokenizer.json"),
        vocab_size=special.vocab_size,
        eos_id=special.eos_id,
        pad_id=special.pad_id,
        closing_tokens=len(special.closing) if labelled or images else 0,
        labels=kept.labels,
        splits=splits,
        config=dataclasses.asdict(config.data),
        seed=config.seed,
        image_size=side_of(load_image_processor(str(folder / PROCESSOR))) or 0 if images else 0,
    ).save(folder)


def _by_file(corpus: Sequence[Part], surveys: Sequence[Survey], kept: Kept) -> dict[tuple[str, str], dict[str, Any]]:
    """Return, by (source, path), the facts of each file that gave documents: path, sha256, bytes, documents by split."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part, known, one in zip(corpus, surveys, kept.splits):
        for i, file in enumerate(known.files):
            facts = found.setdefault((part.source, file["path"]), {"source": part.source, "documents": Counter()})
            facts |= file
            counts = np.bincount(one[known.origins == i], minlength=DROPPED + 1)[:DROPPED]
            facts["documents"] += Counter({split: int(n) for split, n in zip(SPLITS, counts) if n})
    return {key: facts for key, facts in found.items() if facts["documents"]}


def _write_sources(folder: Path, by_file: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Write one line an input file that gave documents, and return their summary."""
    path = folder / manifests.SOURCES
    with path.open("w", encoding="utf-8") as out:
        for facts in by_file.values():
            out.write(json.dumps(facts, ensure_ascii=False, sort_keys=True) + "\n")
    size = sum(facts["bytes"] for facts in by_file.values())
    return {"file": path.name, "files": len(by_file), "bytes": size, "sha256": manifests.sha256(path)}


def _key(data: DataConfig, seed: int, tokenizer: Path | None, files: list[tuple[str, str, File]], images: Any) -> str:
    """Hash all that decides the shards: format, options, seed, tokenizer, filters, and each input file's name, size and date."""
    from engine.data.filters import filter_source

    options = dataclasses.asdict(data)
    for elsewhere in (
        "name", "sequence_length", "tokenizer", "packing", "within_documents", "stream", "image_processor", "image_size",
    ):  # fmt: skip
        del options[elsewhere]
    options["sources"] = {
        name: {key: value for key, value in own.items() if key not in ("weight", "stream")}
        for name, own in data.sources.items()
    }
    if tokenizer and not tokenizer.is_dir():
        raise UserError(f"data.tokenizer={tokenizer} is no folder: give the folder of a Hugging Face tokenizer")
    if tokenizer and has_tokenizer(tokenizer):
        del options["vocab_size"], options["sentinel_tokens"]
    digest = hashlib.sha256(
        json.dumps([FORMAT, options, seed]).encode()
    )  # the order of sources is that of their documents
    if images is not None:
        digest.update(images.to_json_string().encode())
    for own in source_configs(data).values():
        digest.update(filter_source(own.filter) if own.filter else b"")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if tokenizer and (tokenizer / name).is_file():
            digest.update(manifests.sha256(tokenizer / name).encode())
    for source, path, file in files:
        digest.update(f"{source}\x1f{path}\x1f{file.size}\x1f{file.stamp}\n".encode())
    return digest.hexdigest()


def _whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        Manifest.load(folder)
    except UserError:
        return False
    return (folder / TOKENIZER / "tokenizer.json").is_file() or (folder / PROCESSOR).is_dir()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel lets go of when its process dies."""
    import fcntl

    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
