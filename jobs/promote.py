"""Make a bundle the champion: manta promote NAME.

It must verify (all hashes, and the golden outputs again), its lineage must be whole (data, run and parent each found by
its hash), and it must be better than the present champion by the paired bootstrap on the test split of its own data, or of
those that data=... names; promote.reason='...' stands in for the last alone, and is kept. MLflow's registry keeps a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, sets_data


def promote(config: Config, data_given: bool) -> None:
    """Promote, or say what is against it."""
    if not config.bundle:
        raise UserError("promote needs a bundle: manta promote NAME")
    from engine.evaluate.promote import promote

    promote(config, data_given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_job("promote", lambda config: promote(config, sets_data(words)), words, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())
