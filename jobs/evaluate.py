"""Evaluate a bundle on held-out data, with confidence intervals; with evaluate.against, compare it with another one.

suite=lm_eval tasks=[NAME_OR_FILE,...] runs EleutherAI's harness, with endpoint=http://127.0.0.1:8000 on the endpoint that
serves the bundle; these are short for evaluate.suite, evaluate.tasks and evaluate.endpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job

SHORT_OPTIONS = ("suite=", "tasks=", "endpoint=")


def evaluate(config: Config) -> None:
    """Evaluate config.bundle, print and save the results."""
    from engine.evaluate.job import run_evaluation

    run_evaluation(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_job(
        "evaluate", evaluate, [f"evaluate.{w}" if w.startswith(SHORT_OPTIONS) else w for w in words], ("bundle",)
    )


if __name__ == "__main__":
    sys.exit(main())
