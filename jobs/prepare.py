"""Turn raw text into token shards, a tokenizer and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def prepare(config: Config) -> None:
    """Prepare the data, and say where it is."""
    from engine.data.report import prepare_and_show

    prepare_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("prepare", prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
