"""Measure a bundle on held-out data, with confidence intervals; against another one on the same examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def evaluate(config: Config) -> None:
    """Evaluate, and show the metrics."""
    from engine.evaluate.evaluate import evaluate_and_show

    evaluate_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("evaluate", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
