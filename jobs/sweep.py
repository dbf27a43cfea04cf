"""Search hyperparameters with Ray Tune, and export the best trial as a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from engine.config import Config
from jobs.entry import ray_session, run_job


def sweep(config: Config) -> None:
    """Run the trials, and print the best one, its bundle and the report."""
    from engine.data.corpus import check_input
    from engine.sweep.launch import sweep
    from engine.sweep.search_space import parse_search_space

    parse_search_space(config)
    check_input(config.data)
    with ray_session(config):
        result = sweep(config)
    from engine.evaluate.sweep_page import write_sweep_page
    from engine.progress import console
    from engine.train.run_folder import adapter_folder

    page = write_sweep_page(config.run_dir, config.name, asdict(result))
    adapter = adapter_folder(config.run_dir / "bundle")
    lines = [f"best      {result.best.name}", f"bundle    {config.run_dir / 'bundle'}", f"report    {page}"]
    console.print("\n".join(lines + [f"adapter   {adapter}"] * adapter.exists()), markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of the command line."""
    return run_job("sweep", sweep, argv)


if __name__ == "__main__":
    sys.exit(main())
