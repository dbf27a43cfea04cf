"""A Hugging Face dataset, by its name or a folder that `datasets` loads: whole through its cache, or as a stream."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from engine.config import DataConfig
from engine.data.corpus import Document, Part, Piece, given_split, split_of
from engine.data.files import columns, labelled, need_columns
from engine.data.inputs import File
from engine.errors import UserError

STREAMED_BYTES = 4 * 10**9  # of download, over which a dataset is streamed


def pieces(config: DataConfig, size: int) -> list[Piece]:
    """Return the dataset's held-out splits, where it has, and its training split, in runs of rows or shards of a stream."""
    found = []
    for split in ("test", "validation", None):
        name = given_split(config, split) if split else config.split
        if name:
            found += _pieces_of(config, name, split, size)
    return found


def check(config: DataConfig) -> None:
    """Raise UserError where the dataset, its split or a column isn't there."""
    loaded, _, _ = load(*_which(config, config.split))
    need_columns(str(config.path), columns(config), loaded.column_names or list(next(iter(loaded), {})))


def read(part: Part, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the rows of a part that have a text; each goes to a split by a hash of its number, unless its split is given."""
    config = part.config
    for piece in part.pieces:
        loaded, streamed, _ = load(*_which(config, piece.file.name.rpartition(":")[2]))
        if loaded.column_names:
            need_columns(piece.file.path, columns(config), loaded.column_names)
            loaded = loaded.select_columns(list(columns(config)))
        if streamed:
            rows = loaded.shard(num_shards=loaded.num_shards, index=piece.start)
        else:
            rows = loaded.select(range(piece.start, piece.stop if piece.stop is not None else loaded.num_rows))
        for number, (text, label) in enumerate(labelled(_named(rows, config, loaded.features), config, counts)):
            split = piece.file.split or split_of(f"{piece.file.name}:{piece.start}:{number}", seed, config)
            yield Document(text, split, piece.file.path, label)


@functools.lru_cache(maxsize=8)
def load(path: str, subset: str | None, split: str, revision: str | None, stream: bool | None) -> tuple[Any, bool, str]:
    """Return the dataset, whether it is a stream, and what dates it. Raises UserError where it cannot be had."""
    import datasets
    from datasets.fingerprint import Hasher

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(path, subset, revision=revision)
        if stream is None:
            size = builder.info.download_size
            stream = size is None or size > STREAMED_BYTES
        loaded = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=stream)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"the dataset {path} can be neither found here nor fetched ({str(error).splitlines()[0][:200]}): check data.path, "
            "and HF_HUB_OFFLINE, the network and HF_TOKEN if it is on the Hub"
        ) from error
    except ValueError as error:
        raise UserError(
            f"the dataset {path} cannot be loaded so ({str(error).splitlines()[0][:300]}): check data.subset and data.split"
        ) from error
    given = builder.config.data_files or {}  # a commit of the Hub, or the dates of local files
    dated = Hasher.hash(
        (builder.config_id, str(builder.hash), {key: files.origin_metadata for key, files in given.items()})
    )
    return loaded, stream, dated


def streams(part: Part) -> bool:
    """Say whether reading a part again means to fetch it again."""
    return part.config.source == "huggingface" and load(*_which(part.config, part.config.split))[1]


def _which(config: DataConfig, split: str) -> tuple[str, str | None, str, str | None, bool | None]:
    if not config.path:
        raise UserError("data.path is not set: name the dataset, or its folder, with data.path=NAME")
    return config.path, config.subset, split, config.revision, config.stream


def _pieces_of(config: DataConfig, name: str, split: str | None, size: int) -> list[Piece]:
    loaded, streamed, dated = load(*_which(config, name))
    place = "/".join(word for word in (config.path, config.subset) if word)
    file = File(
        f"{place}:{name}",
        f"{config.subset or 'default'}:{name}",
        split,
        0,
        f"{dated}{' stream' if streamed else ''}",
        None,
    )
    if streamed:
        return [Piece(file, "huggingface", i, None, size) for i in range(loaded.num_shards)]
    rows = max(1, round(size * loaded.num_rows / max(loaded.data.nbytes, 1)))
    return [
        Piece(file, "huggingface", start, min(start + rows, loaded.num_rows), size)
        for start in range(0, max(loaded.num_rows, 1), rows)
    ]


def _named(rows: Iterable[dict[str, Any]], config: DataConfig, features: Any) -> Iterator[dict[str, Any]]:
    """Give the names of labels that the dataset holds as numbers."""
    column = config.label_column or ""
    name_of = getattr((features or {}).get(column), "int2str", None)
    for row in rows:
        label = row.get(column)
        yield row | {column: name_of(label)} if name_of and isinstance(label, int) and label >= 0 else row
