"""Reader of data.source=huggingface: a dataset by name or folder, through the cache of `datasets` or as a stream."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from engine.config import DataConfig
from engine.data.document import Document, Part, Piece, explicit_split, split_of
from engine.data.file_formats import require_columns
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, kind_of
from engine.errors import UserError

MAX_CACHED_BYTES = 4 * 10**9  # a dataset with a larger download is streamed


def list_pieces(config: DataConfig, size: int) -> list[Piece]:
    """Return the dataset's held-out splits, where it has them, and its training split, as ranges of rows or shards of a stream."""
    pieces = []
    for split in ("test", "validation", None):
        name = explicit_split(config, split) if split else config.split
        if name:
            pieces += _pieces_of(config, name, split, size)
    return pieces


def check(config: DataConfig) -> None:
    """Raise UserError where the dataset, its split or a column isn't there."""
    dataset, _, _ = load(*_load_arguments(config, config.split))
    columns = dataset.column_names or list(next(iter(dataset), {}))
    require_columns(str(config.path), find_kind(config).columns, columns)


def find_kind(config: DataConfig) -> DataKind:
    """Return the kind of data that the options ask for; the first rows tell where the options don't."""
    return kind_of(config, lambda: load(*_load_arguments(config, config.split))[0])


def read(part: Part, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part; each goes to a split by a hash of its number, unless its split is given."""
    columns = part.kind.columns
    for piece in part.pieces:
        dataset, is_stream, _ = load(*_load_arguments(part.config, piece.file.name.rpartition(":")[2]))
        if dataset.column_names:
            require_columns(piece.file.path, columns, dataset.column_names)
            dataset = dataset.select_columns(list(columns))
        if is_stream:
            rows = dataset.shard(num_shards=dataset.num_shards, index=piece.start)
        else:
            rows = dataset.select(range(piece.start, piece.stop if piece.stop is not None else dataset.num_rows))
        named = _with_label_names(rows, part.config.label_column, dataset.features)
        for number, row in enumerate(part.kind.read(named, piece.file, counts)):
            split = piece.file.split or split_of(f"{piece.file.name}:{piece.start}:{number}", seed, part.config)
            yield row.document(split, piece.file.path)


@functools.lru_cache(maxsize=8)
def load(path: str, subset: str | None, split: str, revision: str | None, stream: bool | None) -> tuple[Any, bool, str]:
    """Return the dataset, whether it is a stream, and its fingerprint. Raises UserError where it cannot be loaded."""
    import datasets
    from datasets.fingerprint import Hasher

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(path, subset, revision=revision)
        if stream is None:
            size = builder.info.download_size
            stream = size is None or size > MAX_CACHED_BYTES
        dataset = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=stream)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"the dataset {path} can be neither found here nor fetched ({str(error).splitlines()[0][:200]}): check data.path, "
            "and HF_HUB_OFFLINE, the network and HF_TOKEN if it is on the Hub"
        ) from error
    except ValueError as error:
        raise UserError(
            f"the dataset {path} cannot be loaded so ({str(error).splitlines()[0][:300]}): check data.subset and data.split"
        ) from error
    data_files = builder.config.data_files or {}  # known by a commit of the Hub, or by the dates of local files
    fingerprint = Hasher.hash(
        (builder.config_id, str(builder.hash), {key: files.origin_metadata for key, files in data_files.items()})
    )
    return dataset, stream, fingerprint


def is_streamed(config: DataConfig) -> bool:
    """Return whether reading the dataset again means fetching it again."""
    return config.source == "huggingface" and load(*_load_arguments(config, config.split))[1]


def _load_arguments(config: DataConfig, split: str) -> tuple[str, str | None, str, str | None, bool | None]:
    if not config.path:
        raise UserError("data.path is not set: name the dataset, or its folder, with data.path=NAME")
    return config.path, config.subset, split, config.revision, config.stream


def _pieces_of(config: DataConfig, name: str, split: str | None, size: int) -> list[Piece]:
    dataset, is_stream, fingerprint = load(*_load_arguments(config, name))
    address = "/".join(word for word in (config.path, config.subset) if word)
    file = InputFile(
        f"{address}:{name}",
        f"{config.subset or 'default'}:{name}",
        split,
        0,
        f"{fingerprint}{' stream' if is_stream else ''}",
        None,
    )
    if is_stream:
        return [Piece(file, "huggingface", i, None, size) for i in range(dataset.num_shards)]
    rows = max(1, round(size * dataset.num_rows / max(dataset.data.nbytes, 1)))
    return [
        Piece(file, "huggingface", start, min(start + rows, dataset.num_rows), size)
        for start in range(0, max(dataset.num_rows, 1), rows)
    ]


def _with_label_names(rows: Iterable[dict[str, Any]], column: str | None, features: Any) -> Iterator[dict[str, Any]]:
    """Replace class ids by their names, where the dataset has a `ClassLabel`, or a list of them in each row."""
    feature = (features or {}).get(column or "")
    label_feature = getattr(feature, "feature", feature)
    name_of = getattr(label_feature, "int2str", None)

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        return name_of(value) if isinstance(value, int) and value >= 0 else value  # type: ignore[misc]

    for row in rows:
        yield row | {column: named(row.get(column))} if name_of and column else row
