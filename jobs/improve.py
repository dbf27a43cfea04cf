"""Learn from what an endpoint recorded of a bundle: manta improve NAME.

Requests that clients let be kept and what they said of the answers are compared with what the bundle was trained on. Where
something has drifted, improve.apply=true trains on the corrections and some of the old data, compares the two on examples
that were held back, and registers the new version if it is better. The exit code is 3 where it is not. With
improve.every_s=SECONDS it looks again and again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, training_session


def improve(config: Config) -> int:
    """Look, and act if asked to."""
    if not config.bundle:
        raise UserError("improve needs a bundle: manta improve NAME")
    from engine.improve.improve import improve

    return improve(config, training_session)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return run_job("improve", improve, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())
