"""Improve a bundle from the requests and feedback that an endpoint recorded: manta improve NAME.

Recorded requests and feedback are compared with the data that the bundle was trained on. If there is drift,
improve.apply=true trains on the corrections and some of the old data, compares the two versions on held-out examples, and
registers the new one if it is better. The exit code is 3 if it is not. With improve.every_s=SECONDS this is repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, training_session


def improve(config: Config) -> int:
    """Measure drift, and with improve.apply train; return the exit code."""
    if not config.bundle:
        raise UserError("improve needs a bundle: manta improve NAME")
    from engine.improve.improve import improve

    return improve(config, training_session)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    return run_job("improve", improve, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())
