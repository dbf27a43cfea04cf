"""Search hyperparameters with Ray Tune, and make the best trial a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from engine.config import Config
from jobs.entry import ray_session, start


def sweep(config: Config) -> None:
    """Run the trials, and say which is best and where its bundle and the report are."""
    from engine.data.corpus import check_input
    from engine.sweep.launch import sweep
    from engine.sweep.space import check_space

    check_space(config)
    check_input(config.data)
    with ray_session(config):
        result = sweep(config)
    from engine.evaluate.sweep_page import write_page
    from engine.progress import console

    page = write_page(config.run_dir, config.name, asdict(result))
    console.print(
        f"best      {result.best.name}\nbundle    {config.run_dir / 'bundle'}\nreport    {page}", markup=False
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("sweep", sweep, argv)


if __name__ == "__main__":
    sys.exit(main())
