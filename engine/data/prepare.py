"""Raw text to a prepared folder: shards, tokenizer and manifest, under a name made of all that decides its content.

The corpus is cut into parts, which are surveyed and, once it is known which documents are kept, tokenized: each by
itself, here or by other processes. What a part gave is kept in the unfinished folder, so that the same command goes on
after a kill; the shards are the same bytes however often that was and whoever did the work.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections import Counter
from pathlib import Path

from engine.config import Config, DataConfig, source_configs
from engine.data.corpus import Part, given_split, inputs, parts
from engine.data.journal import Journal
from engine.data.manifest import PROCESSOR, TOKENIZER, Manifest
from engine.data.naming import content_key
from engine.data.pipeline import Held, Progress, Surveying, scan_all, tokenize_all
from engine.data.processor import PREPROCESSOR, choose_preprocessor, write_processor
from engine.data.remote_store import fetch, locked, publish
from engine.data.scan import BPE_CHARACTERS, Selection, keep, sample_sizes, sampled
from engine.data.spread import Spread, alone, connected, over_cluster, over_processes
from engine.data.tokenizer import (
    Specials,
    close_with_eos,
    copy_tokenizer,
    has_tokenizer,
    open_transcripts,
    specials,
    train_bpe,
)
from engine.data.tokenizing import Framing, Tokenizing
from engine.data.write_manifest import write_manifest
from engine.errors import TryAgain, UserError

UNPACKED = 16  # bytes of pixels or sound, about, for one of a file
NO_TEXT = Specials(eos_id=0, pad_id=0, opening=[], closing=[], vocab_size=1)  # of images without captions
HELD_BYTES = 2**28  # a corpus up to this size is read once and kept in memory; a larger one is read twice
PROBE_CHARACTERS = 2**17  # of the sample by which a fast encoder is compared to the tokenizer that is given


def prepare(config: Config, tokenizer: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the prepared folder <runs_dir>/data/<data.name>-<hash>, making it unless it is there, or in data.store, and whole.

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
    preprocessor = choose_preprocessor(config, given)
    key = content_key(data, config.seed, given, files, preprocessor)
    folder = Path(config.runs_dir) / "data" / f"{data.name}-{key[:8]}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if _whole(folder) or (data.store and fetch(folder, data.store)):
                if data.store:
                    publish(folder, data.store)
                return folder
            partial.mkdir(exist_ok=True)  # it may be of a run that was killed: this one goes on with it
            if preprocessor is not None:
                preprocessor.save_pretrained(partial / PREPROCESSOR)
                named = str(partial / PREPROCESSOR)
                data = dataclasses.replace(data, image_processor=named, feature_extractor=named)
            _build(config, given, parts(data), partial, say)
            shutil.rmtree(folder, ignore_errors=True)  # one that isn't whole
            partial.rename(folder)
            if data.store:
                publish(folder, data.store)
    except TryAgain:  # what was read so far is kept for another try
        raise
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
    data, seed = config.data, config.seed
    labelled = data.label_column is not None or data.source == "python_functions"
    images, media = data.image_column is not None, bool(data.image_column or data.audio_column)
    spread = _spread(config)
    within = -1 if spread is over_cluster else HELD_BYTES // (UNPACKED if media else 1)
    held, journal = Held(corpus, within), Journal(folder)
    sizes = sample_sizes(corpus, PROBE_CHARACTERS if given else BPE_CHARACTERS)
    surveys = scan_all(corpus, Surveying(seed, sizes, held.small), journal, held, spread, say)
    kept = keep(corpus, surveys, seed, labelled)
    _check(kept, data, labelled)

    special = NO_TEXT
    if not images or data.caption:
        say("tokenizer", 0, 1)
        sample = sampled(surveys, kept) if not given else []
        _write_tokenizer(data, given, sample, folder)
        say("tokenizer", 1, 1)
        special = specials(folder / TOKENIZER)

    framing = Framing.of(special, labelled or images)
    work = Tokenizing(framing, data.shard_tokens, special.vocab_size, labelled)
    if held.small and spread is over_processes:
        spread = alone  # what is at hand is encoded by threads; to hand it on would take as long
    shards = tokenize_all(work, corpus, surveys, kept, seed, journal, held, spread, say)
    if media:
        write_processor(config, given, folder)
    write_manifest(config, corpus, surveys, kept, shards, special, folder, labelled)
    journal.close()


def _spread(config: Config) -> Spread:
    if config.data.image_column or config.data.audio_column:
        return alone  # threads decode images and sounds, and the options of these name a folder here
    return over_cluster if config.cluster.address != "local" and connected() else over_processes


def _write_tokenizer(data: DataConfig, given: Path | None, sample: list[str], folder: Path) -> None:
    """Copy the tokenizer that is given, or train one on the sample, unless an earlier try left one."""
    if (folder / TOKENIZER).exists():
        return
    media, part = bool(data.image_column or data.audio_column), folder / "tokenizer.part"
    shutil.rmtree(part, ignore_errors=True)
    if given and (has_tokenizer(given) or str(given) == data.tokenizer):
        copy_tokenizer(given, part)
    else:
        train_bpe(sample, data.vocab_size, part, data.sentinel_tokens, closing=media or data.sentinel_tokens > 0)
        if data.audio_column:
            open_transcripts(part)
    if media:
        close_with_eos(part)
    part.rename(folder / TOKENIZER)


def _check(kept: Selection, data: DataConfig, labelled: bool) -> None:
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
        hint = " or make it UTF-8 (iconv -f UTF-16 -t UTF-8, say)" if skipped["not UTF-8"] else ""
        raise UserError(f"{where} holds no text to train on{left_out}: give other files with data.path=...{hint}")
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


def _whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        Manifest.load(folder)
    except UserError:
        return False
    return (folder / TOKENIZER / "tokenizer.json").is_file() or (folder / PROCESSOR).is_dir()
