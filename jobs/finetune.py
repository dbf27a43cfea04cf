"""Fine-tune a bundle (bundle=...) with another objective or other data."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job, training_session


def finetune(config: Config) -> None:
    """Train, and print where the bundle is."""
    with training_session(config):
        from cluster.prestart import prestart_workers
        from engine.train.launch import train

        train(config, start_spares=prestart_workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of the command line."""
    return run_job("finetune", finetune, argv)


if __name__ == "__main__":
    sys.exit(main())
