"""Convert a run's checkpoint to a bundle or a DeepSpeed universal checkpoint, or such a checkpoint to a run's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job


def convert(config: Config) -> None:
    """Convert, and print where the result is."""
    from engine.train.convert import convert_and_show

    convert_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of the command line."""
    return run_job("convert", convert, argv)


if __name__ == "__main__":
    sys.exit(main())
