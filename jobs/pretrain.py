"""Pre-train a model from random weights on raw text, with Ray Train and DeepSpeed ZeRO, and export a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job, training_session


def pretrain(config: Config) -> None:
    """Train, and print where the bundle is."""
    with training_session(config):
        from cluster.prestart import prestart_workers
        from engine.train.launch import train

        train(config, start_spares=prestart_workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of the command line."""
    return run_job("pretrain", pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
