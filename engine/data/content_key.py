"""The content key of prepared data, which names their folder: a hash of all that decides their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.config import DataConfig, content_options, source_configs
from engine.data.filters import filter_source
from engine.data.input_files import InputFile
from engine.data.tokenizer import has_tokenizer
from engine.errors import UserError
from engine.hashing import sha256_file

FORMAT = 3  # increase it when the same input would give other shards


def content_key(
    data: DataConfig, seed: int, tokenizer: Path | None, files: list[tuple[str, str, InputFile]], preprocessor: Any
) -> str:
    """Hash all that decides the shards: format, options, seed, tokenizer, preprocessor, filters, and each input file's name, size and version."""
    options = content_options(data)
    if tokenizer and not tokenizer.is_dir():
        raise UserError(f"data.tokenizer={tokenizer} is not a folder: give the folder of a Hugging Face tokenizer")
    if tokenizer and has_tokenizer(tokenizer):
        del options["vocab_size"], options["sentinel_tokens"]
    # The order of sources is kept in the hash: it is the order of their documents.
    digest = hashlib.sha256(json.dumps([FORMAT, options, seed]).encode())
    if preprocessor is not None:
        digest.update(preprocessor.to_json_string().encode())
    for own in source_configs(data).values():
        digest.update(filter_source(own.filter) if own.filter else b"")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if tokenizer and (tokenizer / name).is_file():
            digest.update(sha256_file(tokenizer / name).encode())
    for source, path, file in files:
        digest.update(f"{source}\x1f{path}\x1f{file.size}\x1f{file.version}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
