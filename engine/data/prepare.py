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
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, DataConfig, data_kind, source_configs
from engine.data import manifest as manifests
from engine.data.corpus import SPLITS, Document, Part, given_split, inputs, parts, read
from engine.data.files import File
from engine.data.journal import Journal
from engine.data.manifest import PROCESSOR, TOKENIZER, Manifest, hash_of
from engine.data.processor import has_image_processor, join, load_image_processor, new_image_processor, side_of
from engine.data.spread import connected, spread
from engine.data.stdlib import LICENCE
from engine.data.survey import BPE_CHARACTERS, DROPPED, Kept, Survey, keep, sample_sizes, sampled, survey
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
from engine.data.tokenizing import Framing, Shards, Tokenizing, no_tokens
from engine.errors import UserError

Progress = Callable[[str, int, int], None]

IMAGE_PROCESSOR = "image_processor"  # folder of an unfinished folder
UNPACKED = 16  # bytes of pixels, about, for one of an image's file
NO_TEXT = Specials(eos_id=0, pad_id=0, opening=[], closing=[], vocab_size=1)  # of images without captions
FORMAT = 3  # raise it when the same input would give other shards
HELD_BYTES = 2**28  # a corpus up to this size is read once and kept in memory; a larger one is read twice
PROBE_CHARACTERS = 2**17  # of the sample by which a fast encoder is compared to the tokenizer that is given


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


def _build(config: Config, given: Path | None, corpus: list[Part], folder: Path, say: Progress) -> None:
    data = config.data
    labelled = data.label_column is not None or data.source == "python_functions"
    images = data.image_column is not None
    far = config.cluster.address != "local" and connected() and not images
    held = Held(corpus, config.seed, within=0 if far else HELD_BYTES // (UNPACKED if images else 1))
    journal = Journal(folder)
    sizes = sample_sizes(corpus, PROBE_CHARACTERS if given else BPE_CHARACTERS)
    surveys = _survey_all(corpus, config.seed, sizes, journal, held, far, say)
    kept = keep(corpus, surveys, config.seed, labelled)
    _check(kept, data, labelled)

    special = NO_TEXT
    if not images or data.caption:
        say("tokenizer", 0, 1)
        sample = sampled(surveys, kept) if not given else []
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
    shards = _tokenize_all(work, corpus, surveys, kept, journal, held, far, say)
    if images:
        _join_processor(config, given, folder)
    _write_manifest(config, corpus, surveys, kept, shards, special, folder, labelled)
    journal.close()


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
    if _keeps_texts(part):
        paths = [file["path"] for file in known.files]
        return (Document(text or "", "", paths[i]) for text, i in zip(known.texts, known.origins))
    return read(part, seed, Counter(), Counter())


def _survey_all(
    corpus: Sequence[Part],
    seed: int,
    characters: Sequence[float],
    journal: Journal,
    held: Held,
    far: bool,
    say: Progress,
) -> list[Survey]:
    """Survey each part, but for those that the unfinished folder has a survey of."""
    found = {part.number: known for part in corpus if (known := journal.survey(part)) is not None}
    done = 0

    def keep(part: Part, content: Survey) -> None:
        nonlocal done
        done += len(content.splits)
        say("read", done, 0)
        found[part.number] = content
        journal.keep_survey(part, content)

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


def _tokenize_all(
    work: Tokenizing,
    corpus: Sequence[Part],
    surveys: Sequence[Survey],
    kept: Kept,
    journal: Journal,
    held: Held,
    far: bool,
    say: Progress,
) -> list[Shards]:
    """Tokenize each part, but for those that the unfinished folder has the shards of; return the shards' facts by part."""
    total, folder = kept.documents.total(), journal.folder
    found = {part.number: facts for part in corpus if (facts := journal.shards(part)) is not None}
    counts = [int((one != DROPPED).sum()) for one in kept.splits]
    done = sum(counts[number] for number in found)
    say("tokenize", done, total)

    def keep(number: int, facts: Shards) -> None:
        nonlocal done
        found[number] = facts
        journal.keep_shards(corpus[number], facts)
        done += counts[number]
        say("tokenize", done, total)

    probe = sampled(surveys, kept)[:64]
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


def _write_manifest(
    config: Config, corpus: Sequence[Part], surveys: Sequence[Survey], kept: Kept,
    shards: Sequence[Shards], special: Specials, folder: Path, labelled: bool,
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
