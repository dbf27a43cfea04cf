"""Say what a training job needs before it takes anything: memory, step time, checkpoint size."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def plan(config: Config) -> None:
    """Compute the plan, and show it."""
    from engine.plan.plan import plan_and_show

    plan_and_show(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("plan", plan, argv)


if __name__ == "__main__":
    sys.exit(main())
