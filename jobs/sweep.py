"""Search hyperparameters with Ray Tune, and make the best trial a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import ray_session, start


def sweep(config: Config) -> None:
    """Run the trials, and say which is best and where its bundle is."""
    from engine.data.corpus import check_input
    from engine.sweep.launch import sweep

    check_input(config.data)
    with ray_session(config):
        sweep(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("sweep", sweep, argv)


if __name__ == "__main__":
    sys.exit(main())
