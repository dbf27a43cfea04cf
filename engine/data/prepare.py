"""From raw data to a prepared folder: shards, tokenizer and manifest, under a name made of all that decides its content.

The corpus is divided into parts, which are scanned and, once it is known which documents are kept, tokenized: each by
itself, in this process or in others. What a part gave is cached in the unfinished folder, so that the same command goes
on after a kill; the bytes of the shards depend neither on that nor on the number of processes.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections import Counter
from pathlib import Path

from engine.config import Config, DataConfig, source_configs
from engine.data.content_key import content_key
from engine.data.corpus import list_inputs, list_parts
from engine.data.document import Part, explicit_split
from engine.data.kinds import DataKind, Frame, matching_kinds
from engine.data.manifest import PROCESSOR_FOLDER, TOKENIZER_FOLDER, Manifest
from engine.data.parallel_map import (
    ParallelMap,
    is_connected_to_ray,
    map_over_processes,
    map_over_ray,
    map_serially,
)
from engine.data.part_cache import PartCache
from engine.data.part_tokenizer import PartTokenizer
from engine.data.pipeline import Context, DocumentCache, Progress, scan_all, tokenize_all
from engine.data.processor import PREPROCESSOR_FOLDER, write_processor
from engine.data.remote_store import download, file_lock, upload
from engine.data.scan import BPE_CHARACTERS, Selection, sample_sizes, sampled_texts, select_documents
from engine.data.tokenizer import SpecialTokens, copy_tokenizer, has_tokenizer, read_special_tokens, train_bpe
from engine.data.write_manifest import write_manifest
from engine.errors import TransientError, UserError

DECODED_RATIO = 16  # bytes of pixels or sound, about, for one byte of a file
NO_TEXT = SpecialTokens(eos_id=0, pad_id=0, opening=[], closing=[], vocab_size=1)  # of images without captions
MAX_CACHED_BYTES = 2**28  # a corpus up to this size is read once and kept in memory; a larger one is read twice
PROBE_CHARACTERS = 2**17  # of the sample on which a fast encoder is compared to the given tokenizer


def prepare(config: Config, tokenizer: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the prepared folder <runs_dir>/data/<data.name>-<hash>, making it unless a complete one exists, there or in data.store.

    The tokenizer is `tokenizer` (a bundle's folder, for fine-tuning), else data.tokenizer, else a BPE trained on the
    training documents alone. data.sequence_length, data.packing and the sources' weights don't matter: documents are packed
    when they are read. `progress(stage, done, total)` is called with the stages "read", "tokenizer" and "tokenize" (documents;
    a total of 0 is not known yet). Raises UserError for input that cannot be used. The folder appears under its name only
    when it is complete; after a kill the same command goes on where it was, and of two at once the second waits for the first.
    """
    data, on_progress = config.data, progress or (lambda stage, done, total: None)
    chosen = tokenizer or data.tokenizer
    given = Path(chosen) if chosen else None
    if set(data.name) & set("/\\") or data.name.startswith("."):
        raise UserError(f"data.name='{data.name}' cannot name a folder: use letters, digits, '_' and '-'")
    files = list_inputs(data)
    preprocessor = matching_kinds(data)[0].make_preprocessor(config, given)
    key = content_key(data, config.seed, given, files, preprocessor)
    folder = Path(config.runs_dir) / "data" / f"{data.name}-{key[:8]}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            if _is_complete(folder) or (data.store and download(folder, data.store)):
                if data.store:
                    upload(folder, data.store)
                return folder
            partial.mkdir(exist_ok=True)  # it may be there from a run that was killed: this one goes on with it
            if preprocessor is not None:
                preprocessor.save_pretrained(partial / PREPROCESSOR_FOLDER)
                saved = str(partial / PREPROCESSOR_FOLDER)
                data = dataclasses.replace(data, image_processor=saved, feature_extractor=saved)
            _build(config, given, list_parts(data), partial, on_progress)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
            partial.rename(folder)
            if data.store:
                upload(folder, data.store)
    except TransientError:  # what was read so far is kept for another try
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


def _build(config: Config, given: Path | None, corpus: list[Part], folder: Path, on_progress: Progress) -> None:
    """Fill an unfinished folder."""
    data, kind = config.data, corpus[0].kind
    parallel_map = _choose_parallel_map(config, kind)
    max_bytes = (
        -1 if parallel_map is map_over_ray else MAX_CACHED_BYTES // (DECODED_RATIO if kind.has_preprocessor else 1)
    )
    context = Context(
        corpus, config.seed, PartCache(folder), DocumentCache(corpus, max_bytes), parallel_map, on_progress
    )
    scans = scan_all(context, sample_sizes(corpus, PROBE_CHARACTERS if given else BPE_CHARACTERS))
    selection = select_documents(corpus, scans, config.seed)
    _check_selection(selection, data, kind)

    special = NO_TEXT
    if kind.has_text:
        on_progress("tokenizer", 0, 1)
        sample = sampled_texts(scans, selection) if not given else []
        _write_tokenizer(data, kind, given, sample, folder)
        on_progress("tokenizer", 1, 1)
        special = read_special_tokens(folder / TOKENIZER_FOLDER)

    work = PartTokenizer(Frame.of(special, kind), data.shard_tokens, special.vocab_size, tuple(selection.labels))
    if context.documents.enabled and parallel_map is map_over_processes:
        # Documents in memory are encoded by threads: sending them to other processes would take as long.
        context = dataclasses.replace(context, parallel_map=map_serially)
    shards = tokenize_all(context, work, scans, selection)
    if kind.has_preprocessor:
        write_processor(config, given, folder, kind.load_preprocessor)
    write_manifest(config, corpus, scans, selection, shards, special, folder)
    context.parts.clear()


def _choose_parallel_map(config: Config, kind: DataKind) -> ParallelMap:
    if kind.has_preprocessor:
        return map_serially  # threads decode images and sounds, and the preprocessor is a folder of this machine
    return map_over_ray if config.cluster.address != "local" and is_connected_to_ray() else map_over_processes


def _write_tokenizer(data: DataConfig, kind: DataKind, given: Path | None, sample: list[str], folder: Path) -> None:
    """Copy the given tokenizer, or train one on the sample, unless an earlier try has left one."""
    if (folder / TOKENIZER_FOLDER).exists():
        return
    unfinished = folder / "tokenizer.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    copied = given is not None and (has_tokenizer(given) or str(given) == data.tokenizer)
    if given and copied:
        copy_tokenizer(given, unfinished)
    else:
        train_bpe(sample, data.vocab_size, unfinished, data.sentinel_tokens, closing=data.sentinel_tokens > 0)
    kind.finish_tokenizer(unfinished, trained=not copied)
    unfinished.rename(folder / TOKENIZER_FOLDER)


def _check_selection(selection: Selection, data: DataConfig, kind: DataKind) -> None:
    """Raise UserError for a corpus that cannot be trained on."""
    documents, skipped = selection.documents, sum(selection.skipped.values(), Counter[str]())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common() if count)
    left_out = f" (left out: {reasons})" if reasons else ""
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
            explicit_split(own, split) or getattr(own, f"{split}_fraction") for own in source_configs(data).values()
        )
        if wanted and not documents[split]:
            raise UserError(
                f"none of the {documents.total():,} documents is for {split}{left_out}: raise data.{split}_fraction, "
                f"give data.{split}_path, or set data.{split}_fraction=0 to do without"
            )
    if kind.has_labels and len(selection.labels) < 2:
        raise UserError(
            f"the training data has {len(selection.labels)} label in column '{data.label_column}'{left_out}, and "
            "two or more are needed: check data.label_column"
        )


def _is_complete(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        Manifest.load(folder)
    except UserError:
        return False
    return (folder / TOKENIZER_FOLDER / "tokenizer.json").is_file() or (folder / PROCESSOR_FOLDER).is_dir()
