"""Plan a training job without starting it: memory, step time, checkpoint size."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job


def plan(config: Config) -> None:
    """Compute the plan and print it."""
    from engine.plan.plan import plan_and_show

    plan_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `manta plan`."""
    return run_job("plan", plan, argv)


if __name__ == "__main__":
    sys.exit(main())
