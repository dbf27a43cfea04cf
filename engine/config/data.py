"""The options of data: sources, filters, the tokenizer, packing."""

from __future__ import annotations

import dataclasses
import math
import re
import string
from dataclasses import dataclass
from typing import Any, Optional, get_type_hints

from engine.config.address import check_address
from engine.config.option import Frozen, check_range, flag_values, is_of, option, type_name
from engine.errors import UserError, did_you_mean


@dataclass
class DataConfig(Frozen):
    """Where examples come from, which are kept, how they become shards on disk, and how shards are packed into samples."""

    name: str = option("files", "short name of the prepared data; part of their folder's name", content_key=False)

    # Where examples come from
    source: str = option(
        "files",
        "reader: files (your own), huggingface (a dataset, through `datasets`), python_stdlib (the running Python's "
        "standard library), python_functions (its function bodies, labeled with their package)",
        choices=("files", "huggingface", "python_stdlib", "python_functions"), per_source=True,
    )  # fmt: skip
    sources: dict[str, Any] = option(
        {},
        "several sources, NAME: {path: ..., weight: 2.0, ...}: each may set its own reader, path, columns, split, limits, filter, "
        "mask and license, and otherwise has those of this group; weight: how often an epoch shows each of its samples (0.5: every other one)",
    )
    path: Optional[str] = option(
        None, "file, folder or glob ('dir/*.jsonl.zst') of the training examples, local or in an object store (s3://, gs://: pip install "
        "'manta-train[s3]' or [gs]); huggingface: the dataset's name or folder", per_source=True,
    )  # fmt: skip
    validation_path: Optional[str] = option(
        None, "source=files: file, folder or glob of the validation split; None: data.validation_fraction is held out", per_source=True
    )  # fmt: skip
    test_path: Optional[str] = option(
        None, "source=files: file, folder or glob of the test split; None: data.test_fraction is held out", per_source=True
    )  # fmt: skip
    format: str = option(
        "auto", "source=files: file format; auto: by the file's extension", choices=("auto", "text", "jsonl", "parquet", "arrow"),
        per_source=True,
    )  # fmt: skip
    text_column: str = option("text", "column with the text", per_source=True)
    label_column: Optional[str] = option(
        None, "column with the label, or with a list of labels, one for each word of a list in data.text_column"
    )
    subset: Optional[str] = option(
        None, "source=huggingface: the dataset's configuration; None: its only or default one", per_source=True
    )
    split: str = option("train", "source=huggingface: the dataset's split for training", per_source=True)
    validation_split: Optional[str] = option(
        None, "source=huggingface: the dataset's split for validation; None: data.validation_fraction is held out", per_source=True
    )  # fmt: skip
    test_split: Optional[str] = option(
        None, "source=huggingface: the dataset's split for the test; None: data.test_fraction is held out", per_source=True
    )  # fmt: skip
    revision: Optional[str] = option(None, "source=huggingface: branch, tag or commit of the dataset", per_source=True)
    stream: Optional[bool] = option(
        None, "source=huggingface: stream the dataset without a local copy; None: stream it if it is over 4 GB or of unknown size",
        content_key=False, per_source=True,
    )  # fmt: skip
    packages: Optional[int] = option(16, "source=python_functions: number of packages, which are the labels", least=2)
    store: Optional[str] = option(
        None, "address (s3://, gs://) or folder that shares prepared data between machines: the first job to need them prepares and "
        "uploads them; others download each shard into runs_dir when it is first read",
        identity=False, content_key=False,
    )  # fmt: skip
    license: str = option(
        "not stated", "license of the examples (SPDX), recorded in the manifest", formerly="licence", per_source=True
    )

    # Images
    image_column: Optional[str] = option(
        None,
        "column with the image: the bytes of its file, as `datasets` stores them, or its path; None: the data are not images",
    )
    image_size: int = option(
        32, "width and height of an image as the model reads it, in pixels", least=4, content_key=False
    )
    image_processor: Optional[str] = option(
        None,
        "folder of a Hugging Face image processor; None: the start bundle's, else the architecture's default for image_size",
        content_key=False,
    )
    caption: Optional[str] = option(
        None,
        "template of an image's caption, for objective=contrastive, with {label} for the label and {COLUMN} for a column: "
        "'a photo of a {label}'",
    )

    # Speech
    audio_column: Optional[str] = option(
        None, "column with the recording, whose transcript is in data.text_column: the bytes of its file (WAV, FLAC, OGG, MP3), as "
        "`datasets` stores them, or its path; needs pip install 'manta-train[audio]'; None: the data are not speech",
    )  # fmt: skip
    audio_seconds: int = option(
        30, "length of the model's audio window, in seconds: shorter recordings are padded with silence, longer ones are left out "
        "(Radford et al. 2022, Whisper: 30)", least=1, content_key=False,
    )  # fmt: skip
    feature_extractor: Optional[str] = option(
        None,
        "folder of a Hugging Face feature extractor; None: the start bundle's, else the architecture's default for audio_seconds",
        content_key=False,
    )

    # Which examples are kept
    validation_fraction: float = option(
        0.05, "fraction of the files (or rows) held out for validation", least=0, most=0.5, per_source=True
    )
    test_fraction: float = option(
        0.05, "fraction of the files (or rows) held out for the test", least=0, most=0.5, per_source=True
    )
    max_documents: Optional[int] = option(
        None, "maximum number of documents read from each source; None: all", least=1, per_source=True
    )
    mask: list[str] = option(
        [],
        "what is replaced by a placeholder in every text before it is used: emails, secrets",
        choices=("emails", "secrets"),
        per_source=True,
    )
    min_characters: Optional[int] = option(
        None, "minimum length of a document, in characters; shorter ones are left out", least=1, per_source=True
    )
    max_characters: Optional[int] = option(
        None, "maximum length of a document, in characters; longer ones are left out", least=1, per_source=True
    )
    quality: bool = option(
        False, "leave out documents that fail the quality rules for English prose of Rae et al. 2021 (Gopher, table A1)", per_source=True
    )  # fmt: skip
    languages: list[str] = option(
        [],
        "languages to keep (ISO 639-1), [en] or [en,de]; []: all; needs pip install 'manta-train[language]'",
        per_source=True,
    )
    filter: Optional[str] = option(
        None, "your own filter, 'module:function': text -> True to keep it, or False or a reason to leave it out", per_source=True
    )  # fmt: skip

    # How documents become shards
    tokenizer: Optional[str] = option(
        None, "folder of a Hugging Face tokenizer; None: a byte-level BPE is trained", content_key=False, micro_batch=True
    )  # fmt: skip
    vocab_size: int = option(
        4096, "vocabulary size of the BPE that is trained, in tokens", least=300, most=65536, micro_batch=True, parameter_count=True
    )  # fmt: skip
    sentinel_tokens: int = option(
        0, "number of <extra_id_N> tokens in the BPE that is trained; objective=span_corruption needs one for each span", least=0
    )  # fmt: skip
    shard_tokens: int = option(
        2**22, "approximate tokens of an Arrow shard, the unit of work of one process", least=1024
    )

    # How shards become samples
    sequence_length: int = option(
        256, "tokens of a training sample", least=2, content_key=False, micro_batch=True, parameter_count=True
    )
    packing: str = option(
        "end_to_end",
        "end_to_end: documents are concatenated and cut into samples without padding; best_fit: whole documents are combined, and cut only "
        "if longer than a sample (Ding et al. 2024)",
        choices=("end_to_end", "best_fit"), content_key=False,
    )  # fmt: skip
    within_documents: bool = option(
        False, "restrict attention to the tokens of the same document; positions restart at each document", content_key=False
    )  # fmt: skip

    def check(self) -> None:
        """Check data.sources, and the options of images and speech."""
        _check_sources(self)
        _check_images(self)
        _check_speech(self)


def source_options(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Return the options that each source sets for itself, by its name; of a single source none, by its reader's name."""
    return {name: dict(options) for name, options in data.sources.items()} or {data.source: {}}


def source_configs(data: DataConfig) -> dict[str, DataConfig]:
    """Return the options in effect for each source, by its name."""
    return {
        name: dataclasses.replace(data, **{key: value for key, value in options.items() if key != "weight"}, sources={})
        for name, options in source_options(data).items()
    }


def per_source_options() -> tuple[str, ...]:
    """Return the names of the options of DataConfig that an entry of data.sources may set."""
    return tuple(name for name, per_source in flag_values(DataConfig, "per_source").items() if per_source)


def content_options(data: DataConfig) -> dict[str, Any]:
    """Return the options that decide the content of the prepared shards, in the order in which they are declared.

    They are under their former names, so that the hash of data prepared by the previous version stays the same.
    """
    former = {f.name: f.metadata["formerly"] or f.name for f in dataclasses.fields(DataConfig)}
    decides = {name for name, flag in flag_values(DataConfig, "content_key").items() if flag}
    options = {former[name]: value for name, value in dataclasses.asdict(data).items() if name in decides}
    options["sources"] = {
        source: {former[key]: value for key, value in own.items() if key in decides}  # "weight" is not an option of DataConfig
        for source, own in data.sources.items()
    }  # fmt: skip
    return options


def _check_sources(data: DataConfig) -> None:
    """Check data.sources, whose options are those of DataConfig."""
    fields, hints = {f.name: f for f in dataclasses.fields(DataConfig)}, get_type_hints(DataConfig)
    per_source = per_source_options()
    for name, options in data.sources.items():
        if not isinstance(options, dict) or not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise UserError(f"data.sources.{name} is not a source: write NAME: {{path: ..., weight: 1.0}}")
        for key, value in options.items():
            where = f"data.sources.{name}.{key}"
            if key == "weight":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise UserError(f"{where}={value} is not a weight: use a number above 0, or leave the source out")
                continue
            if key not in per_source:
                raise UserError(f"{where} is not an option of a source{did_you_mean(key, [*per_source, 'weight'])}")
            if value is None:
                continue
            if not is_of(value, hints[key]):
                raise UserError(f"{where}={value} is not {type_name(hints[key])}")
            check_range(where, fields[key], value)
    for name, source in source_configs(data).items():
        where = f"data.sources.{name}." if data.sources else "data."
        if data.sources and (data.label_column or source.source == "python_functions"):
            raise UserError(
                "data.sources are for text without labels: leave out data.label_column, or use data.path alone"
            )
        for key in ("path", "validation_path", "test_path", "store"):
            check_address(where + key, getattr(source, key))
        if source.validation_fraction + source.test_fraction >= 0.9:
            raise UserError(
                f"{where}validation_fraction and {where}test_fraction leave nothing to train on: use less than 0.9 in total"
            )
        if source.min_characters and source.max_characters and source.min_characters > source.max_characters:
            raise UserError(
                f"{where}min_characters {source.min_characters} is more than {where}max_characters {source.max_characters}"
            )
        if source.filter and not re.fullmatch(r"[\w.]+:\w+", source.filter):
            raise UserError(f"{where}filter={source.filter} does not name a function: write 'module:function'")
        if data.sources and source.source == "huggingface" and not source.path:
            raise UserError(
                f"{where}source=huggingface needs the dataset's name or folder: set it with {where}path=..."
            )


def _check_images(data: DataConfig) -> None:
    """Check the options of images, and that each placeholder of a caption has its column."""
    if data.image_column and (data.source != "files" or data.sources):
        raise UserError("data.image_column is for images in files of your own: use data.source=files and data.path=...")
    if data.image_column and (data.mask or data.filter or data.quality or data.languages):
        raise UserError(
            "data.mask, data.filter, data.quality and data.languages are for text: leave them out with data.image_column"
        )
    if data.image_column and data.caption:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(data.caption) if name is not None}
        except ValueError as error:
            raise UserError(
                f"data.caption='{data.caption}' cannot be parsed ({error}): write {{label}} or {{COLUMN}}, and double a literal brace"
            ) from error
        if not names or "" in names:
            raise UserError(
                f"data.caption='{data.caption}' is the same for every image: write {{label}} or {{COLUMN}} into it"
            )
        if "label" in names and not data.label_column:
            raise UserError(
                "data.caption uses {label}: set its column with data.label_column=..., or use a {COLUMN} instead"
            )
    if data.sentinel_tokens and data.sentinel_tokens + 300 > data.vocab_size:
        raise UserError(
            f"data.sentinel_tokens {data.sentinel_tokens} leave too few of data.vocab_size {data.vocab_size} for text: "
            f"use data.vocab_size={data.sentinel_tokens + 300} or more"
        )


def _check_speech(data: DataConfig) -> None:
    """Check the options of speech."""
    if not data.audio_column:
        return
    if data.image_column:
        raise UserError("data.audio_column and data.image_column select different kinds of data: use one of them")
    if data.source != "files" or data.sources:
        raise UserError(
            "data.audio_column is for recordings in files of your own: use data.source=files and data.path=..."
        )
    if data.label_column:
        raise UserError(
            f"data.label_column={data.label_column} names classes, but speech is trained on transcripts: leave it out, and set "
            "the transcripts' column with data.text_column=..."
        )
    if data.mask or data.filter or data.quality or data.languages:
        raise UserError(
            "data.mask, data.filter, data.quality and data.languages are for text without recordings: leave them out "
            "with data.audio_column"
        )
