"""Turn a run's checkpoint into a bundle or DeepSpeed's universal checkpoint, or such a one into a run's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def convert(config: Config) -> None:
    """Convert, and say where the result is."""
    from engine.train.convert import convert_and_show

    convert_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("convert", convert, argv)


if __name__ == "__main__":
    sys.exit(main())
