"""Text to packed training data: tokens per second of `prepare` against `datasets.map` with the usual group_texts, for the same tokens.

Ours reads the files, removes duplicates, hashes inputs and shards, and writes them; the peer's rows are in memory when its time
starts. Both use the same BPE of 4,096 tokens; the peer runs with one process and with one per core.
Predicted on two cores: 5 times (tiktoken on threads is 4 to 5 times as fast as `encode_batch`, and nothing is copied to lists).
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cluster.environment import set_default_environment
from engine.config import Config, with_values
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.shards import Split
from tests.bench.interleaved import interleave, show

LENGTH = 256
CORPORA = {"13 MB, 1,000 files": (13, 1000), "40 MB, one file of JSON lines": (40, 1)}


def sources() -> Iterator[str]:
    """Yield the source files of the standard library and of all installed packages, without duplicates."""
    seen = set()
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            has_special_tokens = (
                "\0" in text or "<|" in text or text.startswith("\ufeff")
            )  # only ours reads these as plain text
            if text.strip() and not has_special_tokens and text not in seen:
                seen.add(text)
                yield text


def write_corpus(folder: Path, megabytes: int, files: int) -> list[str]:
    """Write a corpus of so many megabytes, as one JSON lines file or as text files, and return its texts."""
    texts, size = [], 0
    for text in sources():
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    folder.mkdir()
    if files == 1:
        (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:06d}.py").write_text(text)
    return texts


def ours(config: Config) -> float:
    """Return the tokens per second of preparing into a new folder."""
    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        folder = prepare(with_values(config, {"runs_dir": runs}))
        return Manifest.load(folder).splits["train"]["tokens"] / (time.perf_counter() - began)


def theirs(rows: Any, tokenizer: Any, processes: int | None) -> tuple[float, Any]:
    """Return the tokens per second of the usual two maps, and the tokenized rows."""

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        rows = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in rows]}

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]}

    began = time.perf_counter()
    tokens = rows.map(tokenize, batched=True, remove_columns=["text"], num_proc=processes, load_from_cache_file=False)
    blocks = tokens.map(group_texts, batched=True, num_proc=processes, load_from_cache_file=False)
    seconds = time.perf_counter() - began
    return len(blocks) * LENGTH / seconds, tokens


def main() -> None:
    """Print the ratios."""
    set_default_environment()
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    cores = len(os.sched_getaffinity(0))
    for name, (megabytes, files) in CORPORA.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            texts = write_corpus(folder / "in", megabytes, files)
            options = {"data.path": str(folder / "in"), "data.validation_fraction": 0.0, "data.test_fraction": 0.0}
            config = with_values(Config(), options | {"runs_dir": str(folder / "runs")})
            prepared = prepare(config)
            config = with_values(config, {"data.tokenizer": str(prepared / "tokenizer")})
            tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "rows")
            rows = datasets.load_from_disk(folder / "rows")

            _, tokens = theirs(rows, tokenizer, None)
            split = Split.open(prepared, "train")
            tokens_match = np.array_equal(
                np.fromiter(chain.from_iterable(tokens["input_ids"]), np.int64), split.token_range(0, split.num_tokens)
            )
            assert tokens_match, "not the same tokens"
            print(f"\n{name}: {split.num_tokens:,} tokens, the same for all; {cores} cores")
            rates = interleave(
                {
                    "prepare": lambda config=config: ours(config),
                    "datasets, 1 process": lambda rows=rows, tokenizer=tokenizer: theirs(rows, tokenizer, None)[0],
                    f"datasets, {cores} processes": lambda rows=rows, tokenizer=tokenizer: theirs(
                        rows, tokenizer, cores
                    )[0],
                },
                repeats=5 if megabytes < 20 else 3,
            )
            peers = {peer: 5.0 for peer in rates if peer != "prepare"}
            show(rates, "tokens/s", "prepare", peers)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
