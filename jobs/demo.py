"""The whole life of a model: prepare, pretrain, sweep, evaluate, deploy, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import ray_session, start


def demo(config: Config) -> None:
    """Run every stage, and show the results."""
    from jobs.life import live

    with ray_session(config):
        live(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("demo", demo, argv)


if __name__ == "__main__":
    sys.exit(main())
