"""Train a model from fresh weights on raw text: Ray Train workers, DeepSpeed ZeRO, a bundle at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start, training_session


def pretrain(config: Config) -> None:
    """Train, and say where the bundle is."""
    with training_session(config):
        from cluster.prestart import prestart_workers
        from engine.train.launch import train

        train(config, start_spares=prestart_workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("pretrain", pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
